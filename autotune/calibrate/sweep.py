"""`measure_machine`: start a sweep's ranks, wait for them, put their answers together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from autotune.calibrate.spec import SPEC_FILE, SweepAnswer, SweepSpec, SweptModel
from autotune.errors import AutotuneError
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import model_key
from autotune.plan import Engine, Plan
from autotune.planner import make_plan
from autotune.spec.hardware import HardwareSpec, detect_hardware
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Replicate, load_strategies
from autotune.spec.workload import Precision, Workload
from autotune.timing.calibration import TRIED_CP, Calibration, EngineTimes, engine_kind
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops, needed_ops
from autotune.trial.processes import kill_tagged
from autotune.trial.protocol import ModelSource, Request, write_message

Device = Literal["cpu", "cuda"]
DEADLINE_S = 600.0
"""After which a sweep is given up: about ten times what one takes."""
_TAG = "AUTOTUNE_TRIAL_ID"
_SEQ_LENS = {"cpu": (128, 512), "cuda": (1024, 4096)}
_BATCHES = (1, 4)
_ITEM_S = 0.02
_ANY_PLAN = Plan(strategy="ddp", engine=Engine.DDP)
_MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Of a micro-batch that is swept: what a pass costs beyond it is its tokens' share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the ranks of a sweep over several hosts of one machine run (network namespaces)."""

    prefixes: tuple[tuple[str, ...], ...]
    """Of each rank, what comes before its command, such as ``ip netns exec HOST``."""
    master_address: str
    """The first rank's host, as the others reach it."""
    num_nodes: int


def measure_machine(
    device: Device,
    num_ranks: int,
    *,
    places: Places | None = None,
    model: ModelSpec | None = None,
    precisions: Sequence[Precision] = (Precision.BF16,),
    packing: bool = True,
    seq_lens: Sequence[int] = (),
    engines: bool = True,
    item_s: float | None = None,
) -> tuple[Calibration, list[str]]:
    """Sweep this machine with real ranks and return what was measured, and what was not.

    Args:
        device: What the ranks run on.
        num_ranks: How many, at the same time.
        places: Of the ranks; None: all on this host.
        model: Whose passes and engines are measured as well.
        precisions: Of products and passes.
        packing: The workload's.
        seq_lens: Of the passes; empty takes two that are usual for the device.
        engines: Try the engines too, where nothing overlaps (CPU ranks).
        item_s: About how long a point is measured; None takes 0.02.

    Raises:
        AutotuneError: no such devices, or the ranks failed.
    """
    hardware = detect_hardware(num_ranks, device)
    if places is not None:
        per_node = num_ranks // places.num_nodes
        hardware = replace(hardware, gpus_per_node=per_node, num_nodes=places.num_nodes)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autotune-sweep-") as folder:
        spec = _spec(hardware, Path(folder), model, precisions, packing, seq_lens, engines, item_s)
        notes = _run(spec, Path(folder), places)
        answers = [
            SweepAnswer.model_validate_json(path.read_bytes())
            for path in sorted(Path(folder).glob("sweep-*-rank-*.json"))
        ]
    if not any(answer.matmuls for answer in answers):
        said = "; ".join(dict.fromkeys(note for a in answers for note in a.notes))
        raise AutotuneError(f"The sweep measured nothing: {said or 'its ranks ended early'}.")
    notes += dict.fromkeys(note for answer in answers for note in answer.notes)
    return (
        Calibration(
            device=device,
            num_ranks=num_ranks,
            threads=threads_of(num_ranks),
            fingerprint=machine_fingerprint(device).to_dict(),
            recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_s=time.monotonic() - started,
            **combined(answers),
        ),
        notes,
    )


