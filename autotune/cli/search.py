"""`autotune search`: measure configurations on real ranks and write the fastest that fits."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.cli.nodes import follow_if_told, leading, prepare_hosts
from autotune.cli.options import use_knowledge
from autotune.cli.search_contract import contract_of, contract_words
from autotune.cli.search_flags import add_arguments
from autotune.cli.space import space_from
from autotune.cli.start import start_words
from autotune.errors import AutotuneError, NothingFitsError
from autotune.units import parse_duration_s

if TYPE_CHECKING:
    from autotune.search.parallel import Slot
    from autotune.search.study import Contract
    from autotune.search.tuner import Stopped

__all__ = ["add_arguments", "run"]


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
    contract, strategies = contract_of(args)
    use_knowledge(args)
    if follow_if_told(args, args.gpus, args.device):
        return 0
    calibration = calibration_for(contract.hardware)
    ranking = rank_plans(
        contract.model,
        contract.workload,
        contract.hardware,
        strategies,
        **space_from(args),
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
        progress.note(contract_words(contract, folder, resumed, len(families)))
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
