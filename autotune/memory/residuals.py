"""How far real memory lies from the predicted: a small hierarchical model of the log of the ratio.

``log(real / predicted)`` of a run is a sum of effects: of every run alike, of its library, of its
engine with its recomputation, of its model, of the machine, and of a fixed number of bytes that no
formula knows (which weighs less the larger the run). Each has a known spread around 0; what is left
is noise, whose spread the rows themselves tell. So the prediction for a new run is the usual best
linear one of such a model (Henderson, "Best linear unbiased estimation and prediction under a
selection model", Biometrics 31, 1975): few rows move it little, rows of the same engine, model and
machine move it most, and a model or machine not measured yet keeps its own uncertainty.

Two additions. Outliers weigh less (Huber's weights). A run that ran out of memory says that the
real need is above the limit: it enters by the likelihood of that, with the weight and the working
response of a Newton step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.memory.student import Array, normal_hazard, student_cdf, student_quantile_95
from autotune.plan import Engine, Plan

_FILE = Path(__file__).with_name("residuals.json")
_HUBER = 2.5
"""Standard deviations from which a row weighs less."""
_NOISE_DEGREES = 4.0
"""What the stated noise counts for, in rows."""
_ITERATIONS = 12
_MOST_DEGREES = 100.0
_SIZE_STEP = 0.02
_LARGE = 1e6
"""Above every count of size steps: separates layouts in one key."""


class Ruler(StrEnum):
    """What a measured peak is, and what it is compared with."""

    CUDA = "cuda"
    """The caching allocator's reserved bytes, which the limit counts; with `allocator_bytes`."""
    CPU = "cpu"
    """What a CPU process's memory grew by, which the limit counts; with `total_bytes`."""
    CPU_ALLOCATOR = "cpu_allocator"
    """Live bytes by the account of the CPU allocator; with `allocator_bytes`. Benchmarks only."""


def ruler_of(*, on_cpu: bool) -> Ruler:
    """Return what trials measure by."""
    return Ruler.CPU if on_cpu else Ruler.CUDA


def engine_label(plan: Plan) -> str:
    """Return ``ddp``, ``fsdp2`` or ``zero1`` to ``zero3``."""
    return f"zero{plan.zero_stage}" if plan.engine is Engine.DEEPSPEED else str(plan.engine)


