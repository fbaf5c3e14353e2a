"""From data files to the micro-batches of each rank."""

from autotune.runner.data.build import TrainingData, build_sequences

__all__ = ["TrainingData", "build_sequences"]
