"""`ModelSpec`: the shape of a dense decoder, read from a name or a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from autotune.errors import AutotuneError, nearest
from autotune.spec.catalogue import read_catalogue
from autotune.spec.workload import Lora


class MoeSpec(BaseModel):
    """Routed experts of a mixture-of-experts decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: PositiveInt
    experts_per_token: PositiveInt
    expert_ffn_size: PositiveInt


class ModelSpec(BaseModel):
    """Sizes of a decoder-only language model and where its files are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    """Hugging Face ``model_type``."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_size: PositiveInt
    vocab_size: PositiveInt
    tied_embeddings: bool
    gated_ffn: bool = True
    moe: MoeSpec | None = None
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys (Qwen3)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    hf_config: dict[str, Any] = Field(repr=False)
    """Complete Hugging Face config with ``model_type``: ``AutoConfig.for_model(**hf_config)``."""
    weights: str | None = None
    """Folder that holds pretrained weights; None builds random ones."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer."""

    @property
    def query_size(self) -> int:
        """Width of the concatenated query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(inputs, outputs)`` of each projection of one layer, by its module name."""
        h, q, kv, f = self.hidden_size, self.query_size, self.kv_size, self.ffn_size
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        gate = {"gate_proj": (h, f)} if self.gated_ffn else {}
        return attention | gate | {"up_proj": (h, f), "down_proj": (f, h)}

    @property
    def num_matmul_parameters_per_layer(self) -> int:
        """Weights of one layer's projections, biases and norms left out."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_parameters_per_layer(self) -> int:
        """All parameters of one decoder layer."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = 0
        for name, (_, outputs) in self.linears.items():
            if name in ("q_proj", "k_proj", "v_proj"):
                biases += outputs * self.qkv_bias
            elif name == "o_proj":
                biases += outputs * self.output_bias
            else:
                biases += outputs * self.mlp_bias
        return self.num_matmul_parameters_per_layer + norms + biases

    @property
    def num_embedding_parameters(self) -> int:
        """Token embedding; the output head has as many, shared when `tied_embeddings`."""
        return self.vocab_size * self.hidden_size

    @property
    def num_root_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, output head, final norm."""
        copies = 1 if self.tied_embeddings else 2
        return copies * self.num_embedding_parameters + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Exact count of distinct parameters (a tied head counts once)."""
        return self.num_layers * self.num_parameters_per_layer + self.num_root_parameters

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token passes through; all of them in a dense model."""
        return self.num_parameters

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that multiply every token: projections and output head, not the embedding."""
        layers = self.num_layers * self.num_matmul_parameters_per_layer
        return layers + self.num_embedding_parameters

    def num_adapter_parameters(self, adapter: Lora) -> int:
        """Parameters LoRA adds: ``r * (inputs + outputs)`` a targeted projection.

        Hu et al., arXiv:2106.09685. Names that are no projection of this model add nothing; a
        rule reports them.
        """
        targets = [shape for name, shape in self.linears.items() if name in adapter.target_modules]
        return self.num_layers * adapter.r * sum(inputs + outputs for inputs, outputs in targets)


# How each supported `model_type` decides what its config leaves to the code. Source: the
# modeling_*.py and configuration_*.py of transformers 5 for these families.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias",
    },
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {
        "qk_norm": True, "qkv_bias": "attention_bias", "output_bias": "attention_bias",
        "head_dim": 128,
    },
}  # fmt: skip

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_model(name_or_path: str) -> ModelSpec:
    """Read a model by catalogue name, Hub id of a catalogue entry, folder or config.json.

    Raises:
        AutotuneError: no such name or file, or an architecture that is not supported.
    """
    entries = read_catalogue("models")
    by_name = {key.lower(): key for key in entries}
    by_name |= {entry["hub"].lower(): key for key, entry in entries.items() if "hub" in entry}
    path = Path(name_or_path).expanduser()
    looks_like_path = name_or_path.startswith((".", "/", "~")) or path.suffix == ".json"
    key = by_name.get(name_or_path.lower())
    if key and not looks_like_path:
        hub = entries[key].get("hub")
        # By its Hub id the model is meant as it was published; by our name it is its shape alone.
        published = hub if name_or_path.lower() != key.lower() else None
        return model_from_config(key, entries[key]["config"], weights=published, tokenizer=hub)
    if path.exists():
        return _load_local(path)
    if looks_like_path:
        raise AutotuneError(
            f"No model at {name_or_path!r}: no such file or folder. Give a folder with a "
            f"config.json, a config.json, or one of: {', '.join(entries)}."
        )
    raise AutotuneError(
        f"Unknown model {name_or_path!r}.{nearest(name_or_path, by_name)} Known: "
        f"{', '.join(entries)}. A local folder with a config.json works too."
    )


def model_from_config(
    name: str,
    config: Mapping[str, Any],
    *,
    weights: str | None = None,
    tokenizer: str | None = None,
) -> ModelSpec:
    """Read the sizes out of a Hugging Face config.

    Raises:
        AutotuneError: an architecture that is not supported, or a size missing or malformed.
    """
    architecture = config.get("model_type")
    if architecture not in _FAMILIES:
        raise AutotuneError(
            f"Model {name!r} has model_type {architecture!r}, which is not supported. "
            f"Supported: {', '.join(sorted(_FAMILIES))} (dense decoders)."
        )
    family = _FAMILIES[architecture]
    hidden, heads = _size(name, config, "hidden_size"), _size(name, config, "num_attention_heads")
    if hidden % heads and not config.get("head_dim") and "head_dim" not in family:
        raise AutotuneError(
            f"Config of {name!r}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads} and head_dim is not given."
        )

    def flag(field: str) -> bool:
        source = family.get(field, False)
        return bool(config.get(source, False)) if isinstance(source, str) else bool(source)

    return ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=_size(name, config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_size(name, config, "num_key_value_heads", default=heads),
        head_dim=_size(name, config, "head_dim", default=family.get("head_dim", hidden // heads)),
        ffn_size=_size(name, config, "intermediate_size"),
        vocab_size=_size(name, config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=flag("qk_norm"),
        qkv_bias=flag("qkv_bias"),
        output_bias=flag("output_bias"),
        mlp_bias=flag("mlp_bias"),
        hf_config=dict(config),
        weights=weights,
        tokenizer=tokenizer,
    )


def _size(name: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AutotuneError(
            f"Config of {name!r}: {key} must be a positive whole number, not {value!r}."
        )
    return value


def _load_local(path: Path) -> ModelSpec:
    folder = path if path.is_dir() else path.parent
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise AutotuneError(f"Model folder {str(path)!r} has no config.json.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AutotuneError(f"{str(file)!r} is not a JSON file: {error}") from error
    except OSError as error:
        raise AutotuneError(f"Cannot read {str(file)!r}: {error.strerror}.") from error
    if not isinstance(config, dict):
        raise AutotuneError(f"{str(file)!r} is not a model config: it holds no JSON object.")
    name = folder.resolve().name if file.name == "config.json" else file.stem
    return model_from_config(
        name,
        config,
        weights=str(folder) if _holds(folder, _WEIGHT_PATTERNS) else None,
        tokenizer=str(folder) if _holds(folder, _TOKENIZER_FILES) else None,
    )


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)
