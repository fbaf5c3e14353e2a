"""From the flags of `autotune search` to its contract: what holds for every configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.data import dataset_from
from autotune.cli.nodes import ranks_per_node
from autotune.cli.options import integers, memory_limit_from, tensor_parallel_from
from autotune.cli.start import datasets_of, read_given, start_of, strategies_of, workload_of
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Recompute

if TYPE_CHECKING:
    from autotune.search.study import Contract
    from autotune.spec.strategy import Strategy


def contract_of(args: argparse.Namespace) -> tuple[Contract, list[Strategy]]:
    """Return what the study holds, and the strategies behind its names."""
    from autotune.search.study import Contract
    from autotune.spec.hardware import detect_nodes
    from autotune.trial.packages import check_packages, warn_of_slow_fp8

    given = read_given(args)
    args.gpus = given.num_gpus
    ranks_per_node(args, args.gpus)  # refuses what does not go together
    limit = memory_limit_from(args)
    dataset = dataset_from(args)
    workload = workload_of(args, given)
    datasets = datasets_of(given)
    if dataset is not None:
        datasets = [dataset]
    if not datasets:  # the study says what it measured, also to a later version's defaults
        mean = workload.synthetic_document_tokens
        workload = workload.model_copy(update={"mean_document_tokens": mean})
    check_packages(workload)
    warn_of_slow_fp8(workload, args.device, compiled=False)
    if args.device == "cpu":
        _check_cores(ranks_per_node(args, args.gpus))
    hardware = detect_nodes(args.gpus, args.nodes, args.device, limit)
    start = start_of(args, given, workload, hardware)
    strategies = strategies_of(args, given.model, workload.precision, start)
    contract = Contract(
        model=given.model,
        base_model=given.model_name,
        workload=workload,
        hardware=hardware,
        device=args.device,
        strategies=[strategy.name for strategy in strategies],
        micro_batches=integers(args.micro_batches, "--micro-batches"),
        cp_degrees=integers(args.sequence_parallel, "--sequence-parallel") or [1, 2, 4],
        tp_degrees=tensor_parallel_from(args),
        cp_backends=_cp_backends(args.sequence_parallel_by),
        recompute=_recompute_modes(args.recompute),
        memory_limit_bytes=limit,
        datasets=datasets,
        seed=args.seed,
        sampler=args.sampler,
        start=start,
    )
    return contract, strategies


def contract_words(contract: Contract, folder: Path, resumed: bool, families: int) -> str:
    """Say what is searched over, where, and with which data."""
    workload = contract.workload
    mean = workload.synthetic_document_tokens
    synthetic = f"synthetic documents of {mean} tokens on average"
    data = contract.datasets[0].path if contract.datasets else synthetic
    word = "Resuming" if resumed else "Study"
    return (
        f"{word} in {folder}: {contract.base_model} on {contract.hardware.describe()}, sequence "
        f"{workload.seq_len}, global batch {workload.global_batch_size} sequences, "
        f"{workload.precision}, {'packed' if workload.packing else 'not packed'}, {data}; "
        f"{families} famil{'y' if families == 1 else 'ies'} of configurations."
    )


def _check_cores(ranks: int) -> None:
    cores = len(os.sched_getaffinity(0))
    if ranks > 4 * cores:
        raise AutotuneError(
            f"{ranks} CPU ranks on {cores} cores would measure their queueing, not training. "
            f"Lower --gpus to {4 * cores} or less, or predict with 'autotune plan --gpu-type TYPE'."
        )


def _recompute_modes(words: list[str] | None) -> list[str]:
    known = [str(mode) for mode in Recompute]
    unknown = [word for word in words or [] if word not in known]
    if unknown or words == []:
        raise AutotuneError(
            f"--recompute {','.join(words or [])!r}: allowed are {', '.join(known)}."
        )
    return list(dict.fromkeys(words or known))


def _cp_backends(words: list[str] | None) -> list[str]:
    known = [str(backend) for backend in CpBackend]
    if words == [] or any(word not in known for word in words or []):
        raise AutotuneError(
            f"--sequence-parallel-by {','.join(words or [])!r}: allowed are {', '.join(known)}."
        )
    return list(dict.fromkeys(words or []))
