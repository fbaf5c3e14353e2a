"""The configuration format: Axolotl's YAML plus one block `autotune:`."""

from autotune.config.block import AutotuneBlock, LadderRung, fallback_ladder
from autotune.config.presets import preset_names
from autotune.config.run import RunConfig, load_config

__all__ = [
    "AutotuneBlock",
    "LadderRung",
    "RunConfig",
    "fallback_ladder",
    "load_config",
    "preset_names",
]
