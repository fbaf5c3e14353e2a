"""Peaks of runs by other tools: a traced profile with the states of one process or of FSDP1.

The runner of this project has neither, so their compositions live here; profile, optimizer and
quantised terms are the estimator's own.

FSDP1, from torch 2.13 ``torch/distributed/fsdp`` (`_runtime_utils.py`, `_flat_param.py`):

- a unit's flat parameter is gathered in the compute type; backward prefetches the next unit, the
  root unit (embedding, head, final norm) stays gathered from forward to the end of backward
  (`_post_forward_reshard` never frees the root);
- under mixed precision accelerate makes the flat parameters that train fp32;
- 4-bit weights are gathered packed, while their scales are whole on every rank;
- a frozen unit waits for backward by `register_multi_grad_hook` on its inputs
  (`_register_post_backward_reshard_only_hook`), whose nodes hold the inputs until the end of
  backward. Under reentrant checkpointing these are detached copies with a gradient each: a
  recomputed layer's input and its gradient both stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autotune.memory import optimizers, quantised
from autotune.memory.profile import ActivationProfile, Phase, Polynomial, features
from autotune.memory.setup import Checkpointing, Quantised, Setup


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Elements of a model, counted on its real code."""

    total: int
    """Distinct parameters, adapter left out."""
    root: int
    """Outside the decoder layers."""
    layer: int
    """The largest decoder layer."""
    head: int
    """The output head, which is the embedding when tied."""
    projections: dict[str, tuple[int, int]]
    """(inputs, outputs) of the linear modules in the layers: what is quantised."""
    largest: int
    """The largest parameter."""
    hidden: int
    vocab: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How another tool trained it."""

    setup: Setup
    shards: int = 1
    """Ranks of FSDP1; 1 is one process, or replicas."""
    micro_batch_size: int
    seq_len: int
    adapter_elements: int = 0
    adapter_bytes: int = 4
    """Of one weight of the adapter; its gradient and optimizer states take the same type."""
    compute_bytes: int = 2
    upcast_rest: bool = False
    """Frozen weights that are not quantised are fp32 (PEFT `prepare_model_for_kbit_training`)."""
    offload: bool = False
    """Shards live in host memory."""
    unsynced_bytes: int = 0
    """Of each element while micro-steps accumulate under FSDP1's `no_sync`: whole gradients, frozen
    weights' as well where one flat parameter mixes both (``use_orig_params``)."""
    kept_by_tool: float = 0.0
    """Bytes a token that the tool's own layer keeps beyond transformers', without recomputation."""


def peak(profile: ActivationProfile, sizes: Sizes, run: Run) -> tuple[float, str]:
    """Return the largest bytes of an optimizer step, and the instant they stand at."""
    found = dict(instants(profile, sizes, run))
    top = max(found, key=lambda name: found[name])
    return found[top], top


def instants(profile: ActivationProfile, sizes: Sizes, run: Run) -> Iterator[tuple[str, float]]:
    """Yield the bytes at the highest moment of each phase of a step and of the optimizer."""
    states = _States(sizes, run)
    walk = _Walk(profile, run, states)
    yield from walk.forward()
    yield from walk.backward()
    yield "optimizer step", states.resting + states.step_gradients + states.step_work


class _States:
    """Bytes that do not depend on the batch."""

    def __init__(self, sizes: Sizes, run: Run) -> None:
        setup = run.setup
        shards = run.shards
        self.sharded = shards > 1
        frozen = run.adapter_elements > 0
        trained = run.adapter_elements if frozen else sizes.total
        width = run.adapter_bytes if frozen else setup.parameter_bytes
        base = _base_bytes(sizes, run)
        scales = _scale_bytes(sizes, setup.quantised) if self.sharded else 0.0
        state = optimizers.state_bytes_per_element(setup.optimizer, width) * trained
        weights = base - scales + (width * trained if frozen else 0)
        self.resting = 0.0 if run.offload else (weights + state) / shards
        self.resting += scales + run.unsynced_bytes * sizes.total
        self.step_gradients = 0.0 if run.offload else width * trained / shards
        self.step_work = 0.0
        if not run.offload:
            self.step_work = optimizers.step_bytes(
                setup.optimizer,
                trained / shards,
                min(sizes.largest, trained) / shards,
                foreach=setup.foreach,
                fused=setup.fused,
                element_bytes=width,
            )
        self.gradient = width / shards if not run.offload else 0.0
        self.root = run.compute_bytes * sizes.root if self.sharded else 0.0
        layer = run.compute_bytes * sizes.layer
        if setup.quantised:
            layer = 0.5 * sizes.layer
        self.layer = layer if self.sharded else 0.0
        self.work = 0.0
        if setup.quantised:
            largest = max(a * b for a, b in sizes.projections.values())
            self.work = quantised.working_bytes(setup.quantised, largest, run.compute_bytes)
        self.unsharded_gradient = run.compute_bytes if self.sharded else 0
        self.root_gradients = 0 if frozen else sizes.root