def threads_of(num_ranks: int) -> int:
    """Return the threads a rank of a launch gets."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def combined(answers: Sequence[SweepAnswer]) -> dict[str, Any]:
    """Put the ranks' answers together: the ranks agreed on times, rates are the slowest's."""
    first = [answer for answer in answers if answer.rank == 0]
    found: dict[str, Any] = {
        name: tuple(each for answer in first for each in getattr(answer, name))
        for name in ("collectives", "matmuls", "optimizer", "models")
    }
    for name in (
        "copy_bytes_per_s", "elementwise_bytes_per_s", "to_host_bytes_per_s",
        "from_host_bytes_per_s", "host_bytes_per_s",
    ):  # fmt: skip
        found[name] = min(
            (value for a in answers if (value := getattr(a, name)) is not None), default=None
        )
    engines: dict[str, EngineTimes] = {}
    for each in (engine for answer in first for engine in answer.engines):
        known = engines.get(each.strategy)
        points = (*known.points, *each.points) if known else each.points
        engines[each.strategy] = each.model_copy(update={"points": points})
    return found | {"engines": tuple(engines.values())}


def _spec(
    hardware: HardwareSpec,
    folder: Path,
    model: ModelSpec | None,
    precisions: Sequence[Precision],
    packing: bool,
    seq_lens: Sequence[int],
    engines: bool,
    item_s: float | None,
) -> SweepSpec:
    device: Device = "cpu" if hardware.gpu.is_cpu else "cuda"
    lengths = sorted(set(seq_lens)) or list(_SEQ_LENS[device])
    swept = None
    plans: list[Plan] = []
    if model is not None:
        deep = model.num_layers if model.num_layers <= 4 else 4
        swept = SweptModel(
            name=model.name,
            key=model_key(model),
            config=model.hf_config,
            depths=(max(1, deep // 4), max(2, deep)),
        )
        if engines and device == "cpu":
            plans = engine_plans(hardware) + exchange_plans(hardware, model)
    return SweepSpec(
        device=device,
        num_ranks=hardware.num_gpus,
        precisions=tuple(precisions),
        packing=packing,
        model=swept,
        sizes=pass_sizes(lengths, _MOST_TOKENS[device]),
        shapes=tuple({(i, o) for i, o in model.linears.values()}) if model else (),
        strategies=tuple(plan.to_dict() for plan in plans),
        item_s=item_s or _ITEM_S,
        folder=str(folder),
    )


def pass_sizes(lengths: Sequence[int], most_tokens: int) -> tuple[tuple[int, int], ...]:
    """Return the micro-batches to sweep: few and many sequences of each length."""
    sizes = [
        (batch, length)
        for length in lengths
        for batch in _BATCHES
        if batch == 1 or batch * length <= most_tokens
    ]
    if len(sizes) == 1:
        sizes.append((2, lengths[0]))
    return tuple(sizes)


def engine_plans(hardware: HardwareSpec) -> list[Plan]:
    """Return one plan of each kind of engine."""
    found: dict[str, Plan] = {}
    for strategy in load_strategies():
        hybrid = strategy.replicate is Replicate.HYBRID
        if hybrid and (hardware.num_gpus < 4 or hardware.num_gpus % 2):
            continue
        plan = make_plan(strategy, hardware, grad_accum_steps=2)
        found.setdefault(engine_kind(plan), plan)
    return list(found.values())


def exchange_plans(hardware: HardwareSpec, model: ModelSpec) -> list[Plan]:
    """Return DDP with split sequences at few and at many tokens; none where heads do not divide."""
    if hardware.num_gpus % TRIED_CP or model.num_kv_heads % TRIED_CP:
        return []
    (ddp,) = load_strategies(["ddp"])
    return [
        make_plan(ddp, hardware, cp=TRIED_CP, micro_batch_size=batch, grad_accum_steps=2)
        for batch in _BATCHES
    ]


def _run(spec: SweepSpec, folder: Path, places: Places | None) -> list[str]:
    """Start the ranks and wait for them; all are stopped when this returns.

    Returns:
        What cut the sweep short, if anything did: the parts before that count.
    """
    write_message(spec, folder / SPEC_FILE)
    plans = [Plan.from_dict(plan) for plan in spec.strategies]
    for plan in {tuple(needed_ops(plan, spec.device)): plan for plan in plans}.values():
        # Once a machine, and before the deadline runs: the compiler takes a minute.
        build_native_ops(_request(spec, plan), folder / "build")
    tag = f"sweep-{os.getpid()}-{time.time_ns()}"
    variables = rank_environment(_request(spec, _ANY_PLAN), folder, tag, spec.num_ranks)
    if places is not None:
        variables["MASTER_ADDR"] = places.master_address
    ranks: list[subprocess.Popen[bytes]] = []
    cut: list[str] = []
    deadline = time.monotonic() + DEADLINE_S
    try:
        for rank in range(spec.num_ranks):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                prefix = places.prefixes[rank] if places is not None else ()
                ranks.append(
                    subprocess.Popen(
                        [
                            *prefix,
                            sys.executable,
                            "-m",
                            "autotune.runner.sweep",
                            str(folder / SPEC_FILE),
                        ],
                        env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):  # the others wait for it in vain
                cut = ["a rank ended early"]
                break
            if time.monotonic() > deadline:
                cut = [f"what was not done after {DEADLINE_S:.0f} s"]
                break
            time.sleep(0.1)
    finally:
        for each in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
        kill_tagged(_TAG, tag)
    if not list(folder.glob("sweep-*.json")):
        last = (folder / "rank-0.log").read_text(errors="replace").strip().splitlines()[-3:]
        raise AutotuneError(f"The ranks of the sweep failed: {' '.join(last) or 'no message'}")
    return cut


def _request(spec: SweepSpec, plan: Plan) -> Request:
    """Return what those want to see who ask for a launch's device and plan."""
    return Request(
        launch_id="sweep",
        mode="trial",
        model=ModelSource(name="", config={}),
        plan=plan.to_dict(),
        workload=Workload(),
        device=spec.device,
        out_dir=spec.folder,
    )
