"""What a full run needs to know: its data, its schedule, its checkpoints."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class DatasetSource(BaseModel):
    """One entry of an Axolotl `datasets:` list."""

    model_config = ConfigDict(extra="allow")

    path: str
    type: str = "completion"
    """`completion`, `alpaca` or `chat_template`."""
    ds_type: str | None = None
    field: str | None = None
    field_messages: str | None = None
    split: str = "train"


class TrainSettings(BaseModel):
    """What a full run needs beyond a trial."""

    model_config = ConfigDict(extra="forbid")

    max_steps: int | None = None
    num_epochs: float = 1.0
    learning_rate: float = 2e-5
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    logging_steps: int = 1
    eval_steps: int | None = None
    """None evaluates at the end of the run alone."""
    save_steps: int | None = None
    """None writes no checkpoints, only the final weights."""
    save_total_limit: int | None = None
    val_set_size: float = 0.0
    """Share of the sequences (below 1) or their count (1 and above) held out."""
    use_tensorboard: bool = False
    torch_compile: bool = False
    """Compile the model with inductor, under whichever engine shards it."""
    resume_from: str | None = None
    """Checkpoint folder."""
    save_final_weights: bool = True
