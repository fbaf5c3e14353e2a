"""DDP: every rank holds everything (PyTorch 2.13, ``torch/nn/parallel/distributed.py``)."""

from __future__ import annotations

import numpy as np

from autotune.memory.engines.base import Bytes, EngineMemory, Place, Work


class Ddp(EngineMemory):
    """Whole states; the reducer's buckets are as large as the gradients.

    With ``gradient_as_bucket_view=False``, PyTorch's default, a gradient is copied into its bucket
    and stays where it was. accelerate wraps a single process, too, once it has a process group, as
    every run here has. Casts to bf16 are autocast's, so the model's own tensors.
    """

    def resting(self) -> dict[str, Bytes]:
        """Return the states and the reducer's buckets."""
        size = self.sizes
        return {
            "parameters": self.setup.parameter_bytes * size.total,
            "optimizer": self.optimizer_bytes(size.trainable),
            "buckets": self._gradients(size.trainable),
        }

    def held(self) -> Bytes:
        """Return all gradients: later micro-steps add to them."""
        return self._gradients(self.sizes.trainable)

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the gradients so far."""
        done = self.sizes.trainable if later else place.finished + inside
        return Work(gradients=self._gradients(done))

    def finish(self, *, later: bool) -> Work:
        """Return the gradients."""
        return Work(gradients=self.held())

    def step(self) -> Work:
        """Return the gradients and the optimizer's temporaries."""
        return Work(gradients=self.held(), temporaries=self.step_over_parameters())

    def shard(self, elements: Bytes) -> Bytes:
        """Return all: also where ranks share a sequence, each holds everything."""
        return elements

    def _gradients(self, elements: Bytes) -> Bytes:
        return self.setup.gradient_bytes * np.asarray(elements, float)
