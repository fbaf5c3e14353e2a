"""What the compositions share: the plans they are for, places in a step, and their interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.memory.optimizers import state_bytes_per_element, step_bytes
from autotune.memory.setup import Setup
from autotune.memory.sizes import Sizes

Array = NDArray[np.float64]
Bytes = Any
"""A number, or an array with one number a plan."""
FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Runs:
    """Plans that differ only in numbers; every array has one entry a plan."""

    setup: Setup
    on_cpu: bool
    """Ranks are CPU processes: gloo's copies count, offloaded states stay, nothing overlaps."""
    offload_optimizer: bool
    offload_params: bool
    reshard: bool
    shards: Array
    """Ranks one copy of the states is spread over."""
    world: Array
    steps: Array
    """Micro-steps of an optimizer step."""
    bucket: Array
    """Elements of DeepSpeed's buckets."""
    hpz: int = 1
    """ZeRO-3: ranks that hold a second copy of the parameters between them; 1: there is none."""


class Work(NamedTuple):
    """What an engine holds at a moment, beyond what it always holds; bytes."""

    gradients: Bytes = 0.0
    gathered: Bytes = 0.0
    """Unsharded copies of parameters."""
    temporaries: Bytes = 0.0
    """Copies that a reduction or an update works on."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """A unit of the model (embedding, a layer, the tail of norm and head) and what lies around it.

    Numbers, or arrays with one number a plan; elements of parameters.
    """

    kind: str
    """``embedding``, ``layer`` or ``tail``."""
    unit: Bytes
    unit_trainable: Bytes
    before: Bytes
    """The unit that runs forward just before; 0 where there is none."""
    after: Bytes
    """The unit that runs forward just after."""
    after_trainable: Bytes
    below: Bytes
    """All units that run forward before."""
    above: Bytes
    """All units that run forward after."""
    first: bool | Array
    """Whether it is the first layer."""
    finished: Bytes
    """Trained elements whose gradients are finished when this unit's backward begins."""


class EngineMemory(ABC):
    """Bytes of one engine on the rank that needs most.

    The model's own tensors are not in it: activations, gradients before they are finished, casts.
    """

    def __init__(self, sizes: Sizes, runs: Runs) -> None:
        self.sizes = sizes
        self.runs = runs
        self.setup = runs.setup
        self.width = runs.setup.compute_bytes
        self.states = state_bytes_per_element(self.setup.optimizer, self.setup.state_bytes)

    @abstractmethod
    def resting(self) -> dict[str, Bytes]:
        """Return what is there between two steps: parameters, optimizer, gradients, buckets."""

    def host(self) -> Bytes:
        """Return what offloading keeps in host memory; on CPU ranks it is in `resting`."""
        return 0.0

    def held(self) -> Bytes:
        """Return gradients of earlier micro-steps while a later one runs forward."""
        return 0.0

    def enter(self, place: Place) -> Work:
        """Return what is there when a unit's forward is about to begin."""
        del place
        return Work()

    def forward(self, place: Place) -> Work:
        """Return what is there while a unit runs forward."""
        del place
        return Work()

    def loss(self) -> Work:
        """Return what is there while the loss is computed, forward and back."""
        return Work()

    @abstractmethod
    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return what is there while a unit runs backward.

        Args:
            place: the unit.
            inside: trained elements of the unit whose gradients are finished by then.
            later: in the last of several micro-steps; otherwise in the first.
        """

    def arrive(self, place: Place, *, later: bool) -> Work | None:
        """Return what is there when a unit's backward is about to begin; None: nothing special."""
        del place, later
        return None

    def turn(self) -> Array | None:
        """Return the finished elements from which a rank's gradients grow no more, if any."""
        return None

    def leave(self, place: Place, *, later: bool) -> Work:
        """Return what is there when a unit's backward has ended and its gradients are reduced."""
        return self.backward(place, place.unit_trainable, later=later)

    @abstractmethod
    def finish(self, *, later: bool) -> Work:
        """Return what is there at the end of a micro-step, activations gone."""

    @abstractmethod
    def step(self) -> Work:
        """Return what is there while the optimizer steps."""

    def evaluation(self) -> Work:
        """Return what is there at the highest instant of an evaluation."""
        return Work(gathered=self.loss().gathered)

    def gather(self) -> tuple[Bytes, Bytes]:
        """Return device and host bytes of gathering the weights to save them (rank 0)."""
        return 0.0, self.setup.parameter_bytes * self.sizes.total

    def optimizer_bytes(self, elements: Bytes) -> Bytes:
        """Return the optimizer's states of so many trained elements, master weights included."""
        return (self.states + FP32 * self.setup.master_weights) * elements

    def step_temporaries(self, elements: Bytes, largest: Bytes, before: Bytes = 0.0) -> Bytes:
        """Return what the optimizer allocates while it steps."""
        return step_bytes(
            self.setup.optimizer,
            elements,
            largest,
            foreach=self.setup.foreach,
            fused=self.setup.fused,
            element_bytes=FP32 if self.setup.master_weights else self.setup.parameter_bytes,
            before=before,
        )

    def step_over_parameters(self) -> Bytes:
        """Return what the optimizer allocates while it steps over shards of the parameters."""
        size = self.sizes
        layer = self.shard(size.largest_layer_parameter)
        root = self.shard(size.embedding * size.all_train)
        every = self.shard(size.trainable)
        # The embedding comes first, an untied head after the layers, and equal ones in a row.
        return np.maximum(
            self.step_temporaries(every, root, 0.0 if size.tied else layer),
            self.step_temporaries(every, layer, layer),
        )

    def shard(self, elements: Bytes) -> Bytes:
        """Return a rank's part of elements."""
        return elements / self.runs.shards


def single_parameter(sizes: Sizes, kind: str) -> float:
    """Return the largest trained parameter of a unit of a kind."""
    if kind == "layer":
        return sizes.largest_layer_parameter
    return (sizes.head if kind == "tail" else sizes.embedding) * sizes.all_train
