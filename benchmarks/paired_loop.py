"""One rank of `overhead.py`: the runner's steps and a bare loop's, in turn; not started by hand.

    python benchmarks/paired_loop.py REQUEST.json

The runner climbs its ladder as in a trial. After each of its optimizer steps the same sequences go
through a training loop as one would write it on the engine itself, on a second model in the same
process: no Trainer, no accelerate, no callbacks, no checks, batches made before the clock starts.
What must be alike comes from the runner: model, sequences, attention function, loss, numerics. Both
clocks start behind a barrier. Writes rank-N.pairs.json: a `Pair` for every step, warm-up included.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from autotune.emit.deepspeed import deepspeed_config
from autotune.plan import Engine
from autotune.runner.answer import Answer, die_with_parent
from autotune.runner.ladder import Ladder, Segment
from autotune.runner.loss import IGNORED_LABEL, token_weighted_loss
from autotune.runner.models import build_model
from autotune.runner.session import Session, open_session
from autotune.runner.timers import StepTimer, StepTimes
from autotune.runner.trial import ladder_trainer, make_ladder
from autotune.runner.ulysses import CONTEXT, document_mask
from autotune.spec.model import model_from_config
from autotune.trial.protocol import Request, read_message

Batch = dict[str, torch.Tensor]
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
Step = Callable[[list[Batch]], torch.Tensor]
"""Runs one optimizer step over its micro-batches and returns this rank's loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One optimizer step of the runner and the bare loop's step on the same sequences."""

    grad_accum_steps: int
    runner_s: float
    bare_s: float
    runner_tokens: int
    """Tokens with a label over all ranks."""
    bare_tokens: int


class PairedTimer(StepTimer):
    """A step timer that runs and times a bare step whenever a step of the runner has ended."""

    def __init__(self, session: Session, prepare: Callable[[int, int], Step]) -> None:
        super().__init__(session.gauge)
        self.ladder: Ladder | None = None
        self.pairs: list[Pair] = []
        self._prepare = prepare
        self._loader = session.train_loader()
        self._segment: Segment | None = None
        self._batches = iter(self._loader)
        self._step: Step | None = None

    def begin(self) -> None:
        """Start the runner's clock when all ranks are here."""
        dist.barrier()
        super().begin()

    def end_step(self) -> StepTimes:
        """Return the runner's step, after the bare step on its sequences."""
        times = super().end_step()
        assert self.ladder is not None and self.ladder.trainer is not None
        segment = self.ladder.current
        if segment is not self._segment:
            self._segment = segment
            self._loader.reconfigure(segment.micro_batch_size, segment.grad_accum_steps)
            self._batches = iter(self._loader)
            self._step = self._prepare(segment.micro_batch_size, segment.grad_accum_steps)
        own = list(itertools.islice(self._batches, segment.grad_accum_steps))
        assert self._step is not None
        attention_calls = CONTEXT.calls  # the runner's checks count them
        dist.barrier()
        start = time.perf_counter()
        self._step(own)
        taken = time.perf_counter() - start
        CONTEXT.calls = attention_calls
        self.pairs.append(
            Pair(
                grad_accum_steps=segment.grad_accum_steps,
                runner_s=times.whole,
                bare_s=taken,
                runner_tokens=self.ladder.trainer.step_tokens,
                bare_tokens=int(count_tokens(own)),
            )
        )
        self.begin()
        return times


def main() -> None:
    die_with_parent()
    request = read_message(Request, Path(sys.argv[1]))
    answer = Answer(request)
    session = open_session(request, answer)
    make = deepspeed_step if session.plan.engine is Engine.DEEPSPEED else fsdp2_step
    timer = PairedTimer(session, make(session))
    timer.ladder = make_ladder(session, timer)
    ladder_trainer(session, timer.ladder).train()
    out = Path(os.environ["AUTOTUNE_LAUNCH_DIR"]) / f"rank-{answer.rank}.pairs.json"
    out.write_text(json.dumps([asdict(pair) for pair in timer.pairs]))
    dist.barrier()
    os._exit(0)  # as the runner's ranks do: DeepSpeed sometimes aborts in its destructors


def deepspeed_step(session: Session) -> Callable[[int, int], Step]:
    import deepspeed

    request, plan = session.request, session.plan
    model_spec = model_from_config(request.model.name, request.model.config)
    model = build_model(request, plan)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0),
        config=deepspeed_config(
            plan, model_spec, request.workload, device="cpu", max_grad_norm=MAX_GRAD_NORM
        ),
    )

    def prepare(micro_batch_size: int, accumulation: int) -> Step:
        engine.set_train_micro_batch_size(micro_batch_size)
        engine.set_train_batch_size(micro_batch_size * accumulation * plan.world_size)

        def step(batches: list[Batch]) -> torch.Tensor:
            total, step_tokens = torch.zeros(()), count_tokens(batches)
            for number, batch in enumerate(batches, start=1):
                loss = loss_of(engine, batch, step_tokens, session)
                engine.set_gradient_accumulation_boundary(is_boundary=number == accumulation)
                engine.backward(loss, scale_wrt_gas=False)
                total += loss.detach()
            engine.step()
            return total

        return step

    return prepare


def fsdp2_step(session: Session) -> Callable[[int, int], Step]:
    request, plan = session.request, session.plan
    model = build_model(request, plan)
    for parameter in model.parameters():  # rank 0 alone has drawn them
        dist.broadcast(parameter.data, src=0)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    mesh = dist.init_device_mesh("cpu", (plan.world_size,))
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def prepare(micro_batch_size: int, accumulation: int) -> Step:
        def step(batches: list[Batch]) -> torch.Tensor:
            total, step_tokens = torch.zeros(()), count_tokens(batches)
            for number, batch in enumerate(batches, start=1):
                model.set_requires_gradient_sync(number == accumulation)
                # Under this policy the head gets fp32 activations and a bf16 weight: autocast joins
                # them, as it does in the runner through accelerate.
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(model, batch, step_tokens, session)
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step

    return prepare


def count_tokens(batches: list[Batch]) -> torch.Tensor:
    valid = sum(int((batch["shift_labels"] != IGNORED_LABEL).sum()) for batch in batches)
    tokens = torch.tensor(valid)
    dist.all_reduce(tokens)
    return tokens


def loss_of(model: Any, batch: Batch, step_tokens: torch.Tensor, session: Session) -> torch.Tensor:
    packed = session.request.workload.packing
    CONTEXT.mask = document_mask(batch["full_document_ids"]) if packed else None
    outputs = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    )
    world_size = session.plan.world_size
    return token_weighted_loss(outputs.logits, batch["shift_labels"], step_tokens, world_size)


if __name__ == "__main__":
    main()
