"""Real trials of every engine at one small micro-batch: what it takes beyond the model's passes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from autotune.calibrate.spec import SweepAnswer, SweepSpec
from autotune.plan import Plan
from autotune.spec.workload import Workload
from autotune.timing.calibration import EXCHANGED, EnginePoint, EngineTimes, engine_kind
from autotune.trial.protocol import Measurement, ModelSource, Request, Rung

_MEASUREMENT = Measurement(warmup_steps=2, min_steps=4, max_steps=8, target_seconds=0.8)


def engine_part(number: int, depth: int) -> Callable[[SweepSpec, SweepAnswer], None]:
    """Return the part that tries one strategy at one depth."""

    def measure(spec: SweepSpec, answer: SweepAnswer) -> None:
        from autotune.runner.answer import Answer
        from autotune.runner.checks import InvalidRunError
        from autotune.runner.sweep_passes import config_at_depth
        from autotune.runner.trial import run_trial

        assert spec.model is not None
        plan = Plan.from_dict(spec.strategies[number])
        batch, seq_len = plan.micro_batch_size, spec.sizes[0][1]
        folder = Path(spec.folder) / f"engine-{number}-{depth}"
        folder.mkdir(exist_ok=True)
        os.environ["AUTOTUNE_LAUNCH_DIR"] = str(folder)
        precision = spec.precisions[0]
        request = Request(
            launch_id="sweep",
            mode="trial",
            model=ModelSource(name="swept", config=config_at_depth(spec.model.config, depth)),
            plan=plan.to_dict(),
            workload=Workload(
                seq_len=seq_len,
                global_batch_size=plan.data_parallel_size * batch * 2,
                precision=precision,
                packing=spec.packing,
            ),
            device=spec.device,
            out_dir=str(folder),
            rungs=[Rung(micro_batch_size=batch, grad_accum_steps=steps) for steps in (1, 2)],
            measurement=_MEASUREMENT,
        )
        trial = Answer(request)
        try:
            run_trial(request, trial)
        except InvalidRunError as error:
            answer.notes.append(f"{plan.strategy}: {error}")
            return
        once, twice = (rung.accumulations[0] for rung in trial.result.rungs)
        answer.engines.append(
            EngineTimes(
                model=spec.model.key,
                precision=precision,
                packing=spec.packing,
                strategy=engine_kind(plan) + (EXCHANGED if plan.cp > 1 else ""),
                num_ranks=spec.num_ranks,
                points=(
                    EnginePoint(
                        layers=depth,
                        micro_batch_size=batch,
                        seq_len=seq_len,
                        step_s=statistics.median(once.step_s),
                        step_twice_s=statistics.median(twice.step_s),
                    ),
                ),
            )
        )

    return measure
