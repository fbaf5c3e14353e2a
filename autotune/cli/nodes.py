"""The flags of launches over several hosts, and which part this host takes in them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from autotune.cli.options import positive_int, whole_number
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.search.job import Job
    from autotune.search.space import Family
    from autotune.trial.nodes.leader import Leader

_OWN_TO_A_HOST = {"node_rank", "out", "output_dir", "json", "run", "rdzv_timeout"}
"""Arguments that may differ between the hosts."""


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `follow_if_told` and `leading` read."""
    group = parser.add_argument_group(
        "several hosts (the same command on each; they share a secret in AUTOTUNE_RDZV_SECRET)"
    )
    group.add_argument(
        "--nodes",
        type=positive_int,
        default=1,
        metavar="N",
        help="hosts, each with its equal share of --gpus (default: 1)",
    )
    group.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="where the hosts meet: the one that owns the address leads, the others follow it",
    )
    group.add_argument(
        "--node-rank",
        type=whole_number,
        metavar="K",
        help="which host this is, 0 leads (default: by address and order of coming)",
    )
    group.add_argument(
        "--rdzv-timeout",
        type=positive_int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other hosts (default: %(default)s)",
    )


def ranks_per_node(args: argparse.Namespace, num_gpus: int) -> int:
    """Return each host's share of the ranks.

    Raises:
        AutotuneError: flags that do not go together, or ranks that do not divide.
    """
    if args.nodes == 1 and (args.rdzv_endpoint or args.node_rank is not None):
        raise AutotuneError("--rdzv-endpoint and --node-rank belong to --nodes 2 or more.")
    if args.nodes > 1 and not args.rdzv_endpoint:
        raise AutotuneError(
            f"--nodes {args.nodes} needs --rdzv-endpoint HOST:PORT: the address of one of the "
            "hosts and a free port on it."
        )
    if args.node_rank is not None and not 0 <= args.node_rank < args.nodes:
        raise AutotuneError(f"--node-rank {args.node_rank}: allowed are 0 to {args.nodes - 1}.")
    share, rest = divmod(num_gpus, int(args.nodes))
    if rest or not share:
        raise AutotuneError(
            f"--gpus {num_gpus} are all hosts' together and do not divide over --nodes "
            f"{args.nodes}."
        )
    return share


def follow_if_told(args: argparse.Namespace, num_gpus: int, device: str) -> bool:
    """Serve the host that leads, if this is not it; return whether that is what was done."""
    if args.nodes == 1 or _leads(args):
        return False
    from autotune.trial.nodes.follower import follow
    from autotune.trial.nodes.hosts import Endpoint
    from autotune.trial.nodes.wire import shared_secret

    follow(
        Endpoint.parse(args.rdzv_endpoint),
        node_rank=args.node_rank,
        secret=shared_secret(),
        description=_description(args, num_gpus, device),
        wait_limit_s=args.rdzv_timeout,
        say=_say,
    )
    return True


@contextlib.contextmanager
def leading(args: argparse.Namespace, num_gpus: int, device: str) -> Iterator[Leader | None]:
    """Return what starts ranks on all hosts, when they are there; None for one host."""
    if args.nodes == 1:
        yield None
        return
    from autotune.trial.nodes.hosts import Endpoint
    from autotune.trial.nodes.leader import Leader
    from autotune.trial.nodes.wire import shared_secret

    endpoint = Endpoint.parse(args.rdzv_endpoint)
    _say(f"waiting for {args.nodes - 1} more host(s) at {endpoint}")
    with Leader(
        endpoint,
        num_nodes=args.nodes,
        ranks_per_node=ranks_per_node(args, num_gpus),
        secret=shared_secret(),
        description=_description(args, num_gpus, device),
        join_limit_s=args.rdzv_timeout,
        say=_say,
    ) as leader:
        yield leader


def prepare_hosts(leader: Leader | None, families: Sequence[Family], job: Job) -> None:
    """Have the other hosts build what the families need, before a deadline of theirs runs."""
    from autotune.trial.native_ops import needed_ops
    from autotune.trial.protocol import Request

    if leader is None:
        return
    plans = [family.ladder[0].plan for family in families]
    for plan in {tuple(needed_ops(plan, job.device)): plan for plan in plans}.values():
        leader.build_native_ops(
            Request(
                launch_id="ops",
                mode="trial",
                model=job.model,
                plan=plan.to_dict(),
                workload=job.workload,
                device="cuda" if job.device == "cuda" else "cpu",
                out_dir="",
            )
        )


def _leads(args: argparse.Namespace) -> bool:
    from autotune.trial.nodes.hosts import Endpoint, is_here

    if args.node_rank is not None:
        return bool(args.node_rank == 0)
    return is_here(Endpoint.parse(args.rdzv_endpoint).address())


def _description(args: argparse.Namespace, num_gpus: int, device: str) -> dict[str, Any]:
    from autotune.spec.hardware import detect_hardware
    from autotune.trial.nodes.hosts import installed_versions

    share = ranks_per_node(args, num_gpus)
    gpu = detect_hardware(share, "cpu" if device == "cpu" else "cuda").gpu.name
    given = {
        f"--{name.replace('_', '-')}": value if value is None else str(value)
        for name, value in vars(args).items()
        if name not in _OWN_TO_A_HOST
    }
    return {"GPUs": f"{share} x {gpu}", **installed_versions(), **given}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
