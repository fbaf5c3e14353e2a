"""The moments of a step at which a rank can need most: a model's tensors and an engine's together.

A step is walked through in order. The model's bytes at the start of a phase are the sum of what
the phases before left; within a layer only the layers count that can be the highest: of each kind
the first, the last and, where an engine's gradients stop growing in between, that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.memory.engines import EngineMemory
from autotune.memory.engines.base import Bytes, Place, Work
from autotune.memory.profile import ActivationProfile, Phase
from autotune.memory.sizes import Sizes

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What is alive at once, beside what always is; bytes, one number a plan.

    Or ``[instants, plans]``, of instants of one name.
    """

    instant: str
    activations: Bytes
    """Of the layers, with what their backward works on."""
    logits: Bytes
    """Of head and loss."""
    work: Work

    @property
    def total(self) -> Bytes:
        """All of it."""
        work = self.work
        model = self.activations + self.logits
        return model + work.gradients + work.gathered + work.temporaries

    def instants(self) -> Iterator[Moment]:
        """Yield them one by one, each with one number a plan."""
        parts = (self.activations, self.logits, *self.work)
        together = [np.atleast_2d(np.asarray(part, float)) for part in parts]
        for index in range(max(map(len, together))):
            activations, logits, *work = (part[min(index, len(part) - 1)] for part in together)
            yield Moment(self.instant, activations, logits, Work(*work))


