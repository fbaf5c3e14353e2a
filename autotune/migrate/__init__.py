"""FSDP1 configurations into FSDP2 ones: Axolotl's YAML and accelerate's."""

from autotune.migrate.mesh import Mesh
from autotune.migrate.migration import Migration, migrate

__all__ = ["Mesh", "Migration", "migrate"]
