"""Models: their shape, the families they come in, and where their configs are found."""

from autotune.spec.model.from_config import model_from_config
from autotune.spec.model.load import load_model
from autotune.spec.model.shape import NAMES_AND_PLACES, ModelSpec, MoeSpec, QkNorm

__all__ = [
    "NAMES_AND_PLACES",
    "ModelSpec",
    "MoeSpec",
    "QkNorm",
    "load_model",
    "model_from_config",
]
