"""ZeRO-1 and ZeRO-2 (DeepSpeed 0.19.8, ``runtime/bf16_optimizer.py``, ``stage_1_and_2.py``).

Both flatten the trained parameters into one buffer and keep fp32 master weights and optimizer
states of a rank's part of it. The ranks' parts lie in the order of the parameters, so the last rank
is the first whose gradients arrive, when activations are highest: it needs most.
"""

from __future__ import annotations

import numpy as np

from autotune.memory.engines.base import (
    FP32,
    Array,
    Bytes,
    EngineMemory,
    Place,
    Work,
    single_parameter,
)

_FP64 = 8
"""``zero/utils.py: get_norm_dtype``."""
_REDUCED_AT_ONCE = 5e8
"""``engine.py: MEMORY_OPT_ALLREDUCE_SIZE``, elements ZeRO-1 reduces together."""


class Zero1(EngineMemory):
    """`BF16_Optimizer`, which bf16 with fp32 accumulation gets."""

    def resting(self) -> dict[str, Bytes]:
        """Return the states and the fp32 gradients, a buffer of the whole model's size."""
        size = self.sizes
        return {
            "parameters": self.width * size.total,
            "optimizer": self.optimizer_bytes(self.shard(size.trainable)),
            "gradients": self.setup.gradient_bytes * size.trainable,
        }

    def held(self) -> Bytes:
        """Return the gradients backward made: they are zeroed, not freed, between micro-steps."""
        return self.width * self.sizes.trainable

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the gradients backward made, which are added to the fp32 ones at its end."""
        done = self.sizes.trainable if later else place.finished + inside
        return Work(gradients=self.width * np.asarray(done, float))

    def finish(self, *, later: bool) -> Work:
        """Return the cast of the largest gradient, or the copy that the reduction flattens."""
        size = self.sizes
        cast = FP32 * size.largest_trainable
        # Matrices and vectors are groups of their own (weight decay). Up to the limit they are
        # reduced together, from a copy; above it each where it lies.
        together = size.all_train and size.trainable <= _REDUCED_AT_ONCE
        copied = FP32 * size.trainable if together else 0.0
        at_end = np.maximum(cast, copied)
        work = at_end if later else np.where(self.runs.steps > 1, cast, at_end)
        return Work(gradients=self.held(), temporaries=work)

    def step(self) -> Work:
        """Return the gradients backward made, and the update of the rank's part."""
        part = self.shard(self.sizes.trainable)
        work = np.maximum(self.step_temporaries(part, part), _gather_copy(self))
        return Work(gradients=self.held(), temporaries=work)

    def gather(self) -> tuple[Bytes, Bytes]:
        """Return a copy in host memory; a tied head is copied as well."""
        return 0.0, _copied_weights(self)


