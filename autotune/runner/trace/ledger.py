"""`Ledger`: the bytes alive after every operator, by the phase that allocated them."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

_IN_PLACE_WHEN_REAL = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_add.default,
    torch.ops.aten.scatter_add.default,
}
"""Operators that autograd uses on a fake gradient, and their in-place forms on a real one."""
# What `_storage_Use_Count` says of a storage with one tensor while Python looks at it.
_ONE_TENSOR = 2


@dataclass(frozen=True, slots=True)
class Event:
    """Bytes alive after an operator that changed them."""

    phase: str
    live: int
    scaled: int
    """As `live`, each byte counted as often as `Ledger.copies` says of its birth phase."""
    gradient_elements: int
    """Of parameter gradients finished since the phase began."""
    operator: str


@dataclass(slots=True)
class _Held:
    reference: weakref.ref[Any]
    size: int
    copies: int


class Ledger(TorchDispatchMode):
    """Count storages from the operator that makes them until their last tensor is gone.

    Finished gradients of parameters leave the count: they are the engine's.
    """

    def __init__(self, copies: dict[str, int]) -> None:
        """Start empty.

        Args:
            copies: of the bytes born in a phase, how many the full model has of each; 1 where a
                phase is not named.
        """
        super().__init__()
        self._copies = copies
        self._held: dict[int, _Held] = {}
        self._live = self._scaled = 0
        self._gradient_elements = 0
        self.phase = ""
        self._next_phase = ""
        self.events: list[Event] = []
        self.ends: dict[str, Event] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave tensors out that live through the trace: parameters, buffers."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._held[storage._cdata] = _Held(weakref.ref(storage), 0, 1)

    def enter(self, phase: str) -> None:
        """End the phase under way and begin another."""
        if self.phase:
            self.ends[self.phase] = self._event("end")
        self.phase = phase
        self._gradient_elements = 0
        self.events.append(self._event("start"))

    def enter_with_next(self, phase: str) -> None:
        """Begin another phase with the next operator, when the caller's frames have let go."""
        self._next_phase = phase

    def finish(self) -> None:
        """End the last phase."""
        self.ends[self.phase] = self._event("end")

    def finish_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Move a parameter's gradient out of the count, and drop it."""
        assert parameter.grad is not None
        held = self._held.get(parameter.grad.untyped_storage()._cdata)
        if held is not None:
            self._add(held, -held.size)
            held.size = 0
        parameter.grad = None
        self._gradient_elements += parameter.numel()
        self.events.append(self._event("gradient"))

    def count_once(self, tensor: torch.Tensor) -> None:
        """Say that the full model has one of this storage, whatever phase it is born in."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        if held is not None:
            self._scaled -= held.size * (held.copies - 1)
            held.copies = 1

    def add(self, tensor: torch.Tensor, size: int | None = None) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        reference = weakref.ref(storage, partial(self._free, key))
        held = _Held(reference, 0, self._copies.get(self.phase, 1))
        self._held[key] = held
        held.size = storage.nbytes() if size is None else size
        self._add(held, held.size)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note what is alive after it."""
        if self._next_phase:
            self.enter(self._next_phase)
            self._next_phase = ""
        if args and is_traceable_wrapper_subclass(args[0]):
            # Made of other tensors (float8 data with its scale): its operators are those on them.
            with self:
                return args[0].__torch_dispatch__(func, types, args, kwargs or {})
        before = self._live
        in_place = func in _IN_PLACE_WHEN_REAL and _is_gradient_sum(args)
        output = _run(func, args, kwargs or {})
        if in_place:
            self._hand_over(args[0], output)
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        if self._live != before or not self.events or self.events[-1].live != self._live:
            self.events.append(self._event(str(func)))
        return output

    def _hand_over(self, old: torch.Tensor, new: torch.Tensor) -> None:
        held = self._held.get(old.untyped_storage()._cdata)
        if held is not None:
            size, held.size = held.size, 0
            self._add(held, -size)
            self.add(new, size)

    def _free(self, key: int, _: object) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._add(held, -held.size)

    def _add(self, held: _Held, size: int) -> None:
        self._live += size
        self._scaled += size * held.copies

    def _event(self, operator: str) -> Event:
        return Event(self.phase, self._live, self._scaled, self._gradient_elements, operator)

    def by_phase(self) -> dict[str, list[Event]]:
        """Return the events of each phase, in order."""
        found = defaultdict(list)
        for event in self.events:
            found[event.phase].append(event)
        return found


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator; grouped products in fp32 by way of bf16, for which alone a fake one exists.

    The real one takes fp32 (its CPU kernel is a loop over `mm`) and allocates the output alone.
    """
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
        return func(*args, **kwargs)
    halves = [
        a.to(torch.bfloat16) if torch.is_tensor(a) and a.is_floating_point() else a for a in args
    ]
    output = func(*halves, **kwargs)
    return torch.empty_strided(output.shape, output.stride(), dtype=args[0].dtype)


def _is_gradient_sum(args: tuple[Any, ...]) -> bool:
    """Say whether autograd itself adds to a gradient that nothing else holds.

    Gradients that meet: `InputBuffer::accumulate` of torch/csrc/autograd/input_buffer.cpp. What an
    index or a gather picked: `index_backward` and `gather_backward` of FunctionsManual.cpp. All
    work in place on tensors that are no subclass under no dispatch mode, so never under a trace. A
    function written in Python may add for itself.
    """
    if torch.is_grad_enabled() or not _called_by_engine():
        return False
    storage = args[0].untyped_storage()
    dense = storage.nbytes() == args[0].nbytes
    return dense and torch._C._storage_Use_Count(storage._cdata) == _ONE_TENSOR


def _called_by_engine() -> bool:
    """Say whether the operator comes from autograd's engine, not from a function in Python."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_name in ("inner", "_fn"):  # of torch.compiler
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
