"""Configurations of other tools, read as a starting point."""

from autotune.config.foreign.load import Loaded, StartingPoint, load_any
from autotune.config.foreign.recognise import FileKind

__all__ = ["FileKind", "Loaded", "StartingPoint", "load_any"]
