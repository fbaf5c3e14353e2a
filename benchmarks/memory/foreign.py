"""Engines of other tools, for the estimator's own walk through a step: one process, and FSDP1.

The runner of this project has neither, so they live beside the published runs that need them.

FSDP1, from torch 2.13 ``torch/distributed/fsdp`` (`_runtime_utils.py`, `_flat_param.py`):

- a unit's flat parameter is gathered in the compute type; backward prefetches the next unit; the
  root unit (embedding, head, final norm) stays gathered from forward to the end of backward
  (`_post_forward_reshard` never frees the root), and its gradients wait whole for the embedding's;
- the next unit is the one whose forward ended just before (`_ExecOrderData`). PEFT's wrapping
  policy makes every adapter matrix a unit, so a layer's backward fetches its own last adapter
  first, and the layer before comes when its own backward is nearly done: one is gathered, not two;
- under mixed precision accelerate makes the flat parameters that train fp32;
- 4-bit weights are gathered packed, while their scales are whole on every rank;
- in `no_sync` gradients stay whole; those of a flat parameter that mixes frozen and trained weights
  (``use_orig_params``) have room for the frozen ones too;
- a frozen unit waits for backward by `register_multi_grad_hook` on its inputs
  (`_register_post_backward_reshard_only_hook`), whose nodes hold the inputs until the end of
  backward. Under reentrant checkpointing these are detached copies with a gradient each: a
  recomputed layer's input and its gradient both stay (`holding_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autotune.memory import quantised
from autotune.memory.engines.base import Bytes, EngineMemory, Place, Runs, Work
from autotune.memory.moments import Walk
from autotune.memory.optimizers import step_bytes
from autotune.memory.profile import ActivationProfile, features
from autotune.memory.setup import Checkpointing, Setup
from autotune.memory.sizes import Sizes

_FP32 = 4
_PACKED = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How another tool trained a model."""

    setup: Setup
    """`parameter_bytes` is of a weight that is not quantised."""
    fsdp1: bool = False
    ranks: int = 1
    """That one copy of the states is spread over."""
    micro_batch_size: int
    seq_len: int
    adapter_units: bool = False
    """Each adapter matrix is an FSDP1 unit of its own."""
    adapter_bytes: int = 4
    """Of one weight of the adapter; its gradient and optimizer states take the same type."""
    upcast_rest: bool = False
    """Frozen weights that are not quantised are fp32 (PEFT `prepare_model_for_kbit_training`)."""
    offload: bool = False
    """Shards live in host memory."""
    unsynced_bytes: int = 0
    """Of each element while micro-steps accumulate in `no_sync`."""
    kept_by_tool: float = 0.0
    """Bytes a token that the tool's own layer keeps beyond transformers', without recomputation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """A model's elements, counted on its real code."""

    sizes: Sizes
    """The adapter's are in the layers."""
    projections: dict[str, tuple[int, int]]
    """(inputs, outputs) of the linear modules in the layers: what is quantised."""
    vocab: int
    hidden: int
    extra_trained: int = 0
    """Copies of whole modules that train beside an adapter (PEFT ``modules_to_save``)."""


def peak(profile: ActivationProfile, counts: Counts, run: Run) -> tuple[float, str]:
    """Return the largest bytes of an optimizer step, and the instant they stand at."""
    engine = (Fsdp1 if run.fsdp1 else OneProcess)(counts, run)
    own = _with_tool(profile, run)
    walk = Walk(own, counts.sizes, engine, features(run.micro_batch_size, [run.seq_len], 1))
    resting = float(np.sum(sum(engine.resting().values())))
    best, instant = 0.0, ""
    for moment in walk.moments():
        total = float(np.max(moment.total))
        if total > best and moment.instant != "evaluation":
            best, instant = total, moment.instant
    return resting + best, instant


def _with_tool(profile: ActivationProfile, run: Run) -> ActivationProfile:
    checkpointing = run.setup.key.checkpointing
    if checkpointing is Checkpointing.NONE and run.kept_by_tool:
        return keeping_more(profile, run.kept_by_tool)
    frozen = run.setup.key.adapter is not None
    if run.fsdp1 and frozen and checkpointing is Checkpointing.REENTRANT:
        return holding_inputs(profile)
    return profile


def holding_inputs(profile: ActivationProfile) -> ActivationProfile:
    """Return a profile whose layers' inputs, and their gradients, stay to the end of backward.

    A layer's backward ends with its input freed (below 0); now that stays, and the gradient it was
    given as well.
    """
    kinds = tuple(
        replace(kind, backward=replace(kind.backward, end=tuple(-x for x in kind.backward.end)))
        for kind in profile.kinds
    )
    held = 2 * sum(np.array(profile.kinds[i].backward.end) for i in profile.layers)
    last = profile.embedding_backward
    freed = tuple(float(x) for x in np.array(last.end) + held)
    return replace(profile, kinds=kinds, embedding_backward=replace(last, end=freed))


def keeping_more(profile: ActivationProfile, bytes_a_token: float) -> ActivationProfile:
    """Return a profile whose layers keep more of each token from forward to backward."""

    def more(end: tuple[float, ...], sign: int) -> tuple[float, ...]:
        return tuple(x + sign * bytes_a_token * (i == 3) for i, x in enumerate(end))

    kinds = tuple(
        replace(
            kind,
            forward=replace(kind.forward, end=more(kind.forward.end, 1)),
            backward=replace(kind.backward, end=more(kind.backward.end, -1)),
        )
        for kind in profile.kinds
    )
    return replace(profile, kinds=kinds)


