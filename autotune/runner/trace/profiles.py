"""From traces at a few sizes to an `ActivationProfile`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from autotune.memory.polynomials import UnlikeError, as_polynomial, fit, points
from autotune.memory.profile import ZERO, ActivationProfile, LayerKind, Phase
from autotune.memory.setup import Attention, Checkpointing, TraceKey
from autotune.runner.experts import register_experts
from autotune.runner.trace import kernels, models, regimes, step
from autotune.runner.trace.envelope import envelope
from autotune.runner.trace.ledger import Event, Ledger
from autotune.runner.ulysses import register_attention

_CP = 2
"""Ranks of a sequence in a trace of an exchanged one; the polynomials know the whole length."""
_WHOLE = (1,)
_EXCHANGED = (2, 4, 8)
_LIBRARIES = ("torch", "transformers", "accelerate", "peft")


def trace_profiles(config: dict[str, Any], keys: Sequence[TraceKey]) -> list[ActivationProfile]:
    """Trace a model under each key.

    Args:
        config: the Hugging Face config with ``model_type``.
        keys: what decides the allocations.

    Raises:
        AutotuneError: transformers cannot build the model, or it cannot be traced.
    """
    register_attention()
    register_experts()
    cuts: dict[tuple[Any, ...], models.Cut] = {}
    evaluations: dict[TraceKey, Phase] = {}
    profiles = []
    for key in keys:
        built = (regimes.WEIGHTS[key.regime], kernels.register(key.attention), key.adapter)
        if built not in cuts:
            dtype, attention, adapter = built
            cuts[built] = models.build(config, dtype=dtype, attention=attention, adapter=adapter)
        assembly = _Assembly(copy.deepcopy(cuts[built]), key, config)
        try:
            profiles.append(assembly.profile(evaluations))
        except UnlikeError:
            assembly.take_less_for_granted()
            profiles.append(assembly.profile(evaluations))
    return profiles


def _lengths(window: int, windowed: bool, cp: int) -> tuple[int, int]:
    """Return the first local length to trace and the step to the others: in the key's regime."""
    if windowed:
        return -(-window // cp) + 64, 64
    # Four lengths, all within the window.
    step_size = max(2, min(64, window // cp // 8 * 2))
    return step_size, step_size


_FROM_ONE, _FROM_TWO, _ALWAYS_ONE = (1, 2, 3), (2, 3, 4), (1, 1)


class _Assembly:
    def __init__(self, cut: models.Cut, key: TraceKey, config: dict[str, Any]) -> None:
        self._cut = cut
        self._key = key
        self._config = config
        self._cp = key.gathered[0] or (_CP if key.exchanged else 1)
        self._cps = _EXCHANGED if key.exchanged else _WHOLE
        self._tracer = step.Tracer(cut, key, self._cp)
        # Turning heads and tokens about copies nothing where there is one sequence.
        batches = _ALWAYS_ONE if key.single else _FROM_TWO if key.exchanged else _FROM_ONE
        masked = key.packed and key.attention is not Attention.RING
        squares = masked or key.windowed or key.attention is Attention.EAGER
        self._sizes = self._make_sizes(batches, squares=squares)

    def take_less_for_granted(self) -> None:
        """Trace several sequences alone, as one takes no more, and look for squares as well."""
        batches = _ALWAYS_ONE if self._key.single else _FROM_TWO
        self._sizes = self._make_sizes(batches, squares=True)

    def _make_sizes(self, batches: tuple[int, ...], *, squares: bool) -> list[tuple[int, int]]:
        own = getattr(self._cut.model.config, "sliding_window", None)
        window = self._config.get("sliding_window") or own or 4096
        lengths = _lengths(window, self._key.windowed, self._cp)
        return points(*lengths, batches, squares=squares)

    def profile(self, evaluations: dict[TraceKey, Phase]) -> ActivationProfile:
        """Trace the key, and its evaluation if no other key had the same.

        Raises:
            UnlikeError: sizes differ in more than a polynomial says.
        """
        # Evaluation computes nothing again.
        same = replace(self._key, checkpointing=Checkpointing.NONE)
        if same not in evaluations:
            evaluations[same] = self._evaluation()
        cut = self._cut
        training = [self._tracer.train(*size) for size in self._sizes]
        layers = []
        for place, layer in enumerate(cut.layers):
            parameters = list(layer.parameters())
            layers.append(
                LayerKind(
                    forward=self._phase(training, step.layer_phase(place, back=False)),
                    backward=self._phase(training, step.layer_phase(place, back=True)),
                    parameter_elements=sum(p.numel() for p in parameters),
                    trainable_elements=sum(p.numel() for p in parameters if p.requires_grad),
                )
            )
        kinds = tuple(dict.fromkeys(layers))
        return ActivationProfile(
            source="traced",
            embedding_forward=self._phase(training, step.EMBEDDING),
            kinds=kinds,
            layers=tuple(kinds.index(layers[place]) for place in cut.stands_for),
            head_forward=self._phase(training, step.HEAD, scaled=True),
            loss_forward=self._phase(training, step.LOSS, scaled=True),
            loss_backward=self._phase(training, step.LOSS_BACK, scaled=True),
            head_backward=self._phase(training, step.HEAD_BACK, scaled=True),
            embedding_backward=self._phase(training, step.EMBEDDING_BACK, scaled=True),
            evaluation=evaluations[same],
            versions=tuple((name, version(name)) for name in _LIBRARIES),
        )

    def _phase(self, ledgers: list[Ledger], name: str, *, scaled: bool = False) -> Phase:
        """Fit a phase.

        Args:
            ledgers: one a size.
            name: of the phase.
            scaled: whether it frees what all layers left, not the layers of the cut model alone.
        """
        phases = [ledger.by_phase().get(name, []) for ledger in ledgers]
        if not any(phases):
            return Phase(end=ZERO, peaks=())
        ends = [ledger.ends[name] for ledger in ledgers]
        rows = _aligned([[*events, end] for events, end in zip(phases, ends, strict=True)])
        values = np.array([[e.scaled if scaled else e.live for e in row] for row in rows], float)
        # The first phase starts from an empty rank, though the batch is there.
        starts = values[:, :1] if name != step.EMBEDDING else 0.0
        polynomials = fit(self._sizes, values - starts, self._cp)
        first = rows[0]
        gradients = [event.gradient_elements for event in first]
        return Phase(
            end=as_polynomial(polynomials[-1]),
            peaks=envelope(polynomials, gradients, [e.operator for e in first], self._cps),
            gradient_elements=gradients[-1],
        )

    def _evaluation(self) -> Phase:
        """Fit all instants of an evaluation, with what all layers leave behind by then."""
        ledgers = [self._tracer.evaluate(*size) for size in self._sizes]
        # A layer's instant counts every other layer's leavings, so as if it came last.
        copies = self._cut.copies
        names = [step.layer_phase(place, back=False) for place in range(len(copies))]
        all_values = []
        for ledger in ledgers:
            by_phase = ledger.by_phase()
            starts = {name: by_phase[name][0].live for name in names}
            left = {name: ledger.ends[name].live - starts[name] for name in names}
            before = ledger.ends[step.EMBEDDING].live + sum(
                n * left[name] for n, name in zip(copies, names, strict=True)
            )
            row = []
            for event in ledger.events:
                if event.phase in left:
                    row.append(before - left[event.phase] + event.live - starts[event.phase])
                else:
                    row.append(event.scaled)
            all_values.append([*row, ledger.ends[step.LOSS].scaled])
        rows = _aligned([[*ledger.events, ledger.ends[step.LOSS]] for ledger in ledgers])
        polynomials = fit(self._sizes, np.array(all_values, float), self._cp)
        operators = [event.operator for event in rows[0]]
        return Phase(
            end=as_polynomial(polynomials[-1]),
            peaks=envelope(polynomials, [0] * len(operators), operators, self._cps),
        )


def _aligned(rows: list[list[Event]]) -> list[list[Event]]:
    """Check that every size ran the same operators."""
    operators = [event.operator for event in rows[0]]
    for row in rows[1:]:
        if [event.operator for event in row] != operators:
            raise UnlikeError("the model runs other operators at another size")
    return rows
