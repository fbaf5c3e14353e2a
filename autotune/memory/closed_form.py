"""An `ActivationProfile` from the inventory of `layers`: for machines without the training stack.

It knows the families of `autotune.spec.model.families` and how this project trains them. It leaves
out small temporaries and takes all layers for one kind: their saved bytes on average, the work of
the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autotune.errors import AutotuneError
from autotune.memory.activations import Activations, count_activations
from autotune.memory.polynomials import as_polynomial, fit, points
from autotune.memory.profile import (
    ZERO,
    ActivationProfile,
    Array,
    Instant,
    LayerKind,
    Phase,
    features,
)
from autotune.memory.setup import Attention, Checkpointing, Loss, Regime, TraceKey
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload

_ENGINES = {
    Regime.COMPUTE: Engine.DEEPSPEED,
    Regime.FSDP: Engine.FSDP2,
    Regime.AUTOCAST: Engine.DDP,
    Regime.FP32: Engine.DDP,
}
_WHOLE = features(0, 0, 1)
"""Of a number of bytes that no size changes."""


def closed_form_profile(model: ModelSpec, key: TraceKey) -> ActivationProfile:
    """Compose a profile from the counted tensors.

    Raises:
        AutotuneError: the key is of another tool's run, which only a trace knows.
    """
    if key.attention is Attention.EAGER or key.loss is not Loss.PLAIN or key.fused_kernels:
        raise AutotuneError(
            f"The memory of {key.attention} attention with the {key.loss} loss has to be traced "
            "from the model's code: install autotune-llm[train]."
        )
    if key.float8 is not None:
        raise AutotuneError(
            "The memory of projections in fp8 has to be traced from the model's and torchao's "
            "code: install autotune-llm[train,gpu], or leave fp8 out."
        )
    return _ClosedForm(model, key).profile()


@dataclass(frozen=True, slots=True)
class _ClosedForm:
    model: ModelSpec
    key: TraceKey

    def profile(self) -> ActivationProfile:
        model, key = self.model, self.key
        counted = {name: self._fit(name) for name in Activations.__dataclass_fields__}
        recomputed = key.checkpointing is not Checkpointing.NONE
        trained = key.adapter is None
        saved = counted["layers"] / model.num_layers
        kept = counted["checkpoint"] if recomputed else saved
        casts = self._casts() * _WHOLE
        layer_elements, added = self._layer_elements()
        head_elements = model.num_embedding_parameters if trained else 0
        tied = model.tied_embeddings and trained
        width = 4 if key.regime in (Regime.FP32, Regime.AUTOCAST) else 2
        waiting = width * head_elements * tied * _WHOLE
        logits, loss = self._logits()
        left = counted["mask"]
        # Layers drop their casts with autocast's cache unless backward needs them.
        dropped = casts * model.num_layers * recomputed
        head_cast = 2 * model.num_embedding_parameters * (key.regime is Regime.AUTOCAST) * _WHOLE
        saved_head = counted["head"] + head_cast
        forward = Phase(end=_plain(kept + casts), peaks=(_instant(saved + casts, "layer"),))
        again = (counted["layer"] + casts) * recomputed
        gradients = 2 * layer_elements * (key.regime is Regime.AUTOCAST) * _WHOLE
        work = again + counted["layer_gradients"] + gradients
        return ActivationProfile(
            source="closed form",
            embedding_forward=Phase(end=_plain(left), peaks=(_instant(left, "mask"),)),
            kinds=(
                LayerKind(
                    forward=forward,
                    backward=Phase(
                        end=_plain(-kept - casts * (not recomputed)),
                        peaks=(_instant(work, "layer gradients", layer_elements),),
                        gradient_elements=layer_elements,
                    ),
                    parameter_elements=added
                    + (model.num_parameters - model.num_root_parameters) // model.num_layers,
                    trainable_elements=layer_elements,
                ),
            ),
            layers=(0,) * model.num_layers,
            head_forward=Phase(
                end=_plain(saved_head + logits[1] - dropped),
                peaks=(_instant(saved_head + logits[0], "logits"),),
            ),
            loss_forward=Phase(end=_plain(loss[1]), peaks=(_instant(loss[0], "loss"),)),
            loss_backward=Phase(end=_plain(loss[3]), peaks=(_instant(loss[2], "loss gradient"),)),
            head_backward=Phase(
                end=_plain(waiting - saved_head - logits[1] - loss[1] - loss[3]),
                peaks=(_instant(self._head_work(waiting), "head gradient"),),
                gradient_elements=0 if tied else head_elements,
            ),
            embedding_backward=Phase(
                end=_plain(-waiting),
                peaks=(_instant(width * head_elements * _WHOLE, "embedding gradient"),),
                gradient_elements=head_elements,
            ),
            evaluation=Phase(
                end=_plain(left),
                peaks=(_instant(left + logits[0] + loss[0] + dropped + casts, "loss"),),
            ),
        )

    def _fit(self, name: str) -> Array:
        """Turn a count of `Activations` into a polynomial, within the key's regime."""
        cp = self.key.gathered[0] or (2 if self.key.exchanged else 1)
        window = self.model.sliding_window or 4096
        start, step = (window // cp + 64, 64) if self.key.windowed else (8, 8)
        if not self.key.windowed and window < 8 * 4 * cp:
            start = step = max(2, window // (4 * cp))
        sizes = points(start, step, (1, 2, 3), squares=True)
        values = [[getattr(self._count(b, s * cp, cp), name)] for b, s in sizes]
        row: Array = fit(sizes, np.array(values, float), cp)[0]
        return row

    def _count(self, batch: int, seq_len: int, cp: int) -> Activations:
        key = self.key
        precision = Precision.FP32 if key.regime is Regime.FP32 else Precision.BF16
        workload = Workload(
            seq_len=seq_len,
            precision=precision,
            # A kernel that knows lengths has no mask.
            packing=key.packed and key.attention is not Attention.FLASH,
            adapter=key.adapter,
        )
        plan = Plan(
            strategy="",
            engine=_ENGINES[key.regime],
            micro_batch_size=batch,
            cp=cp,
            cp_backend=(CpBackend.RING if key.attention is Attention.RING else CpBackend.ULYSSES),
            heads_k_stride=key.gathered[1] or 1,
            recompute=Recompute.FULL,
        )
        return count_activations(self.model, workload, plan)

    def _layer_elements(self) -> tuple[int, int]:
        """Return the trained parameters of a layer on average, and those an adapter adds."""
        model, adapter = self.model, self.key.adapter
        if adapter is None:
            return (model.num_parameters - model.num_root_parameters) // model.num_layers, 0
        added = model.num_adapter_parameters(adapter) // model.num_layers
        return added, added

    def _casts(self) -> int:
        """Bytes of a layer's weights in the compute type, which autocast makes."""
        if self.key.regime is not Regime.AUTOCAST:
            return 0
        return 2 * self.model.num_layer_matmul_parameters // self.model.num_layers

    def _logits(self) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        """Return (peak, end) of the logits and (peak, end) of the loss, forward and backward.

        bf16 logits are cast by the loss; FSDP2 and autocast hand them on in fp32. Log-softmax saves
        its fp32 output; its backward holds the gradient above it and makes the one below.
        """
        entry = np.zeros(len(_WHOLE))
        entry[3] = self.model.vocab_size
        match self.key.regime:
            case Regime.COMPUTE:
                return (2 * entry, 2 * entry), (8 * entry, 2 * entry, 8 * entry, -2 * entry)
            case Regime.FP32:
                return (4 * entry, 4 * entry), (4 * entry, 0 * entry, 8 * entry, 0 * entry)
            case _:
                return (6 * entry, 4 * entry), (4 * entry, 0 * entry, 8 * entry, 0 * entry)

    def _head_work(self, waiting: Array) -> Array:
        compute = 4 if self.key.regime is Regime.FP32 else 2
        trained = self.key.adapter is None
        gradient = compute * self.model.num_embedding_parameters * trained * _WHOLE
        hidden = np.zeros(len(_WHOLE))
        hidden[3] = compute * self.model.hidden_size
        work: Array = gradient + waiting * (self.key.regime is Regime.AUTOCAST) + hidden
        return work


def _plain(row: Array) -> tuple[float, ...]:
    return as_polynomial(row) if np.any(row) else ZERO


def _instant(row: Array, operator: str, gradient_elements: int = 0) -> Instant:
    return Instant(_plain(row), gradient_elements, operator)
