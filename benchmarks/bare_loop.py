"""One rank of the bare loop `overhead.py` compares the runner with; started by it, not by hand.

    python benchmarks/bare_loop.py REQUEST.json

A training loop as one would write it on the engine itself: no Trainer, no accelerate, no
callbacks, no checks, batches made before the clock starts. What must be alike comes from the
runner: model, sequences, attention function, loss, numerics, and the ladder's segments
(accumulation 1, then more). Writes rank-N.bare.json: for each accumulation the seconds of every
counted step, the tokens that had a label, and the loss.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from autotune.emit.deepspeed import deepspeed_config
from autotune.plan import Engine
from autotune.runner.answer import Answer, die_with_parent
from autotune.runner.ladder import segments_of
from autotune.runner.loss import IGNORED_LABEL, token_weighted_loss
from autotune.runner.models import build_model
from autotune.runner.session import Session, open_session
from autotune.runner.ulysses import CONTEXT, document_mask
from autotune.spec.model import model_from_config
from autotune.trial.protocol import Request, read_message

Batch = dict[str, torch.Tensor]
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
Step = Callable[[list[Batch]], torch.Tensor]
"""Runs one optimizer step over its micro-batches and returns this rank's loss."""


def main() -> None:
    die_with_parent()
    request = read_message(Request, Path(sys.argv[1]))
    session = open_session(request, Answer(request))
    make = deepspeed_step if session.plan.engine is Engine.DEEPSPEED else fsdp2_step
    found = list(measure(session, make(session)))
    name = f"rank-{session.answer.rank}.bare.json"
    (Path(os.environ["AUTOTUNE_LAUNCH_DIR"]) / name).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # as the runner's ranks do: DeepSpeed sometimes aborts in its destructors


def measure(session: Session, prepare: Callable[[int, int], Step]) -> Iterator[dict[str, Any]]:
    """Run the segments a trial of the request would run."""
    request = session.request
    warmup, counted = request.measurement.warmup_steps, request.measurement.max_steps
    loader = session.train_loader()
    for segment in segments_of(request.rungs, request.measurement):
        accumulation = segment.grad_accum_steps
        loader.reconfigure(segment.micro_batch_size, accumulation)
        batches = list(itertools.islice(loader, (warmup + counted) * accumulation))
        step = prepare(segment.micro_batch_size, accumulation)
        seconds, tokens, losses = [], [], []
        for index in range(warmup + counted):
            own = batches[index * accumulation : (index + 1) * accumulation]
            start = time.perf_counter()
            loss = step(own)
            if index >= warmup:
                seconds.append(time.perf_counter() - start)
                tokens.append(sum(int((b["shift_labels"] != IGNORED_LABEL).sum()) for b in own))
                losses.append(float(loss))
        yield {
            "grad_accum_steps": accumulation,
            "step_s": seconds,
            "tokens": tokens,
            "losses": losses,
        }


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
