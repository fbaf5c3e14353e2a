"""The real model's forward and backward at two depths, in every type the engines run it in."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from autotune.calibrate.spec import SweepAnswer, SweepSpec, SweptModel
from autotune.memory.layers import Regime
from autotune.plan import Engine, Plan
from autotune.runner.loss import token_weighted_loss
from autotune.runner.models import build_model
from autotune.runner.sweep_clock import SweepClock, start_group
from autotune.runner.ulysses import CONTEXT, document_mask
from autotune.spec.workload import Precision, Workload
from autotune.timing.calibration import ModelTimes, PassPoint
from autotune.trial.protocol import ModelSource, Request

_LEAST, _MOST = 2, 6
_POINT_S = 0.6
"""About how long one point is measured."""


def measure_passes(spec: SweepSpec, answer: SweepAnswer) -> None:
    """Measure each type at each depth and size."""
    assert spec.model is not None
    clock = SweepClock(start_group(spec.device), spec.item_s)
    for precision in spec.precisions:
        for regime in _regimes(precision):
            points = []
            for depth in spec.model.depths:
                model = model_at_depth(spec, spec.model, depth, precision)
                if regime is Regime.COMPUTE:
                    model.to(torch.bfloat16)
                model.to(clock.device).train()
                points += [
                    _point(spec, model, regime, depth, batch, seq_len, clock)
                    for batch, seq_len in spec.sizes
                ]
                del model
            answer.models.append(
                ModelTimes(
                    model=spec.model.key, regime=regime, packing=spec.packing, points=tuple(points)
                )
            )


def model_at_depth(
    spec: SweepSpec, swept: SweptModel, depth: int, precision: Precision
) -> PreTrainedModel:
    """Build the model cut to some layers, with random weights."""
    request = Request(
        launch_id="sweep",
        mode="trial",
        model=ModelSource(name=swept.name, config=config_at_depth(swept.config, depth)),
        plan=Plan(strategy="ddp", engine=Engine.DDP).to_dict(),
        workload=Workload(precision=precision),
        device=spec.device,
        out_dir=spec.folder,
    )
    return build_model(request, request.plan_object())


def config_at_depth(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """Cut a config to some layers, its list of layer kinds with it."""
    cut = config | {"num_hidden_layers": depth}
    if isinstance(config.get("layer_types"), list):
        cut["layer_types"] = config["layer_types"][:depth]
    return cut


def _regimes(precision: Precision) -> tuple[Regime, ...]:
    if precision is Precision.FP32:
        return (Regime.FP32,)
    return (Regime.COMPUTE, Regime.AUTOCAST)


def _point(
    spec: SweepSpec,
    model: PreTrainedModel,
    regime: Regime,
    depth: int,
    batch: int,
    seq_len: int,
    clock: SweepClock,
) -> PassPoint:
    inputs = _batch(spec, model.config.vocab_size, batch, seq_len, clock.device)
    forward, backward = _passes(model, regime, inputs, clock)
    recompute = None
    assert spec.model is not None
    if depth == max(spec.model.depths) and (batch, seq_len) in (spec.sizes[0], spec.sizes[-1]):
        # Non-reentrant, as every engine but ZeRO-3 runs it.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, recompute = _passes(model, regime, inputs, clock)
        model.gradient_checkpointing_disable()
    return PassPoint(
        layers=depth,
        micro_batch_size=batch,
        seq_len=seq_len,
        forward_s=forward,
        backward_s=backward,
        recompute_backward_s=recompute,
    )


def _batch(
    spec: SweepSpec, vocab_size: int, batch: int, seq_len: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random tokens; where sequences are packed, documents of a quarter of the sequence each."""
    ids = torch.randint(vocab_size, (batch, seq_len), device=device)
    length = max(2, seq_len // 4) if spec.packing else seq_len
    place = torch.arange(seq_len, device=device).expand(batch, -1)
    return {
        "input_ids": ids,
        "position_ids": place % length,
        "document_ids": place // length,
        "labels": ids.roll(-1, 1),
    }


def _passes(
    model: PreTrainedModel, regime: Regime, inputs: dict[str, torch.Tensor], clock: SweepClock
) -> tuple[float, float]:
    """Return the seconds of forward with the loss and of backward: medians, slowest rank."""
    first = _once(model, regime, inputs, clock)
    count = max(_LEAST, min(_MOST, int(_POINT_S / _slowest([sum(first)], clock)[0])))
    times = [_once(model, regime, inputs, clock) for _ in range(count)]
    medians = [statistics.median(each) for each in zip(*times, strict=True)]
    forward, backward = _slowest(medians, clock)
    return forward, backward


def _slowest(seconds: list[float], clock: SweepClock) -> list[float]:
    found = torch.tensor(seconds, device=clock.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    values: list[float] = found.tolist()
    return values


def _once(
    model: PreTrainedModel, regime: Regime, inputs: dict[str, torch.Tensor], clock: SweepClock
) -> tuple[float, float]:
    cast: Any = contextlib.nullcontext()
    if regime is Regime.AUTOCAST:
        cast = torch.autocast(clock.device.type, torch.bfloat16)
    if dist.get_world_size() > 1:
        dist.barrier()
    clock.wait()
    start = time.perf_counter()
    CONTEXT.mask = None
    if int(inputs["document_ids"].max()) > 0:
        CONTEXT.mask = document_mask(inputs["document_ids"])
    with cast:
        logits = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).logits
    tokens = torch.tensor(inputs["labels"].numel(), device=clock.device)
    loss = token_weighted_loss(logits, inputs["labels"], tokens, 1)
    clock.wait()
    middle = time.perf_counter()
    loss.backward()
    clock.wait()
    end = time.perf_counter()
    model.zero_grad(set_to_none=True)
    return middle - start, end - middle