def _base_bytes(sizes: Sizes, run: Run) -> float:
    setup = run.setup
    if setup.quantised is None:
        return float(setup.parameter_bytes * sizes.total)
    count = sum(inputs * outputs for inputs, outputs in sizes.projections.values())
    rest = sizes.total - count
    stored = quantised.stored_bytes(setup.quantised, sizes.projections)
    return stored + rest * (4 if run.upcast_rest else run.compute_bytes)


def _scale_bytes(sizes: Sizes, kind: Quantised | None) -> float:
    """What is beside the packed weights: not part of the flat parameter."""
    if kind is None:
        return 0.0
    count = sum(inputs * outputs for inputs, outputs in sizes.projections.values())
    return quantised.stored_bytes(kind, sizes.projections) - 0.5 * count


class _Walk:
    """Goes through a profile's phases in the order of a step."""

    def __init__(self, profile: ActivationProfile, run: Run, states: _States) -> None:
        self._profile = profile
        self._states = states
        self._features = features(run.micro_batch_size, run.seq_len, 1)
        self._live = 0.0
        self._finished = 0
        """Elements of gradients of units that are done."""
        frozen = run.adapter_elements > 0
        reentrant = run.setup.key.checkpointing is Checkpointing.REENTRANT
        self._holds_inputs = states.sharded and frozen and reentrant
        self._kept = 0.0
        if run.setup.key.checkpointing is Checkpointing.NONE:
            self._kept = run.kept_by_tool * run.micro_batch_size * run.seq_len

    def forward(self) -> Iterator[tuple[str, float]]:
        """Yield the phases up to the loss."""
        profile, states = self._profile, self._states
        yield self._phase("embedding", profile.embedding_forward, states.root)
        for place, kind in enumerate(profile.layers):
            gathered = states.root + 2 * states.layer + states.work
            yield self._phase(f"layer {place}", profile.kinds[kind].forward, gathered)
            self._live += self._kept
        yield self._phase("head", profile.head_forward, states.root)
        yield self._phase("loss", profile.loss_forward, states.root)

    def backward(self) -> Iterator[tuple[str, float]]:
        """Yield the phases from the loss's backward to the embedding's."""
        profile, states = self._profile, self._states
        gathered = states.root + states.layer
        yield self._phase("loss backward", profile.loss_backward, gathered)
        yield self._phase("head backward", profile.head_backward, gathered)
        if states.sharded:
            # The root's gradients wait unsharded for the embedding's.
            self._live += states.unsharded_gradient * states.root_gradients / 2
            self._finished = 0
        for place in reversed(range(len(profile.layers))):
            layer = profile.kinds[profile.layers[place]]
            gathered = states.root + states.layer * (2 if place else 1) + states.work
            yield self._phase(f"layer {place} backward", layer.backward, gathered)
            self._live -= self._kept
            if self._holds_inputs:
                self._live -= 2 * self._at(layer.backward.end)
        yield self._phase("embedding backward", profile.embedding_backward, states.root)

    def _phase(self, name: str, phase: Phase, gathered: float) -> tuple[str, float]:
        states = self._states
        at_work = states.unsharded_gradient or states.gradient
        top = max(
            (self._at(i.bytes) + at_work * i.gradient_elements for i in phase.peaks), default=0.0
        )
        held = states.resting + gathered + states.gradient * self._finished + self._live
        self._live += self._at(phase.end)
        self._finished += phase.gradient_elements
        return name, held + max(top, 0.0)

    def _at(self, polynomial: Polynomial) -> float:
        return float(self._features @ np.array(polynomial))
