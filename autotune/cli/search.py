"""`autotune search`: measure configurations on real ranks and write the fastest that fits."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.cli.data import add_data_arguments, dataset_from
from autotune.cli.nodes import (
    add_node_arguments,
    follow_if_told,
    leading,
    prepare_hosts,
    ranks_per_node,
)
from autotune.cli.options import (
    add_knowledge_argument,
    add_model_argument,
    add_tensor_parallel_argument,
    add_workload_arguments,
    comma_list,
    integers,
    memory_limit_from,
    positive_int,
    seed_number,
    tensor_parallel_from,
    use_knowledge,
    whole_number,
)
from autotune.cli.start import (
    add_start_arguments,
    datasets_of,
    read_given,
    start_of,
    start_words,
    strategies_of,
    workload_of,
)
from autotune.errors import AutotuneError, NothingFitsError
from autotune.plan import CpBackend, Recompute
from autotune.search.names import DEFAULT_SAMPLER, FINALISTS, SAMPLERS, TOLERANCE
from autotune.units import parse_duration_s

if TYPE_CHECKING:
    from autotune.search.parallel import Slot
    from autotune.search.study import Contract
    from autotune.search.tuner import Stopped
    from autotune.spec.strategy import Strategy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    add_model_argument(parser, required=False)
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="number of GPUs (ranks); --from may say it"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu measures on CPU processes instead of GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory a rank may use, enforced, such as 600MiB or 40GiB (default: all of it)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="study folder; the same command in it resumes (default: reports/MODEL-Ngpu)",
    )
    add_start_arguments(parser)
    add_workload_arguments(parser)
    add_data_arguments(parser)
    add_knowledge_argument(parser)
    space = parser.add_argument_group("space")
    space.add_argument(
        "--strategies", type=comma_list, metavar="A,B", help="default: all that ship"
    )
    space.add_argument(
        "--micro-batches", type=comma_list, metavar="1,2,4", help="default: powers of two"
    )
    space.add_argument(
        "--sequence-parallel", type=comma_list, metavar="1,2", help="degrees (default: 1,2,4)"
    )
    space.add_argument(
        "--sequence-parallel-by",
        type=comma_list,
        metavar="ulysses,ring",
        help="how (default: ulysses, and ring for degrees that do not divide the heads)",
    )
    add_tensor_parallel_argument(space)
    space.add_argument(
        "--recompute",
        type=comma_list,
        metavar="none,full",
        help="activation checkpointing modes (default: none,full)",
    )
    effort = parser.add_argument_group("effort")
    effort.add_argument(
        "--trials",
        type=positive_int,
        metavar="N",
        help="launches at most; each measures a ladder of micro batches (default: no limit)",
    )
    effort.add_argument("--budget", metavar="TIME", help="such as 20m (default: no limit)")
    effort.add_argument(
        "--trial-timeout", metavar="TIME", help="deadline of a launch (default: from prediction)"
    )
    effort.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=DEFAULT_SAMPLER,
        help="what chooses the next configuration (default: %(default)s)",
    )
    effort.add_argument(
        "--tolerance",
        type=percentage,
        default=TOLERANCE,
        metavar="PERCENT",
        help="cost-model stops when nothing left is likely to be faster by more (default: 2%%)",
    )
    effort.add_argument(
        "--confirm",
        type=whole_number,
        default=FINALISTS,
        metavar="N",
        help="finalists measured again, each freshly forked; 0 for none (default: %(default)s)",
    )
    effort.add_argument(
        "--parallel",
        type=positive_int,
        metavar="N",
        help="launches at once, on disjoint devices (default: as many as there are GPUs for; 1 on "
        "cpu)",
    )
    effort.add_argument("--seed", type=seed_number, default=42, help="default: %(default)s")
    add_node_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of a table"
    )


def percentage(text: str) -> float:
    """Read a percentage, with or without its sign, as a share."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text!r}: a percentage from 0 to below 100 is needed")
    return value / 100


