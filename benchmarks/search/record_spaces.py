"""The landscapes that `record.py` records: which model, workload, ranks and configurations.

A landscape is a finite space of which every point is measured. `arms_of` lists it as arms: what one
launch can measure, which is a strategy, a sequence-parallel degree and a recomputation mode with
its ladder of micro batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autotune.errors import AutotuneError
from autotune.plan import Plan, Recompute
from autotune.planner import estimate_space
from autotune.search.space import family_name
from autotune.spec.hardware import HardwareSpec, Link, detect_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.units import parse_bytes

SHARDED = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_no_reshard")
OFFLOADED = ("zero2_offload_optimizer", "zero3_offload_optimizer", "fsdp2_offload")


@dataclass(frozen=True, kw_only=True, slots=True)
class Landscape:
    """One space, and what is fixed in it."""

    name: str
    about: str
    model: str = "tiny-qwen3"
    seq_len: int
    global_batch_size: int
    ranks: int
    """Over all hosts."""
    device: Literal["cpu", "cuda"] = "cpu"
    strategies: Sequence[str] = SHARDED
    micro_batches: Sequence[int] = (1, 2, 4)
    cp_degrees: Sequence[int] = (1, 2)
    recompute: Sequence[Recompute] = (Recompute.NONE, Recompute.FULL)
    recomputed: Sequence[str] | None = None
    """Strategies that are measured with recomputation as well; None means all of them."""
    memory_limit: str | None = None
    hosts: int = 1
    rate_mbit: int | None = None
    """Of the link between the hosts, each way; set where they are network namespaces."""
    only: Sequence[str] | None = None
    """Names of arms; the others are left out, to try the recorder."""
    left_out: str = ""
    """What the space could hold and does not, and why."""

    def workload(self) -> Workload:
        return Workload(seq_len=self.seq_len, global_batch_size=self.global_batch_size)

    def memory_limit_bytes(self) -> int | None:
        return parse_bytes(self.memory_limit) if self.memory_limit else None

    def hardware(self) -> HardwareSpec:
        """Return the hardware as the planner sees it; equal nodes where there are several hosts.

        The cores of one host are those this process may use: `netns` gives each host its own.
        """
        here = detect_hardware(self.ranks // self.hosts, self.device, self.memory_limit_bytes())
        if self.hosts == 1:
            return here
        assert self.rate_mbit is not None
        # A rank's share of its host's link, one hop of which a veth pair makes in some 50 us.
        share = self.rate_mbit * 1e6 / 8 / here.gpus_per_node
        link = Link(alpha_s=here.inter_node.alpha_s, bytes_per_s=share)
        return replace(here, num_nodes=self.hosts, inter_node=link)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one launch measures."""

    name: str
    plans: tuple[Plan, ...]
    """Ascending micro batch."""

    @property
    def first(self) -> Plan:
        return self.plans[0]

    @property
    def engine(self) -> str:
        """What decides how long a start takes: the library, and whether it builds a CPU Adam."""
        offload = "-offload" if self.first.offload_optimizer else ""
        return f"{self.first.engine}{offload}"


def arms_of(landscape: Landscape) -> tuple[list[Arm], dict[str, str]]:
    """Return every legal arm, and of the illegal plans a reason a code.

    Plans that are predicted not to fit are in: whether they do is what a landscape says.
    """
    space = estimate_space(
        load_model(landscape.model),
        landscape.workload(),
        landscape.hardware(),
        load_strategies(landscape.strategies),
        micro_batches=landscape.micro_batches,
        cp_degrees=landscape.cp_degrees,
        recompute=landscape.recompute,
    )
    groups: dict[str, list[Plan]] = {}
    for candidate in space.candidates:
        plan = candidate.plan
        kept = landscape.recomputed is None or plan.strategy in landscape.recomputed
        if plan.recompute is Recompute.NONE or kept:
            groups.setdefault(family_name(plan), []).append(plan)
    arms = [
        Arm(name=name, plans=tuple(sorted(plans, key=lambda plan: plan.micro_batch_size)))
        for name, plans in sorted(groups.items())
        if landscape.only is None or name in landscape.only
    ]
    return arms, {rejected.code: rejected.reason for rejected in reversed(space.rejected)}


_OFFLOAD_WHY = (
    "zero3_offload_params, and recomputation of the offloading strategies: they are the slow end "
    "of the space on CPU ranks, where host and device memory are one, and would have taken a third "
    "of the recording"
)
_HYBRID_WHY = "hsdp: it needs 4 ranks"

_SHORT = Landscape(
    name="cpu2-s128",
    about="2 CPU ranks, short sequences: starts and optimizer steps weigh",
    seq_len=128,
    global_batch_size=8,
    ranks=2,
    strategies=SHARDED + OFFLOADED,
    recomputed=SHARDED,
    left_out=f"{_HYBRID_WHY}; {_OFFLOAD_WHY}",
)
LANDSCAPES = {
    landscape.name: landscape
    for landscape in (
        _SHORT,
        replace(
            _SHORT,
            name="cpu2-s256",
            about="2 CPU ranks, longer sequences: compute weighs",
            seq_len=256,
        ),
        Landscape(
            name="cpu4-2hosts",
            about="4 CPU ranks on 2 hosts behind a slow link: what crosses it weighs",
            seq_len=128,
            global_batch_size=16,
            ranks=4,
            hosts=2,
            rate_mbit=500,
            strategies=(*SHARDED, "hsdp"),
            recomputed=("ddp", "zero1", "fsdp2", "hsdp"),
            left_out=(
                "offload, and recomputation of zero2, zero3 and fsdp2_no_reshard: four ranks on "
                "two cores are slow, and each would have taken as long as the arm it differs from"
            ),
        ),
        Landscape(
            name="cpu2-limit",
            about="2 CPU ranks under a memory limit that about a third of the points break",
            seq_len=256,
            global_batch_size=8,
            ranks=2,
            memory_limit="180MiB",
            strategies=SHARDED,
            left_out=f"{_HYBRID_WHY}; the offloading strategies, which are in cpu2-s256",
        ),
        Landscape(
            name="cuda1",
            about="one CUDA GPU: nothing is sharded, memory and compute decide",
            model="qwen3-0.6b",
            seq_len=2048,
            global_batch_size=16,
            ranks=1,
            device="cuda",
            strategies=("ddp", "zero1", "zero2", "zero3", "fsdp2", *OFFLOADED),
            micro_batches=(1, 2, 4, 8, 16),
            cp_degrees=(1,),
        ),
    )
}


def landscape_named(name: str) -> Landscape:
    """Return a landscape.

    Raises:
        AutotuneError: an unknown name; the known ones are in the message.
    """
    if name not in LANDSCAPES:
        raise AutotuneError(f"Landscape {name!r} is not known: {', '.join(LANDSCAPES)}.")
    return LANDSCAPES[name]


def numbered(arms: Sequence[Arm]) -> Iterator[str]:
    """Return a line an arm, for people."""
    for arm in arms:
        sizes = ", ".join(f"{p.micro_batch_size} x {p.grad_accum_steps}" for p in arm.plans)
        yield f"{arm.name}: micro batch x accumulation {sizes}"