@dataclass(frozen=True, eq=False)
class Walk:
    """A model under one trace key, its engine, and the monomials of the plans' sizes.

    What the phases share (starts of layers, places, peaks) is worked out once.
    """

    profile: ActivationProfile
    sizes: Sizes
    engine: EngineMemory
    features: Array
    """``[plans, len(FEATURES)]``."""

    def moments(self) -> Iterator[Moment]:
        """Yield the moments of a step; of later micro-steps also for plans that have none."""
        yield from self._micro_step(later=False)
        if bool((self.engine.runs.steps > 1).any()):
            yield from self._micro_step(later=True)
        yield Moment("optimizer_step", self._left(), 0.0, self.engine.step())
        yield from self._evaluation()

    def _evaluation(self) -> Iterator[Moment]:
        """Yield the highest instant without autograd, and the engine's turns between units."""
        profile, engine = self.profile, self.engine
        level, last = self._end(profile.embedding_forward), self._layer(len(profile.layers) - 1)
        for instant in profile.evaluation.peaks:
            in_loss = any(name in instant.operator for name in ("nll_loss", "log_softmax"))
            work = engine.evaluation() if in_loss else engine.forward(last)
            yield Moment("evaluation", self.features @ np.array(instant.bytes), 0.0, work)
        for place in (self._layer(0), last, self._tail()):
            yield Moment("evaluation", level, 0.0, engine.enter(place))
            yield Moment("evaluation", level, 0.0, engine.forward(place))

    def _micro_step(self, *, later: bool) -> Iterator[Moment]:
        prefix = "later_" if later else ""
        for moment in (*self._forward(), *self._backward(later=later)):
            if later and moment.instant in ("forward", "forward_end", "loss"):
                work = moment.work._replace(gradients=moment.work.gradients + self.engine.held())
                yield Moment(prefix + moment.instant, moment.activations, moment.logits, work)
            else:
                yield Moment(
                    prefix + moment.instant, moment.activations, moment.logits, moment.work
                )

    def _forward(self) -> Iterator[Moment]:
        profile, engine = self.profile, self.engine
        place = self._embedding()
        yield Moment("forward", 0.0, 0.0, engine.enter(place))
        yield from self._peaks("forward", profile.embedding_forward, 0.0, engine.forward(place))
        for index in self._candidates:
            kind = profile.kinds[profile.layers[index]]
            level, place = self.features @ self._forward_starts[index], self._layer(index)
            yield Moment("forward", level, 0.0, engine.enter(place))
            yield from self._peaks("forward", kind.forward, level, engine.forward(place))
        kept, place = self._kept, self._tail()
        yield Moment("forward", kept, 0.0, engine.enter(place))
        level = 0.0
        head, loss = engine.forward(place), engine.loss()
        yield from self._peaks("forward_end", profile.head_forward, kept, head, level)
        level = level + self._end(profile.head_forward)
        yield from self._peaks("loss", profile.loss_forward, kept, loss, level)
        level = level + self._end(profile.loss_forward)
        yield from self._peaks("loss", profile.loss_backward, kept, loss, level)

    def _backward(self, *, later: bool) -> Iterator[Moment]:
        profile, engine = self.profile, self.engine
        kept = self._kept
        phases = (profile.head_forward, profile.loss_forward, profile.loss_backward)
        level = sum(map(self._end, phases))
        place, phase = self._tail(), profile.head_backward
        yield from self._back("head_backward", place, phase, kept, level, later=later)
        yield from self._boundary("head_backward", place, phase, kept, level, later=later)
        starts = self._backward_starts
        for kind, index in self._backward_candidates():
            phase = profile.kinds[kind].backward
            place, level = self._layer(index), self._level(starts, index)
            yield from self._back("backward", place, phase, level, 0.0, later=later)
            yield from self._boundary("backward", place, phase, level, 0.0, later=later)
        place, phase = self._embedding(), profile.embedding_backward
        level = self.features @ starts[-1]
        yield from self._back("backward_end", place, phase, level, 0.0, later=later)
        yield Moment("backward_end", self._left(), 0.0, engine.finish(later=later))

    def _back(
        self, name: str, place: Place, phase: Phase, kept: Bytes, level: Bytes, *, later: bool
    ) -> Iterator[Moment]:
        """Yield a backward phase's instants, together, with the gradients finished by then."""
        if not phase.peaks:
            return
        inside = np.array([[instant.gradient_elements] for instant in phase.peaks], float)
        work = self.engine.backward(place, inside, later=later)
        yield self._moment(name, kept, level + self._instants(phase), work)

    def _boundary(
        self, name: str, place: Place, phase: Phase, kept: Bytes, level: Bytes, *, later: bool
    ) -> Iterator[Moment]:
        """Yield what a unit's backward begins and ends with."""
        arriving = self.engine.arrive(place, later=later)
        if arriving is not None:
            yield self._moment(name, kept, level, arriving)
        leaving = self.engine.leave(place, later=later)
        yield self._moment(name, kept, level + self._end(phase), leaving)

    def _peaks(
        self, name: str, phase: Phase, kept: Bytes, work: Work, level: Bytes = 0.0
    ) -> Iterator[Moment]:
        yield self._moment(name, kept, level + self._highest(phase), work)

    def _moment(self, name: str, kept: Bytes, rest: Bytes, work: Work) -> Moment:
        logits = name in ("forward_end", "loss", "head_backward")
        if not logits:
            return Moment(name, kept + rest, 0.0, work)
        return Moment(name, kept, rest, work)

    def _left(self) -> Bytes:
        """Return what outlives backward: the masks of the last micro-batch."""
        end = self._backward_starts[-1] + np.array(self.profile.embedding_backward.end)
        return np.maximum(self.features @ end, 0.0)

    def _highest(self, phase: Phase) -> Bytes:
        if not phase.peaks:
            return np.zeros(len(self.features))
        return self._instants(phase).max(axis=0)

    def _instants(self, phase: Phase) -> Array:
        """Return the bytes of a phase's peaks, ``[peaks, plans]``."""
        return np.array([instant.bytes for instant in phase.peaks]) @ self.features.T

    def _end(self, phase: Phase) -> Bytes:
        return self.features @ np.array(phase.end)

    @cached_property
    def _kept(self) -> Bytes:
        """Return what the layers' forward leaves for backward."""
        return self.features @ self._forward_starts[-1]

    @cached_property
    def _forward_starts(self) -> Array:
        """Return the polynomials at the start of each layer and at the end of the last."""
        profile = self.profile
        ends = [profile.kinds[i].forward.end for i in profile.layers]
        return np.cumsum(np.array([profile.embedding_forward.end, *ends]), axis=0)

    @cached_property
    def _backward_starts(self) -> Array:
        """Return the polynomials at the start of each layer's backward, and at the first's end."""
        profile = self.profile
        top = self._forward_starts[-1] + sum(
            np.array(phase.end)
            for phase in (
                profile.head_forward,
                profile.loss_forward,
                profile.loss_backward,
                profile.head_backward,
            )
        )
        ends = np.array([profile.kinds[i].backward.end for i in profile.layers])
        above = np.cumsum(ends[::-1], axis=0)[::-1]
        after = np.vstack([above[1:], np.zeros((1, ends.shape[1]))])
        return np.vstack([top + after, top + above[:1]])

    @cached_property
    def _candidates(self) -> list[int]:
        """Return the layers that can be highest."""
        layers = self.profile.layers
        return sorted(
            {layers.index(kind) for kind in set(layers)}
            | {len(layers) - 1 - layers[::-1].index(kind) for kind in set(layers)}
        )

    def _backward_candidates(self) -> Iterator[tuple[int, Any]]:
        """Yield kinds and layers; a layer may be another for each plan."""
        layers = self.profile.layers
        yield from ((layers[index], index) for index in self._candidates)
        turn = self.engine.turn()
        if turn is None:
            return
        finished = self._layers["finished"]
        for kind in dict.fromkeys(layers):
            own = np.flatnonzero(np.array(layers) == kind)
            # The layer of its kind in whose backward that much is finished, and the one above.
            rank = np.searchsorted(-finished[own], -turn, side="right")
            for place in (rank, rank + 1):
                yield kind, own[np.clip(place, 0, len(own) - 1)]

    def _level(self, starts: Array, index: Any) -> Bytes:
        return (self.features * starts[index]).sum(axis=-1)

    def _embedding(self) -> Place:
        size = self.sizes
        trained = size.embedding * size.all_train
        return Place(
            kind="embedding", unit=size.embedding, unit_trainable=trained, before=0.0,
            after=size.layers[0], after_trainable=size.layers_trainable[0], below=0.0,
            above=size.total - size.embedding, first=False, finished=size.trainable - trained,
        )  # fmt: skip

    @cached_property
    def _layers(self) -> dict[str, Array]:
        """Return what a `Place` says of each layer, ``[layers]`` each."""
        size = self.sizes
        layers, trained = np.asarray(size.layers), np.asarray(size.layers_trainable)
        tail = size.head + size.norm
        return {
            "unit": layers,
            "unit_trainable": trained,
            "before": np.append([size.embedding], layers[:-1]),
            "after": np.append(layers[1:], tail),
            "after_trainable": np.append(trained[1:], tail * size.all_train),
            "below": size.embedding + np.cumsum(layers) - layers,
            "above": tail + layers.sum() - np.cumsum(layers),
            "finished": tail * size.all_train + trained.sum() - np.cumsum(trained),
        }

    def _layer(self, index: Any) -> Place:
        here = {name: of_layer[index] for name, of_layer in self._layers.items()}
        return Place(kind="layer", first=np.equal(index, 0), **here)

    def _tail(self) -> Place:
        size = self.sizes
        unit = size.head + size.norm
        return Place(
            kind="tail", unit=unit, unit_trainable=unit * size.all_train, before=size.layers[-1],
            after=0.0, after_trainable=0.0, below=size.total - unit, above=0.0, first=False,
            finished=0.0,
        )  # fmt: skip


def plain(value: Any, index: int) -> int:
    """Return one plan's bytes of a number or an array."""
    array = np.asarray(value, float)
    return round(float(array if array.ndim == 0 else array[index]))
