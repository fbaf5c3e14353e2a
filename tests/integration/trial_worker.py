"""One rank that runs trials as they are and writes down what the tests ask of them.

`python -m tests.integration.trial_worker REQUEST.json...` runs each request in a child that shares
the imports. Beside each request it leaves the rank's result file, and in `seen.json`

- `gradient_norms`: of every step before clipping, by micro batch and accumulation: ``{"4x1": []}``;
- `deepspeed_told`: micro batch and accumulation as its engine, and the accumulation as its
  optimizer had them in each of these steps;
- `refused`: what the checks of the run said when they were told that something else was asked for,
  by the name in `WRONG`; None where they let it pass.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune.plan import Engine, Plan, Recompute
from autotune.runner import checks, trial
from autotune.runner.answer import Answer
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.training import TrainSettings
from autotune.spec.workload import Precision, Workload
from autotune.trial.protocol import Request, read_message

SEEN_FILE = "seen.json"
SLOWED_S = 0.1
"""How much longer DeepSpeed's optimizer takes here, so that its time is seen where it belongs."""
ZERO = {"engine": Engine.DEEPSPEED, "zero_stage": 1}
WRONG: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "ddp": {
        "engine": (ZERO, {}, "engine: asked for deepspeed, but ddp runs"),
        "ranks": ({"dp_replicate": 2}, {}, "processes: asked for 2, but 1 runs"),
        "recompute": ({"recompute": Recompute.FULL}, {}, "attention calls in a step"),
        "packing": ({}, {"packing": True}, "masked attention calls in a step"),
        "seq_len": ({}, {"seq_len": 128}, "tokens each attention sees"),
        "precision": ({}, {"precision": Precision.BF16}, "attention dtype: asked for torch.bfl"),
    },
    "fsdp2": {
        "recompute": ({"recompute": Recompute.FULL}, {}, "recomputed layers"),
        "precision": ({}, {"precision": Precision.BF16}, "compute dtype"),
    },
    "zero2_offload_optimizer": {
        "stage": ({"zero_stage": 3}, {}, "ZeRO stage: asked for 3, but 2 runs"),
        "offload": ({"offload_optimizer": False}, {}, "optimizer offload"),
        "offload_params": ({"offload_params": True}, {}, "parameter offload"),
        "precision": ({}, {"precision": Precision.BF16}, "parameter dtype"),
    },
}
"""By strategy and name: how plan and workload differ from those that run, and what to say."""


def watch_steps() -> dict[str, dict[str, list[Any]]]:
    """Return dictionaries that fill as the trainer's steps go by."""
    norms: dict[str, list[Any]] = defaultdict(list)
    told: dict[str, list[Any]] = defaultdict(list)
    read_norm = AutotuneTrainer._get_grad_norm

    def watched(self: AutotuneTrainer, *args: Any, **kwargs: Any) -> Any:
        norm = read_norm(self, *args, **kwargs)
        batch, steps = self.loader._loader.batch_size, self.args.gradient_accumulation_steps
        norms[f"{batch}x{steps}"].append(float(norm))
        if self.plan.engine is Engine.DEEPSPEED:
            engine = self.model_wrapped
            of_engine = (
                engine.train_micro_batch_size_per_gpu(),
                engine.gradient_accumulation_steps(),
            )
            of_optimizer = engine.optimizer.gradient_accumulation_steps
            told[f"{batch}x{steps}"].append((*of_engine, of_optimizer))
        return norm

    AutotuneTrainer._get_grad_norm = watched  # type: ignore[method-assign]
    return {"gradient_norms": norms, "deepspeed_told": told}


def slow_optimizer(engine: Any) -> None:
    step = engine.optimizer.step

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOWED_S)
        return step(*args, **kwargs)

    engine.optimizer.step = slowed


def watch_checks(strategy: str) -> dict[str, str | None]:
    """Return a dictionary that fills when the run is checked, by the names in `WRONG`."""
    refused: dict[str, str | None] = dict.fromkeys([*WRONG[strategy], "buffer", "group"])
    prepared, attention = checks.check_prepared, checks.check_attention

    def ask(name: str, check: Callable[[], object]) -> None:
        try:
            check()
        except checks.InvalidRunError as error:
            refused[name] = refused[name] or str(error)

    def check_prepared(trainer: AutotuneTrainer, plan: Plan, workload: Workload) -> dict[str, Any]:
        found = prepared(trainer, plan, workload)
        for name, (other_plan, other_workload, _) in WRONG[strategy].items():
            asked = replace(plan, **other_plan), workload.model_copy(update=other_workload)
            ask(name, lambda asked=asked: prepared(trainer, *asked))
        model = trainer.model_wrapped
        two_ranks = replace(plan, dp_shard=2 * plan.dp_shard)
        ask("group", lambda: checks._check_groups(model, two_ranks, trainer.args.device))
        buffer = next(b for b in model.buffers() if b.is_floating_point())
        buffer.data = buffer.data.bfloat16()
        ask("buffer", lambda: prepared(trainer, plan, workload))
        buffer.data = buffer.data.float()
        if plan.engine is Engine.DEEPSPEED:
            slow_optimizer(model)
        return found

    def check_attention(
        trainer: AutotuneTrainer, plan: Plan, request: Request, micro_steps: int
    ) -> dict[str, Any]:
        found = attention(trainer, plan, request, micro_steps)
        for name, (other_plan, other_workload, _) in WRONG[strategy].items():
            workload = request.workload.model_copy(update=other_workload)
            asked = replace(plan, **other_plan), request.model_copy(update={"workload": workload})
            ask(name, lambda asked=asked: attention(trainer, *asked, micro_steps))
        return found

    checks.check_prepared = check_prepared  # type: ignore[assignment]
    checks.check_attention = check_attention
    return refused


def run_one(request_file: Path) -> None:
    folder = request_file.parent
    os.environ["AUTOTUNE_LAUNCH_DIR"] = str(folder)
    request = read_message(Request, request_file)
    # The weights stay where they are, so that every step's gradient can be compared with another's.
    trial._SETTINGS = TrainSettings(learning_rate=1e-30, lr_scheduler="constant")
    steps, refused = watch_steps(), watch_checks(request.plan_object().strategy)
    answer = Answer(request)
    trial.run_trial(request, answer)
    answer.finish()
    (folder / SEEN_FILE).write_text(json.dumps(steps | {"refused": refused}))


def main() -> None:
    import deepspeed  # noqa: F401  (once, before the children)

    for name in sys.argv[1:]:
        child = os.fork()
        if not child:
            try:
                run_one(Path(name))
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)  # whether it went well is read from what it wrote
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
