"""ZeRO-3 (DeepSpeed 0.19.8, ``runtime/zero/stage3.py``, ``partitioned_param_coordinator.py``)."""

from __future__ import annotations

import numpy as np

from autotune.memory.engines.base import FP32, Bytes, EngineMemory, Place, Work, single_parameter

_REUSE_ELEMENTS = 1e9
"""``stage3_max_reuse_distance``, as `autotune.emit.deepspeed` writes it."""
_SUB_GROUP_ELEMENTS = 1e9
"""``sub_group_size``, likewise: elements of a rank the optimizer steps over at once."""


class Zero3(EngineMemory):
    """Everything is partitioned; parameters are gathered for use.

    A gathered parameter stays if its next use is within the reuse distance, counted over the
    modules forward and backward in between: so what lies within half of it from the end of the
    model stays from forward to backward, and every parameter of a model below that.
    """

    def resting(self) -> dict[str, Bytes]:
        """Return the rank's part of everything, and the buffer gradients are staged in."""
        size = self.sizes
        states: dict[str, Bytes] = {"parameters": 0.0, "gradients": 0.0}
        # Partitions below the persistence threshold stay gathered: the norms, next to nothing.
        states["buckets"] = FP32 * self.runs.bucket
        if not self.runs.offload_params:
            states["parameters"] = self.width * self.shard(size.total)
        if self.runs.hpz > 1:
            # `_partition_param_sec`: in the compute type, from a parameter's first release until
            # the optimizer's step, so at every peak.
            states["parameters"] = states["parameters"] + self.width * size.total / self.runs.hpz
        if not self.runs.offload_optimizer:
            states["optimizer"] = self.optimizer_bytes(self._part)
            states["gradients"] = FP32 * self._part
        return states | ({"offloaded": self._offloaded()} if self.runs.on_cpu else {})

    def host(self) -> Bytes:
        """Return what is offloaded."""
        return self._offloaded()

    @property
    def _copied(self) -> Bytes:
        """Bytes an element gathered: none for a single rank, whose partitions are whole."""
        moved = self.runs.offload_params and not self.runs.on_cpu
        return self.width * ((self.runs.shards > 1) | moved)

    def enter(self, place: Place) -> Work:
        """Return the parameters gathered so far, and the buffers of the next gather."""
        now = place.below + place.unit
        kept = np.minimum(place.below, np.maximum(0.0, self._window - place.above - place.unit))
        return Work(
            gathered=self._copied * (np.minimum(kept + place.unit, now) + self._in_flight(place))
        )

    def forward(self, place: Place) -> Work:
        """Return the parameters that stay, the unit's own, and those fetched ahead."""
        kept = self._kept(place)
        ahead = np.minimum(self.runs.bucket, place.above)
        return Work(gathered=self._copied * (np.maximum(kept, self._module(place)) + ahead))

    def loss(self) -> Work:
        """Return the parameters that stay for backward."""
        total = self.sizes.total - self._not_again
        return Work(gathered=self._copied * np.minimum(total, self._window))

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the parameters not yet used, and a reduction's copies."""
        kept = self._kept(place)
        ahead = np.minimum(self.runs.bucket, place.below)
        gathered = self._copied * np.maximum(kept, self._module(place) + ahead)
        some = np.asarray(inside, float) > 0
        return Work(gathered=gathered, temporaries=np.where(some, self._reduced(place.kind), 0.0))

    def finish(self, *, later: bool) -> Work:
        """Return the embedding, its gradient and that one's reduction."""
        size = self.sizes
        embedding = size.embedding * size.all_train
        reduced = self._reduced("embedding")
        return Work(self.width * embedding, self._copied * embedding, reduced)

    def step(self) -> Work:
        """Return a sub-group's gradients, flattened into a copy, and its update."""
        if self.runs.offload_optimizer:
            return Work()
        part = np.minimum(self._part, _SUB_GROUP_ELEMENTS)
        return Work(temporaries=FP32 * part + self.step_temporaries(part, part))

    def gather(self) -> tuple[Bytes, Bytes]:
        """Return one gathered parameter at a time, and all of them on rank 0's host."""
        return self.width * self.sizes.embedding, self.width * self.sizes.total

    @property
    def _part(self) -> Bytes:
        return self.shard(self.sizes.trainable)

    @property
    def _window(self) -> float:
        return _REUSE_ELEMENTS / 2

    @property
    def _not_again(self) -> float:
        """Elements that backward does not come back to: a frozen embedding."""
        return self.sizes.embedding * (not self.sizes.all_train and not self.sizes.tied)

    def _kept(self, place: Place) -> Bytes:
        """Return the elements that stay gathered, of the unit and those before it."""
        lost = self._not_again * (place.kind != "embedding")
        return np.clip(self._window - place.above, 0.0, place.below + place.unit - lost)

    def _offloaded(self) -> Bytes:
        states: Bytes = 0.0
        if self.runs.offload_optimizer:
            # Master weights, moments, accumulated gradients, and the optimizer's copy of them.
            states = self.optimizer_bytes(self._part) + 2 * FP32 * self._part
        if self.runs.offload_params:
            states = states + self.width * self.shard(self.sizes.total)
        return states

    def _module(self, place: Place) -> Bytes:
        """Return what is gathered at once: a layer's largest module."""
        return place.unit if place.kind != "layer" else np.minimum(place.unit, self.sizes.module)

    def _in_flight(self, place: Place) -> Bytes:
        """Return a gather's flat buffer, and gloo's copy of it."""
        return np.minimum(np.maximum(self.runs.bucket, self._module(place)), place.unit) * (
            1 + self.runs.on_cpu
        )

    def _reduced(self, kind: str) -> Bytes:
        """Return what a reduction in a unit of a kind copies: gradients in fp32, by rank."""
        alone = single_parameter(self.sizes, kind)
        cast = np.where(alone > self.runs.bucket, alone, 0.0)
        filled = np.minimum(self.runs.bucket, self.sizes.trainable) * (kind != "tail")
        # gloo reduces a copy
        copies = 1 + self.runs.on_cpu * (self.runs.shards > 1)
        return FP32 * np.maximum(cast, filled) * copies
