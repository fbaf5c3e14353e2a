"""FLOPs: the useful ones that MFU counts, and those a kernel computes."""

from __future__ import annotations

from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


def causal_attention_flops_per_token(model: ModelSpec, workload: Workload) -> float:
    """Useful forward FLOPs of scores and values, all layers: what causality and windows leave."""
    length = workload.seq_len
    windowed = model.num_window_layers_at(length)
    seen = (model.num_layers - windowed) * length / 2
    if windowed and (window := model.sliding_window):
        # The first tokens of a sequence have fewer before them than the window holds.
        seen += windowed * window * (1 - window / (2 * length))
    return 4 * model.query_size * seen


def attention_flops_per_token(
    model: ModelSpec, workload: Workload, *, documents_masked: bool = True
) -> tuple[float, float]:
    """Return the forward kernels' FLOPs: of causal ones, of masked ones; all layers.

    A masked kernel computes what the mask hides. Where documents are told apart by their lengths
    instead (`documents_masked` false), they are taken for one as long as the sequence, which is the
    most there can be.
    """
    per_layer = 4 * workload.seq_len * model.query_size
    windowed = model.num_window_layers_at(workload.seq_len)
    masked = model.num_layers if workload.packing and documents_masked else windowed
    return (model.num_layers - masked) * per_layer / 2, masked * per_layer


def model_flops_per_token(model: ModelSpec, workload: Workload) -> float:
    """Useful FLOPs: forward 2 a weight, backward as much again for inputs and for weights.

    LoRA's backward has no weight gradients of the frozen base.
    """
    attention = causal_attention_flops_per_token(model, workload)
    passes = 3 if workload.adapter is None else 2
    flops = passes * 2 * model.num_matmul_parameters + 3 * attention
    if workload.adapter is not None:
        flops += 3 * 2 * model.num_adapter_parameters(workload.adapter)
    return flops
