"""From traces at a few sizes to an `ActivationProfile`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from autotune.memory.polynomials import as_polynomial, fit, points
from autotune.memory.profile import ZERO, ActivationProfile, LayerKind, Phase
from autotune.memory.setup import TraceKey
from autotune.runner.experts import register_experts
from autotune.runner.trace import step
from autotune.runner.trace.envelope import envelope
from autotune.runner.trace.ledger import Event, Ledger
from autotune.runner.ulysses import register_attention

_CP = 2
"""Ranks of a sequence in a trace of an exchanged one; the polynomials know the whole length."""
_WHOLE = (1,)
_EXCHANGED = (2, 4, 8)
_LIBRARIES = ("torch", "transformers", "accelerate", "peft")


def trace_profile(config: dict[str, Any], key: TraceKey) -> ActivationProfile:
    """Trace a model under a key.

    Args:
        config: the Hugging Face config with ``model_type``.
        key: what decides the allocations.

    Raises:
        AutotuneError: transformers cannot build the model, or it cannot be traced.
    """
    register_attention()
    register_experts()
    cp = _CP if key.exchanged else 1
    tracer = step.Tracer(config, key, cp)
    sizes = points(*_lengths(config, key.windowed, cp), _batches(key))
    traces = [tracer.run(*size) for size in sizes]
    cps = _EXCHANGED if key.exchanged else _WHOLE
    return _Assembly(tracer, sizes, cp, cps).profile(
        [t.training for t in traces], [t.evaluation for t in traces]
    )


def _lengths(config: dict[str, Any], windowed: bool, cp: int) -> tuple[int, int]:
    """Return the first local length to trace and the step to the others: in the key's regime."""
    window = config.get("sliding_window") or 4096
    if windowed:
        return -(-window // cp) + 64, 64
    # Four lengths, all within the window.
    step_size = max(2, min(64, window // cp // 8 * 2))
    return step_size, step_size


def _batches(key: TraceKey) -> tuple[int, ...]:
    if not key.exchanged:
        return 1, 2, 3
    # Turning heads and tokens about copies nothing where there is one sequence.
    return (1, 1) if key.single else (2, 3, 4)


class _Assembly:
    def __init__(
        self, tracer: step.Tracer, sizes: list[tuple[int, int]], cp: int, cps: tuple[int, ...]
    ) -> None:
        self._tracer = tracer
        self._sizes = sizes
        self._cp = cp
        self._cps = cps

    def profile(self, training: list[Ledger], evaluation: list[Ledger]) -> ActivationProfile:
        cut = self._tracer.cut
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
            evaluation=self._evaluation(evaluation),
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

    def _evaluation(self, ledgers: list[Ledger]) -> Phase:
        """Fit all instants of an evaluation, with what all layers leave behind by then."""
        # A layer's instant counts every other layer's leavings, so as if it came last.
        copies = self._tracer.cut.copies
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
            raise ValueError("the model runs other operators at another size")
    return rows
