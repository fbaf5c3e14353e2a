"""Rates of the device and of its links: products, streams, AdamW, collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from autotune.calibrate.spec import SweepAnswer, SweepSpec
from autotune.runner.sweep_clock import SweepClock, start_group
from autotune.spec.workload import Precision
from autotune.timing.calibration import (
    Collective,
    CollectiveCurve,
    MatmulPoint,
    OptimizerTimes,
)
from autotune.units import MIB

_ROWS = {"cpu": (128, 512, 2048), "cuda": (128, 1024, 4096, 16384)}
_SHAPES = {
    "cpu": ((256, 256), (256, 1024), (1024, 1024)),
    "cuda": ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)),
}
_STREAM_BYTES = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
_SIZES = {
    "cpu": tuple(4 * 4**power for power in range(5, 12)),
    "cuda": tuple(4 * 4**power for power in range(4, 14)),
}
"""Bytes of the whole data of a collective: 4 KiB to 16 MiB, on CUDA to 256 MiB."""
_ADAMW = ((1, 2**18), (1, 2**21), (32, 2**18), (128, 2**18))
"""Tensors, and the elements of all of them."""
_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def measure_rates(spec: SweepSpec, answer: SweepAnswer) -> None:
    """Measure everything that needs no model."""
    device = start_group(spec.device)
    clock = SweepClock(device, spec.item_s)
    with torch.no_grad():
        answer.matmuls = _matmuls(spec, clock)
        _streams(spec, clock, answer)
        answer.optimizer = _optimizer(clock)
        if spec.num_ranks > 1:
            answer.collectives = _collectives(spec, clock)


def _matmuls(spec: SweepSpec, clock: SweepClock) -> list[MatmulPoint]:
    found = []
    shapes = dict.fromkeys([*_SHAPES[spec.device], *spec.shapes])
    for precision in spec.precisions:
        for inputs, outputs in shapes:
            weights = torch.randn(outputs, inputs, device=clock.device, dtype=_DTYPES[precision])
            for rows in _ROWS[spec.device]:
                x = torch.randn(rows, inputs, device=clock.device, dtype=_DTYPES[precision])
                seconds = clock.seconds(lambda x=x, w=weights: x @ w.T)  # type: ignore[misc]
                found.append(
                    MatmulPoint(
                        precision=precision,
                        rows=rows,
                        inputs=inputs,
                        outputs=outputs,
                        seconds=seconds,
                    )
                )
    return found


def _streams(spec: SweepSpec, clock: SweepClock, answer: SweepAnswer) -> None:
    size = _STREAM_BYTES[spec.device]
    a, b, c = (torch.ones(size // 4, device=clock.device) for _ in range(3))
    answer.copy_bytes_per_s = 2 * size / clock.seconds(lambda: a.copy_(b))
    answer.elementwise_bytes_per_s = 3 * size / clock.seconds(lambda: torch.add(a, b, out=c))
    if spec.device == "cuda":
        host = torch.ones(size // 4, pin_memory=True)
        answer.to_host_bytes_per_s = size / clock.seconds(lambda: host.copy_(a))
        answer.from_host_bytes_per_s = size / clock.seconds(lambda: a.copy_(host))
        x, y, z = (torch.ones(size // 16) for _ in range(3))
        answer.host_bytes_per_s = 3 * size / 4 / clock.seconds(lambda: torch.add(x, y, out=z))


def _optimizer(clock: SweepClock) -> list[OptimizerTimes]:
    found = []
    for tensors, elements in _ADAMW:
        parameters = [
            torch.nn.Parameter(torch.randn(elements // tensors, device=clock.device))
            for _ in range(tensors)
        ]
        gradients = [torch.randn_like(p) for p in parameters]
        adamw = torch.optim.AdamW(parameters, fused=clock.device.type == "cuda")

        def step(
            parameters: list[torch.nn.Parameter] = parameters,
            gradients: list[torch.Tensor] = gradients,
            adamw: torch.optim.Optimizer = adamw,
        ) -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1e9)
            adamw.step()
            adamw.zero_grad()

        found.append(
            OptimizerTimes(tensors=tensors, elements=elements, seconds=clock.seconds(step))
        )
    return found


def _collectives(spec: SweepSpec, clock: SweepClock) -> list[CollectiveCurve]:
    curves = []
    for ranks, stride in _groups(spec.num_ranks):
        group = _own_group(spec.num_ranks, ranks, stride)
        for kind in Collective:
            times = []
            for size in _SIZES[spec.device]:
                work = _operation(kind, size // 4, ranks, stride, group, clock.device)
                times.append(clock.seconds(work))
            curves.append(
                CollectiveCurve(
                    kind=kind,
                    ranks=ranks,
                    stride=stride,
                    num_bytes=tuple(float(size) for size in _SIZES[spec.device]),
                    times_s=tuple(times),
                )
            )
    return curves


def _groups(world: int) -> list[tuple[int, int]]:
    """Return (ranks, stride): all ranks, and the halves a sequence or a copy is spread over."""
    found = [(world, 1)]
    if world % 2 == 0 and world > 2:
        found += [(2, 1), (2, world // 2)]
        if world > 4:
            found.append((world // 2, 1))
    return found


def _own_group(world: int, ranks: int, stride: int) -> dist.ProcessGroup | None:
    if ranks == world:
        return None
    own = None
    seen: set[int] = set()
    for first in range(world):
        members = tuple(first + stride * n for n in range(ranks))
        if first in seen or members[-1] >= world:
            continue
        seen.update(members)
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            own = group
    return own


def _operation(
    kind: Collective,
    elements: int,
    ranks: int,
    stride: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Callable[[], object]:
    """Return the operation the engines run, on so many fp32 elements of the whole data."""
    elements -= elements % ranks
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // ranks, device=device)
    match kind:
        case Collective.ALL_REDUCE:
            return lambda: dist.all_reduce(whole, group=group)
        case Collective.ALL_GATHER:
            return lambda: dist.all_gather_into_tensor(whole, part, group=group)
        case Collective.REDUCE_SCATTER:
            return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
        case Collective.ALL_TO_ALL:
            other = torch.empty_like(whole)
            return lambda: dist.all_to_all_single(other, whole, group=group)
        case Collective.POINT_TO_POINT:
            return lambda: _pass_on(whole, ranks, stride, group)


def _pass_on(whole: torch.Tensor, ranks: int, stride: int, group: dist.ProcessGroup | None) -> None:
    """Send to the next rank of the group and receive from the one before."""
    place = dist.get_rank(group)
    rank = dist.get_rank()
    following = rank + stride * ((place + 1) % ranks - place)
    before = rank + stride * ((place - 1) % ranks - place)
    received = torch.empty_like(whole)
    operations = [
        dist.P2POp(dist.isend, whole, following, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
