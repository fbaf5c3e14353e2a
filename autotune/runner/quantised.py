"""A frozen base in 4 bits (QLoRA) by bitsandbytes, on every rank alike, and the proof of it.

The quantised bits are stored in elements of the compute type, because FSDP2 shards floating-point
parameters alone and DeepSpeed casts whatever floats to the compute type, which must change nothing.
What turns the bits into weights (`QuantState`) is no parameter: it stays whole on every rank, so
every rank quantises every layer, rank 0 is no exception.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from autotune.errors import AutotuneError
from autotune.spec.workload import BaseStorage, Precision

_BITS = 4


def quantisation_config(storage: BaseStorage, precision: Precision) -> BitsAndBytesConfig:
    """Return what transformers and bitsandbytes are told.

    Raises:
        AutotuneError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise AutotuneError(
            f"A base in 4 bits needs bitsandbytes ({error}). Install it (pip install "
            "bitsandbytes), or use adapter: lora without load_in_4bit."
        ) from None
    compute = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=storage is BaseStorage.NF4_DOUBLE,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,
    )


def quantise_linears(
    model: PreTrainedModel, config: BitsAndBytesConfig, device: torch.device
) -> PreTrainedModel:
    """Quantise every linear layer but the output head, in place, one after another.

    For a model whose weights are there already; one that is loaded from files transformers
    quantises while it loads.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    model = replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=config,
    )
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            asked = {k: v for k, v in module.weight.__dict__.items() if k != "data"}
            full = weights.pop(name).detach()
            module.weight = Params4bit(full, requires_grad=False, **asked).to(device)
    model.is_loaded_in_4bit = True  # peft chooses its layers by it
    return model


def keep_one_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew for its CPU kernel at the first evaluation.

    It would do so in place on CPUs with AVX-512 bf16, and note it in the `QuantState`; FSDP2 and
    ZeRO-3 gather the weights from shards that are packed as before, so every later step would read
    them wrongly, without a word.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def count_quantised(model: nn.Module) -> int:
    """Return how many layers are really in 4 bits.

    Raises:
        AutotuneError: one calls itself so, but its weight has not the size of 4 bits an element.
    """
    from bitsandbytes.nn.modules import Linear4bit

    found = 0
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        bits = _elements(module.weight) * module.weight.element_size() * 8
        whole = module.in_features * module.out_features
        if module.quant_state is None or bits != _BITS * whole:
            raise AutotuneError(
                f"{name} is to be in {_BITS} bits, but holds {bits / whole:g} bits a weight."
            )
        found += 1
    return found


def _elements(weight: Any) -> int:
    """Return the elements of a weight over all its shards: of a DTensor, under ZeRO-3, or plain."""
    return int(getattr(weight, "ds_numel", weight.numel()))