class OneProcess(EngineMemory):
    """Whole states on the device: one GPU, or replicas whose reductions are in place."""

    def __init__(self, counts: Counts, run: Run) -> None:
        frozen = run.setup.key.adapter is not None
        width = run.adapter_bytes if frozen else run.setup.parameter_bytes
        one = np.ones(1)
        super().__init__(
            counts.sizes,
            Runs(
                setup=replace(run.setup, state_bytes=width),
                on_cpu=False,
                offload_optimizer=run.offload,
                offload_params=run.offload,
                reshard=True,
                shards=one * run.ranks,
                world=one * run.ranks,
                steps=one,
                bucket=one,
            ),
        )
        self.run = run
        self.counts = counts
        self.trained_width = width
        self.trained = counts.sizes.trainable + counts.extra_trained
        added = counts.sizes.trainable if frozen else 0.0
        self.base = counts.sizes.total - added
        self.added = added + counts.extra_trained

    def resting(self) -> dict[str, Bytes]:
        """Return weights, adapter and optimizer states."""
        return {
            "parameters": self.weights() + self.scales() + self.trained_width * self.added,
            "optimizer": self.states * self.trained,
        }

    def weights(self) -> float:
        """Return the stored base, without a quantised one's scales."""
        if self.setup.quantised is None:
            return float(self.setup.parameter_bytes * self.base)
        packed = sum(inputs * outputs for inputs, outputs in self.counts.projections.values())
        rest = _FP32 if self.run.upcast_rest else self.width
        return _PACKED * packed + rest * (self.base - packed)

    def scales(self) -> float:
        """Return what lies beside packed weights."""
        kind, shapes = self.setup.quantised, self.counts.projections
        if kind is None:
            return 0.0
        packed = sum(inputs * outputs for inputs, outputs in shapes.values())
        return quantised.stored_bytes(kind, shapes) - _PACKED * packed

    def forward(self, place: Place) -> Work:
        """Return the copy of one quantised matrix."""
        return Work(temporaries=self._copy() if place.kind == "layer" else 0.0)

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the gradients so far, and the copy of one quantised matrix."""
        del later
        done = place.finished + inside
        return Work(
            gradients=self.trained_width * done,
            temporaries=self._copy() if place.kind == "layer" else 0.0,
        )

    def finish(self, *, later: bool) -> Work:
        """Return the gradients."""
        del later
        return Work(gradients=self.trained_width * self.trained)

    def step(self) -> Work:
        """Return the gradients and the optimizer's temporaries."""
        gradients = self.trained_width * self.trained
        return Work(gradients=gradients, temporaries=self._step(self.trained))

    def _step(self, trained: Bytes) -> Bytes:
        return step_bytes(
            self.setup.optimizer,
            trained,
            min(self.sizes.largest_trainable, self.trained),
            foreach=self.setup.foreach,
            fused=self.setup.fused,
            element_bytes=self.trained_width,
        )

    def _copy(self) -> float:
        kind = self.setup.quantised
        if kind is None:
            return 0.0
        largest = max(inputs * outputs for inputs, outputs in self.counts.projections.values())
        return float(quantised.working_bytes(kind, largest, self.width))


class Fsdp1(OneProcess):
    """Flat parameters of decoder layers and a root, sharded over the ranks; one: `NO_SHARD`."""

    def resting(self) -> dict[str, Bytes]:
        """Return the rank's shard of the states, and whole scales and gradients."""
        whole = self.scales() + self.run.unsynced_bytes * self.sizes.total
        if self.run.offload:
            return {"parameters": whole}
        stored = self.weights() + self.trained_width * self.added
        return {
            "parameters": self.shard(stored) + whole,
            "optimizer": self.shard(self.states * self.trained),
        }

    def enter(self, place: Place) -> Work:
        """Return the root and the unit."""
        return self.forward(place)

    def forward(self, place: Place) -> Work:
        """Return the root, the unit, and the next one, which is fetched while this one runs."""
        layers = 2 if place.kind == "layer" else 0
        return Work(gathered=self._root() + layers * self._layer(), temporaries=self._copy())

    def loss(self) -> Work:
        """Return the root, and the last layer fetched for backward."""
        return Work(gathered=self._root() + self._layer())

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the gathered units, sharded gradients before and whole ones of this unit."""
        del later
        root = self.sizes.root * self.sizes.all_train
        waiting = root if place.kind == "embedding" else self.sizes.head + self.sizes.norm
        waiting = waiting * self.sizes.all_train if place.kind != "tail" else inside
        finished = max(0.0, place.finished - waiting) if place.kind != "tail" else 0.0
        own = inside if place.kind == "layer" else 0.0
        two = not (place.first or self.run.adapter_units)
        layers = {"layer": 1 + two, "tail": 1, "embedding": 0}[place.kind]
        sharded = 0.0 if self.run.offload else self.shard(self.trained_width * finished)
        return Work(
            gradients=sharded + self.width * (waiting + own),
            gathered=self._root() + layers * self._layer(),
            temporaries=self._copy() if place.kind == "layer" else 0.0,
        )

    def finish(self, *, later: bool) -> Work:
        """Return the sharded gradients."""
        del later
        return Work(gradients=self.shard(self.trained_width * self.trained))

    def step(self) -> Work:
        """Return the sharded gradients and the update."""
        if self.run.offload:
            return Work()
        gradients = self.shard(self.trained_width * self.trained)
        return Work(gradients=gradients, temporaries=self._step(self.shard(self.trained)))

    def evaluation(self) -> Work:
        """Return the root."""
        return Work(gathered=self._root())

    def _root(self) -> float:
        return self.width * self.sizes.root * (self.run.ranks > 1)

    def _layer(self) -> float:
        largest = float(self.sizes.layers.max())
        return largest * (_PACKED if self.setup.quantised else self.width) * (self.run.ranks > 1)
