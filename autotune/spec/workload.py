"""`Workload`: what every compared configuration must do alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Precision(StrEnum):
    """The numerics contract of a run.

    ``BF16``: fp32 master weights, bf16 compute, fp32 gradient reduction and accumulation, fp32
    loss, on every engine. ``FP32``: everything in fp32.
    """

    BF16 = "bf16"
    FP32 = "fp32"


class Lora(BaseModel):
    """A low-rank adapter on a frozen base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class Workload(BaseModel):
    """The contract under which configurations are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq_len: int = Field(default=2048, ge=2)
    """Tokens per sequence (packed sequences are exactly this long)."""
    global_batch_size: int = Field(default=64, ge=1)
    """Sequences per optimizer step, held exactly; accumulation follows from it."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    precision: Precision = Precision.BF16
    packing: bool = True
    """Several documents in one sequence, attention kept inside each document."""
    mean_document_tokens: int | None = Field(default=None, ge=2)
    """Mean length of the synthetic documents of a trial without user data; None = ``seq_len / 4``.

    Lengths are drawn from a geometric distribution of this mean, cut at ``seq_len``.
    """
    adapter: Lora | None = None

    @property
    def synthetic_document_tokens(self) -> int:
        """`mean_document_tokens`, or what stands for it where it is None."""
        return max(2, self.mean_document_tokens or self.seq_len // 4)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, padding and masked ones included."""
        return self.seq_len * self.global_batch_size