def run(args: argparse.Namespace) -> int:
    """Search, keeping summary, best.yml, CSV and HTML up to date after every launch."""
    from autotune.calibrate.store import calibration_for
    from autotune.memory.knowledge import residuals_for
    from autotune.planner import rank_plans, refusal_lines
    from autotune.report.console import LiveProgress
    from autotune.report.outputs import Outputs
    from autotune.search.learning import Learner
    from autotune.search.space import make_families, space_of
    from autotune.search.study import (
        SPACE_FILE,
        check_folder,
        kept_space,
        locked,
        open_study,
        write_json,
    )
    from autotune.trial.interrupts import first_interrupt_only
    from autotune.trial.store import RecordStore

    budget_s = parse_duration_s(args.budget) if args.budget else None
    contract, strategies = _contract(args)
    use_knowledge(args)
    if follow_if_told(args, args.gpus, args.device):
        return 0
    calibration = calibration_for(contract.hardware)
    ranking = rank_plans(
        contract.model,
        contract.workload,
        contract.hardware,
        strategies,
        micro_batches=contract.micro_batches,
        cp_degrees=contract.cp_degrees,
        cp_backends=[CpBackend(name) for name in contract.cp_backends] or None,
        tp_degrees=contract.tp_degrees,
        recompute=[Recompute(mode) for mode in contract.recompute],
        also=[contract.start.plan] if contract.start else [],
        residuals=residuals_for(contract.hardware),
        calibration=calibration,
    )
    rules = [
        {"plan": r.plan.to_dict(), "code": r.code, "reason": r.reason} for r in ranking.rejected
    ]
    _need_train_extra()
    slots = _slots(args)
    from autotune.search.tuner import Tuner

    folder = args.out or Path("reports") / f"{contract.model.name}-{args.gpus}gpu"
    check_folder(folder, contract)  # before the lock makes a file in it
    here = leading(args, args.gpus, args.device)
    with locked(folder), first_interrupt_only(), here as hosts:
        resumed = open_study(folder, contract)
        families, left_out = make_families(ranking.candidates, kept_space(folder))
        write_json(folder / SPACE_FILE, space_of(families))
        rejected = rules + left_out
        progress = LiveProgress()
        progress.note(_contract_words(contract, folder, resumed, len(families)))
        if contract.start is not None:
            progress.note(start_words(contract.start))
        if calibration is None and args.nodes == 1:
            progress.note(
                "Times are predicted by formulas alone; measured ones make the search shorter: "
                f"autotune doctor --measure --device {args.device} --gpus {args.gpus} "
                f"--model {contract.base_model}"
            )
        for line in refusal_lines((each["code"], each["reason"]) for each in rejected):
            progress.note(f"not measured: {line}")
        learner = Learner.of_machine(
            contract.model,
            contract.workload,
            contract.hardware,
            calibration,
            RecordStore(folder).all(),
        )
        job = _job(args, contract)
        prepare_hosts(hosts, families, job)
        tuner = Tuner(
            folder,
            families,
            job,
            progress,
            learner,
            sampler=args.sampler,
            tolerance=args.tolerance,
            slots=slots,
            hosts=hosts,
        )
        outputs = Outputs(folder, contract, rejected, seed=args.seed)
        stopped = tuner.run(
            max_launches=args.trials,
            budget_s=budget_s,
            after_launch=lambda now: outputs.write(now, final=False, left_out=tuner.left_out()),
            confirm=args.confirm,
        )
        study = outputs.write(stopped, final=True, left_out=tuner.left_out())
    return _answer(args, study, stopped, folder)


def _contract(args: argparse.Namespace) -> tuple[Contract, list[Strategy]]:
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


def _job(args: argparse.Namespace, contract: Contract) -> Any:
    from autotune.search.job import Job
    from autotune.trial.protocol import Measurement, ModelSource

    model = contract.model
    return Job(
        model=ModelSource(name=model.name, config=model.hf_config, tokenizer=model.tokenizer),
        num_parameters=model.num_parameters,
        workload=contract.workload,
        device=contract.device,
        memory_limit_bytes=contract.memory_limit_bytes,
        datasets=contract.datasets,
        measurement=Measurement(),
        seed=args.seed,
        trial_timeout_s=parse_duration_s(args.trial_timeout) if args.trial_timeout else None,
    )


def _slots(args: argparse.Namespace) -> list[Slot]:
    from autotune.search.parallel import Slot, core_slots, gpu_slots
    from autotune.spec.nvml import nvml_devices

    if args.nodes > 1:
        if args.parallel not in (None, 1):
            raise AutotuneError(
                f"--parallel {args.parallel}: launches over several hosts run one at a time."
            )
        return [Slot()]
    if args.device == "cpu":
        return core_slots(args.gpus, args.parallel)
    names, _ = nvml_devices()
    return gpu_slots(args.gpus, len(names), args.parallel)


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
    return words or known


def _cp_backends(words: list[str] | None) -> list[str]:
    known = [str(backend) for backend in CpBackend]
    if words == [] or any(word not in known for word in words or []):
        raise AutotuneError(
            f"--sequence-parallel-by {','.join(words or [])!r}: allowed are {', '.join(known)}."
        )
    return words or []


def _need_train_extra() -> None:
    """Say what is missing before a folder is made; nothing heavy is imported for it."""
    from importlib.util import find_spec

    missing = [
        name
        for name in ("torch", "transformers", "accelerate", "deepspeed", "optuna")
        if find_spec(name) is None
    ]
    if missing:
        raise AutotuneError(
            f"Measuring needs {', '.join(missing)}: pip install 'autotune-llm[train]'. "
            "'autotune plan' predicts without them."
        )


def _contract_words(contract: Contract, folder: Path, resumed: bool, families: int) -> str:
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


def _answer(args: argparse.Namespace, study: Any, stopped: Stopped, folder: Path) -> int:
    from rich.console import Console

    from autotune.report.console import print_result

    summary = study.summary
    if args.json:
        document = {key: summary[key] for key in ("study", "best", "trials", "stopped_because")}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        print_result(study, Console())
    if stopped.interrupted:
        sys.stderr.write(f"Interrupted. The same command resumes; results so far: {folder}\n")
        return 130
    if summary["best"] is None:
        raise NothingFitsError(
            f"No configuration ran to its end ({len(study.records)} tried); the reasons are in "
            f"{folder / 'report.html'} and in the logs under {folder / 'launches'}."
        )
    sys.stderr.write(
        f"Wrote {folder / 'best.yml'}, trials.csv and report.html. "
        f"Train with: autotune train {folder / 'best.yml'}\n"
    )
    return 0
