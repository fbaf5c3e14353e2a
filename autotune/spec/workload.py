"""`Workload`: what every compared configuration must do alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

OptimizerName = Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"]


class Precision(StrEnum):
    """The numerics contract of a run.

    ``BF16``: fp32 master weights, bf16 compute, fp32 gradient reduction and accumulation, fp32
    loss, on every engine. ``FP32``: everything in fp32.
    """

    BF16 = "bf16"
    FP32 = "fp32"


class BaseStorage(StrEnum):
    """How a frozen base stores the projections of its layers (QLoRA, arXiv:2305.14314)."""

    NF4 = "nf4"
    """4 bits an element and an fp32 scale for every 64 elements."""
    NF4_DOUBLE = "nf4_double"
    """The scales themselves in 8 bits."""


class LigerKernel(StrEnum):
    """A kernel of liger-kernel, by the name of Axolotl's key without its prefix."""

    ROPE = "rope"
    RMS_NORM = "rms_norm"
    GLU_ACTIVATION = "glu_activation"
    FUSED_LINEAR_CROSS_ENTROPY = "fused_linear_cross_entropy"


class _KeepsOldForm(BaseModel):
    """Leaves the fields named in `_LATER` out of what is written while they are at their defaults.

    So what an older version wrote (checkpoints, studies, digests) equals what this one writes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    _LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _in_old_form(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name in self._LATER:
            if getattr(self, name) == type(self).model_fields[name].default:
                values.pop(name, None)
        return values


class Lora(_KeepsOldForm):
    """A low-rank adapter on a frozen base model."""

    _LATER: ClassVar[tuple[str, ...]] = ("rslora", "dora", "base_storage")

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    rslora: bool = False
    """Scale the product by ``alpha / sqrt(r)`` instead of ``alpha / r`` (arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of every output's weights besides their direction (arXiv:2402.09353)."""
    base_storage: BaseStorage | None = None
    """Quantised storage of the frozen base, in elements of the compute type so that engines can
    shard it; None keeps it as it is."""


class Workload(_KeepsOldForm):
    """The contract under which configurations are compared."""

    _LATER: ClassVar[tuple[str, ...]] = (
        "liger", "chunked_loss", "activation_offloading", "fp8", "fp8_all_gather",
    )  # fmt: skip

    seq_len: int = Field(default=2048, ge=2)
    """Tokens per sequence (packed sequences are exactly this long)."""
    global_batch_size: int = Field(default=64, ge=1)
    """Sequences per optimizer step, held exactly; accumulation follows from it."""
    optimizer: OptimizerName = "adamw"
    precision: Precision = Precision.BF16
    packing: bool = True
    """Several documents in one sequence, attention kept inside each document."""
    mean_document_tokens: int | None = Field(default=None, ge=2)
    """Mean length of the synthetic documents of a trial without user data; None = ``seq_len / 4``.

    Lengths are drawn from a geometric distribution of this mean, cut at ``seq_len``.
    """
    adapter: Lora | None = None
    liger: tuple[LigerKernel, ...] = ()
    """Kernels of liger-kernel to run in the place of the model's own code."""
    chunked_loss: bool = False
    """Compute the cross-entropy over slices of the tokens and compute it again in backward."""
    activation_offloading: bool = False
    """Keep what recomputation keeps, the layers' inputs, in host memory until backward."""
    fp8: bool = False
    """Multiply the layers' projections in 8-bit floats, one scale a tensor taken anew each time.

    Weights, gradients and everything between two projections stay as `precision` says.
    """
    fp8_all_gather: bool = False
    """FSDP2 alone: cast the projections' weights before they are gathered, not after."""

    @property
    def synthetic_document_tokens(self) -> int:
        """`mean_document_tokens`, or what stands for it where it is None."""
        return max(2, self.mean_document_tokens or self.seq_len // 4)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, padding and masked ones included."""
        return self.seq_len * self.global_batch_size
