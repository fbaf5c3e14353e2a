"""What autograd keeps of a step, in host memory until backward asks for it (CUDA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALLEST_BYTES = 1 << 20
"""Smaller tensors are not worth a transfer: their copies would only queue before large ones."""


@contextmanager
def offload_activations() -> Iterator[None]:
    """Keep large saved tensors in pinned host memory, as `torch.autograd.graph.save_on_cpu` does.

    That one would send parameters as well, which autograd saves for every matrix product: they are
    on the device anyway, so it would take time and host memory and free nothing.
    """
    sent = _Sent()
    with torch.autograd.graph.saved_tensors_hooks(sent.pack, sent.unpack):
        yield


class _Sent:
    """Saved tensors on their way to the host and back."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_cuda or size < SMALLEST_BYTES or _is_parameter(tensor):
            return tensor.device, tensor
        self.bytes += size
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def unpack(self, packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Say whether a saved tensor is a parameter, or a view of one."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, torch.nn.Parameter)
