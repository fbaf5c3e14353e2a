"""Experts that follow autocast, registered with transformers as an experts function."""

from __future__ import annotations

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

EXPERTS_NAME = "autotune_grouped_mm"


def register_experts() -> None:
    """Make ``experts_implementation="autotune_grouped_mm"`` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _experts)


def _experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run transformers' grouped matrix products, in the compute type under autocast as well.

    Autocast does not know `grouped_mm`: DDP would compute its experts in fp32, and they alone.

    Args:
        module: holds the stacked weights of all experts.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, experts_per_token]``, the experts of each token.
        top_k_weights: like `top_k_index`, what their outputs are multiplied with.

    Returns:
        ``[tokens, hidden]``.
    """
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(device)
    cast = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    inputs = (hidden_states.to(dtype), top_k_index, top_k_weights)
    with torch.autocast(device, enabled=False):  # so the module calls this function's other path
        return torch.func.functional_call(module, cast, inputs)  # type: ignore[no-any-return]
