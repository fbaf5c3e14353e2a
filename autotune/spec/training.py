"""What a full run needs to know: its data, its schedule, its checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

TrainOnEnd = Literal["turn", "all", "last", "none"]
DATASET_TYPES = (
    "completion", "chat_template", "input_output", "alpaca", "alpaca:chat", "alpaca:chatml",
    "alpaca_chat", "gpteacher", "alpaca_w_system.load_open_orca",
)  # fmt: skip
"""Axolotl's names of the kinds of rows that are read here; see `autotune.runner.data.formats`."""


class PromptFormat(BaseModel):
    """The mapping under `type:`: which columns make up a prompt, and how; Axolotl's defaults."""

    model_config = ConfigDict(extra="forbid")

    field_system: str = "system"
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"
    system_prompt: str = ""
    """For a row without a value in `field_system`."""
    system_format: str = "{system}"
    format: str = "{instruction} {input} "
    no_input_format: str = "{instruction} "
    """For a row whose input is missing or empty."""


class DatasetSource(BaseModel):
    """One entry of an Axolotl `datasets:` list; None is what Axolotl does without the key."""

    model_config = ConfigDict(extra="forbid")

    path: str
    """A file, a folder, a pattern such as ``data/*.jsonl``, or the id of a Hub data set."""
    type: str | PromptFormat = "completion"
    """One of `DATASET_TYPES`, or a prompt of one's own."""
    name: str | None = None
    """Configuration of a Hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    data_files: list[str] | None = None
    """Files or patterns: inside the folder `path`, or of the Hub data set."""
    ds_type: str | None = None
    """Kind of the local files: json, csv, parquet or text; None tells it from the suffix."""
    split: str = "train"
    """A split, with slices as `datasets` writes them: ``train[:10%]``."""
    shards: int | None = None
    """Keep one row of this many."""
    shards_idx: int | None = None
    """Which: rows number `shards_idx`, `shards_idx` + `shards`, ...; 0 without."""
    skip: int | None = None
    """Rows left out at the start."""
    field: str | None = None
    """Column of a completion; `text` without."""
    chat_template: str | None = None
    """`tokenizer_default`, `tokenizer_default_fallback_NAME`, `jinja` or a shipped template."""
    chat_template_jinja: str | None = None
    """Text of a template."""
    field_messages: str | None = None
    """Column of a conversation; `messages` without."""
    field_tools: str | None = None
    """Column of the tools a conversation may call; `tools` without."""
    drop_system_message: bool | None = None
    message_property_mappings: dict[str, str] | None = None
    """The template's name of a message's property, to the name in the data."""
    message_field_training: str | None = None
    """Property of a message that says by true or false whether it is trained on."""
    roles: dict[str, list[str]] | None = None
    """The template's role, to the names it has in the data."""
    roles_to_train: list[str] | None = None
    """`[assistant]` without."""
    train_on_eos: TrainOnEnd | None = None
    """End-of-turn tokens trained on: of the trained turns (`turn`, without the key), of all, of the
    last turn alone, none."""


class DataSettings(BaseModel):
    """What holds for all data sets of a run."""

    model_config = ConfigDict(extra="forbid")

    train_on_inputs: bool = False
    """Train on prompts and on every role, too."""
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    """For a row longer than a sequence. A completion is cut into chunks instead, always."""
    exact_deduplication: bool = False
    """Keep the first of rows whose tokens and labels are equal."""
    streaming: bool = False
    """Read Hub data sets as they come, and no more rows than `max_steps` needs."""


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
    eval_batch_size: int | None = None
    """Sequences of an evaluation step and data-parallel rank; None takes the micro batch."""
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