@dataclass(frozen=True, slots=True)
class Row:
    """A measured run."""

    engine: str
    """Of `engine_label`."""
    recompute: str
    model: str
    """Any name; equal for runs of one model."""
    predicted_bytes: int
    log_ratio: float
    """log(real / predicted); a lower bound where `exceeded`."""
    exceeded: bool = False
    """It ran out of memory: the real need is above what there was."""
    here: bool = True
    """Measured on the machine asked about; the committed records were not."""

    @classmethod
    def measured(
        cls,
        engine: str,
        recompute: str,
        model: str,
        predicted_bytes: int,
        real_bytes: int,
        *,
        exceeded: bool,
    ) -> Row:
        """Compare a run of this machine with its prediction, both in bytes of the ruler."""
        ratio = math.log(real_bytes / predicted_bytes)
        return cls(engine, recompute, model, predicted_bytes, ratio, exceeded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Standard deviations of the effects on the log of the ratio."""

    shared: float
    library: float
    group: float
    """Of an engine with its recomputation."""
    model: float
    machine: float
    fixed: float
    """Of the multiple of `fixed_bytes` that is missing, for each library."""
    machine_fixed: float
    """Of what a machine adds to that multiple."""
    noise: float
    fixed_bytes: int
    degrees: float
    """How well the spreads of the effects are known: about the number of models behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """Distribution of log(real / predicted) of one run: Student's t."""

    source: str
    """What it rests on."""
    count: int
    """Measured runs behind it."""
    bias: float
    """Its middle: 0 where nothing was measured."""
    scale: float
    degrees: float

    @property
    def interval(self) -> tuple[float, float]:
        """90% interval of real / predicted."""
        half = float(student_quantile_95(self.degrees)) * self.scale
        return math.exp(self.bias - half), math.exp(self.bias + half)

    def chance_below(self, ratio: float) -> float:
        """Return P(real / predicted <= ratio)."""
        if ratio <= 0:
            return 0.0
        return float(student_cdf((math.log(ratio) - self.bias) / self.scale, self.degrees))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rows as codes and numbers."""

    library: Array
    group: Array
    model: Array
    here: Array
    fixed: Array
    """Log of the ratio that `fixed_bytes` more would make."""


class Residuals:
    """The residuals of one ruler, fitted once and asked often."""

    def __init__(self, rows: Sequence[Row], spread: Spread, source: str) -> None:
        self._spread = spread
        self.source = source
        self.count = sum(not row.exceeded for row in rows)
        self._codes: dict[str, int] = {}
        self._known = self._columns(
            [row.engine for row in rows],
            [row.recompute for row in rows],
            [row.model for row in rows],
            np.array([row.predicted_bytes for row in rows], float),
            np.array([row.here for row in rows], float),
        )
        y = np.array([row.log_ratio for row in rows], float)
        exceeded = np.array([row.exceeded for row in rows], bool)
        self._measured, self._exceeded = y, exceeded
        self._fit(y, exceeded)

    @classmethod
    def known(cls, ruler: Ruler, here: Sequence[Row] = ()) -> Residuals:
        """Return what the committed records say, and rows measured on the machine asked about."""
        if not here:
            return _of_records(ruler)
        spread, _, rows = _committed(ruler)
        return cls([*rows, *here], spread, "trials on this machine")

    def predict(self, plan: Plan, model: str, predicted_bytes: int) -> Residual:
        """Return the distribution for one run on the machine asked about."""
        bias, scale, degrees = self.predict_many(
            [engine_label(plan)], [str(plan.recompute)], model, np.array([predicted_bytes], float)
        )
        return Residual(
            source=self.source,
            count=self.count,
            bias=float(bias[0]),
            scale=float(scale[0]),
            degrees=float(degrees[0]),
        )

    def predict_many(
        self,
        engines: Sequence[str],
        recompute: Sequence[str],
        model: str,
        predicted_bytes: Array,
    ) -> tuple[Array, Array, Array]:
        """Return bias, scale and degrees of freedom for each of many runs of one model."""
        count = len(predicted_bytes)
        wanted = self._columns(engines, recompute, [model] * count, predicted_bytes, np.ones(count))
        prior = self._own_variance(wanted)
        if self._alpha.size:
            shared = self._covariance(wanted, self._known)
            bias = shared @ self._alpha
            explained = np.einsum("ij,jk,ik->i", shared, self._precision, shared)
        else:
            bias, explained = np.zeros(count), np.zeros(count)
        effects = np.maximum(0.0, prior - explained)
        scale = np.sqrt(effects + self._noise)
        # Satterthwaite: degrees of freedom of a sum of two estimated variances.
        degrees = scale**4 / (
            effects**2 / self._spread.degrees + self._noise**2 / self._noise_degrees
        )
        return bias, scale, np.minimum(degrees, _MOST_DEGREES)

    def predict_columns(
        self,
        engines: Sequence[str],
        recompute: Sequence[str],
        layout: NDArray[np.int64],
        model: str,
        predicted_bytes: Array,
    ) -> tuple[Array, Array, Array]:
        """Return the same for any number of plans of few layouts.

        Sizes are rounded to 2%, within which nothing here changes.

        Args:
            engines: Of each layout.
            recompute: Of each layout.
            layout: Of each plan, the index into these.
            model: Of all of them.
            predicted_bytes: Of each plan.
        """
        steps = np.round(np.log(predicted_bytes) / _SIZE_STEP)
        keys = layout * _LARGE + steps
        kinds, place = np.unique(keys, return_inverse=True)
        of = (kinds // _LARGE).astype(int)
        found = self.predict_many(
            [engines[i] for i in of],
            [recompute[i] for i in of],
            model,
            np.exp((kinds % _LARGE) * _SIZE_STEP),
        )
        bias, scale, degrees = (values[place] for values in found)
        return bias, scale, degrees

    def log_likelihood(self) -> float:
        """Return how likely the measured rows are under the stated spreads; for choosing these."""
        rows = ~self._exceeded
        shared = self._covariance(self._known, self._known)[np.ix_(rows, rows)]
        covariance = shared + self._spread.noise**2 * np.eye(len(shared))
        missed = self._measured[rows]
        _, log_determinant = np.linalg.slogdet(covariance)
        return float(-(missed @ np.linalg.solve(covariance, missed) + log_determinant) / 2)

    def _fit(self, y: Array, exceeded: NDArray[np.bool_]) -> None:
        stated = self._spread.noise**2
        noise, degrees = stated, _NOISE_DEGREES
        shared = self._covariance(self._known, self._known)
        weights, response = np.ones_like(y), y.copy()
        self._precision: Array = np.zeros((0, 0))
        self._alpha: Array = np.zeros(0)
        for _ in range(_ITERATIONS if y.size else 0):
            self._precision = np.asarray(np.linalg.inv(shared + np.diag(noise / weights)), float)
            self._alpha = self._precision @ response
            fitted = shared @ self._alpha
            leverage = np.einsum("ij,ji->i", shared, self._precision)
            seen = ~exceeded
            missed = (y - fitted)[seen]
            weights[seen] = np.minimum(
                1.0, _HUBER * math.sqrt(noise) / np.maximum(np.abs(missed), 1e-12)
            )
            degrees = _NOISE_DEGREES + max(0.0, float(np.sum(1 - leverage[seen])))
            # Huber's proposal 2: outliers count as far as the weights let them.
            noise = float(
                (_NOISE_DEGREES * stated + np.sum((weights[seen] * missed) ** 2)) / degrees
            )
            deviation = math.sqrt(noise)
            short = (y - fitted)[exceeded] / deviation
            hazard = normal_hazard(short)
            # Observed information of "above the limit", 0 where that was expected anyway.
            weights[exceeded] = np.clip(hazard * (hazard - short), 1e-9, 1.0)
            response[exceeded] = fitted[exceeded] + deviation * hazard / weights[exceeded]
        self._noise, self._noise_degrees = noise, degrees

    def _columns(
        self,
        engines: Sequence[str],
        recompute: Sequence[str],
        models: Sequence[str],
        predicted_bytes: Array,
        here: Array,
    ) -> _Columns:
        def codes(words: Sequence[str]) -> Array:
            return np.array(
                [self._codes.setdefault(word, len(self._codes)) for word in words], float
            )

        return _Columns(
            library=codes([engine.rstrip("123") for engine in engines]),
            group=codes([f"{e} {r}" for e, r in zip(engines, recompute, strict=True)]),
            model=codes([f"model {model}" for model in models]),
            here=here,
            fixed=np.log1p(self._spread.fixed_bytes / predicted_bytes),
        )

    def _covariance(self, one: _Columns, other: _Columns) -> Array:
        spread = self._spread

        def same(name: str) -> Array:
            return np.asarray(np.equal.outer(getattr(one, name), getattr(other, name)), float)

        machine = same("here")
        fixed = spread.fixed**2 + spread.machine_fixed**2 * machine
        return np.asarray(
            spread.shared**2
            + same("library") * (spread.library**2 + fixed * np.outer(one.fixed, other.fixed))
            + same("group") * spread.group**2
            + same("model") * spread.model**2
            + machine * spread.machine**2
        )

    def _own_variance(self, wanted: _Columns) -> Array:
        spread = self._spread
        effects = ("shared", "library", "group", "model", "machine")
        known = sum(float(getattr(spread, name)) ** 2 for name in effects)
        fixed = spread.fixed**2 + spread.machine_fixed**2
        return np.asarray(known + fixed * wanted.fixed**2)


@cache
def _of_records(ruler: Ruler) -> Residuals:
    spread, source, rows = _committed(ruler)
    return Residuals(rows, spread, source)


@cache
def _committed(ruler: Ruler) -> tuple[Spread, str, tuple[Row, ...]]:
    """Read what ships: benchmarks/memory/residuals.py writes it."""
    entry = json.loads(_FILE.read_text(encoding="utf-8"))[ruler]
    names = [field.name for field in fields(Row)][:6]
    rows = tuple(
        Row(**dict(zip(names, values, strict=True)), here=False) for values in entry["rows"]
    )
    return Spread(**entry["spread"]), entry["source"], rows