class Zero2(EngineMemory):
    """`DeepSpeedZeroOptimizer` of stage 2 (and of stage 1 with offload).

    A gradient goes into a bucket of the compute type; a full bucket is cast to fp32, reduced, and
    the rank's part of it added to its fp32 partition. A parameter larger than the bucket is reduced
    alone and, where the rank owns a part of it, its gradient stays until backward ends.
    """

    def resting(self) -> dict[str, Bytes]:
        """Return parameters and the rank's part of the states."""
        states = {"parameters": self.width * self.sizes.total}
        if not self.runs.offload_optimizer:
            return states | {"optimizer": self.optimizer_bytes(self._part)}
        # temp_grad_buffer_for_gpu_offload
        states["buckets"] = self.width * self.sizes.largest_trainable
        return states | ({"offloaded": self._offloaded()} if self.runs.on_cpu else {})

    def host(self) -> Bytes:
        """Return master weights, moments, gradients, and updated weights on their way back."""
        return self._offloaded() if self.runs.offload_optimizer else 0.0

    def held(self) -> Bytes:
        """Return the fp32 partition."""
        return FP32 * self._part

    def turn(self) -> Array | None:
        """Return where the last rank's part of the parameters ends."""
        return np.asarray(self._part, float)

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the partition, large gradients the last rank owns, the bucket and its casts."""
        done = place.finished + inside
        some = np.asarray(done, float) > 0
        # A bucket is reduced when a gradient arrives that it cannot hold, what is left at the end
        # of backward (`reduce_independent_p_g_buckets_and_remove_grads`,
        # `independent_gradient_partition_epilogue`); the partition comes with the first reduction.
        reduced = done > self.runs.bucket
        gradients = np.where(reduced | later, self.held(), 0.0) + self._kept(done)
        copies = np.maximum(self._reduced(place.kind), self._normed(place.kind, later=later))
        reducing = np.where(reduced & (np.asarray(inside, float) > 0), copies, 0.0)
        return Work(
            gradients=gradients, temporaries=np.where(some, self._buckets() + reducing, 0.0)
        )

    def finish(self, *, later: bool) -> Work:
        """Return the partition, large gradients and the last reduction."""
        size = self.sizes
        embedding = size.embedding * size.all_train
        gradients = self.held() + self._kept(size.trainable) + self.width * embedding
        copies = np.maximum(self._reduced("embedding"), self._normed("embedding", later=later))
        work = self._buckets() + copies
        return Work(gradients=gradients, temporaries=work)

    def step(self) -> Work:
        """Return the partition and its update."""
        work = _gather_copy(self) - FP32 * self._part
        if not self.runs.offload_optimizer:
            work = np.maximum(self.step_temporaries(self._part, self._part), work)
        return Work(gradients=self.held(), temporaries=np.maximum(work, 0.0))

    def gather(self) -> tuple[Bytes, Bytes]:
        """Return a copy in host memory; a tied head is copied as well."""
        return 0.0, _copied_weights(self)

    @property
    def _part(self) -> Bytes:
        return self.shard(self.sizes.trainable)

    def _buckets(self) -> Bytes:
        """Return the bucket, and the second one of ``overlap_comm``."""
        return self.width * self.runs.bucket * (1 if self.runs.on_cpu else 2)

    def _offloaded(self) -> Bytes:
        states = self.optimizer_bytes(self._part) + (FP32 + self.width) * self._part
        return (
            states + self.width * self.sizes.largest_trainable
        )  # temp_grad_buffer_for_cpu_offload

    def _kept(self, done: Bytes) -> Bytes:
        """Return the gradients of large parameters that the last rank owns a part of."""
        size, bucket = self.sizes, self.runs.bucket
        head = size.head * size.all_train * (size.head > bucket)
        head = np.minimum(head, done)
        layers = np.clip(np.minimum(done, self._part) - head, 0.0, None)
        return self.width * (head + layers * size.share_above(bucket))

    def _reduced(self, kind: str) -> Bytes:
        """Return what a reduction in a unit of a kind copies."""
        alone = single_parameter(self.sizes, kind)
        cast = np.where(alone > self.runs.bucket, FP32 * alone, 0.0)
        filled = np.minimum(self.runs.bucket, self.sizes.trainable) * (kind != "tail")
        return np.maximum(cast, (self.width + FP32) * filled)

    def _normed(self, kind: str, *, later: bool) -> Bytes:
        """Return the fp64 copy whose norm offload takes of a reduced gradient, the rank's part.

        In the micro-step that ends an optimizer step alone (``set_norm_for_param_grad_in_gpu``).
        """
        if not self.runs.offload_optimizer:
            return 0.0
        own = _FP64 * np.minimum(single_parameter(self.sizes, kind), self._part)
        return np.where(later | (self.runs.steps <= 1), own, 0.0)


def _gather_copy(engine: EngineMemory) -> Bytes:
    """Gloo gathers the updated parameters into a buffer of its own."""
    copy = engine.width * engine.sizes.trainable
    return copy * (engine.runs.world > 1) if engine.runs.on_cpu else 0.0


def _copied_weights(engine: EngineMemory) -> Bytes:
    tied = engine.sizes.embedding * engine.sizes.tied
    return engine.width * (engine.sizes.total + tied)
