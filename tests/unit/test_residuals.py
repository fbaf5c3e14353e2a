"""The spread of real over predicted memory: known distributions, outliers, runs out of memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotune.memory import residuals
from autotune.memory.residuals import Residual, Residuals, Row, Ruler, Spread, engine_label
from autotune.memory.student import normal_cdf, normal_hazard, student_cdf, student_quantile_95
from autotune.plan import Engine, Plan, Recompute
from autotune.units import GIB

SPREAD = Spread(
    shared=0.04, library=0.03, group=0.02, model=0.03, machine=0.02, fixed=1.0,
    machine_fixed=0.0, noise=0.02, fixed_bytes=64 * 2**20, degrees=6,
)  # fmt: skip
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PLAN = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2)


# Two-sided 90% points and one-sided probabilities of any table of Student's t.
@pytest.mark.parametrize(
    ("degrees", "point"), [(3, 2.353), (4, 2.132), (5, 2.015), (10, 1.812), (30, 1.697)]
)
def test_quantiles_are_those_of_the_tables(degrees, point):
    assert student_quantile_95(degrees) == pytest.approx(point, rel=0.005)
    assert student_cdf(point, degrees) == pytest.approx(0.95, abs=0.001)
    assert student_cdf(-point, degrees) == pytest.approx(0.05, abs=0.001)


def test_normal_tails():
    assert normal_cdf([0, 1.959964, -1.644854]) == pytest.approx([0.5, 0.975, 0.05], abs=1e-6)
    # Density over upper tail at 0 and 2; beyond 4 the expansion, which joins on.
    assert normal_hazard([0, 2]) == pytest.approx([0.797885, 2.373216], rel=1e-4)
    assert normal_hazard(3.999) == pytest.approx(float(normal_hazard(4.0)), rel=0.01)


def row(log_ratio, *, engine="zero2", recompute="none", model="m", size=8 * GIB, **values):
    return Row(engine, recompute, model, size, log_ratio, **values)


def predict(rows, *, model="m", size=8 * GIB, spread=SPREAD) -> Residual:
    return Residuals(rows, spread, "test").predict(PLAN, model, size)


def test_nothing_measured_corrects_nothing():
    prior = predict([])
    assert prior.bias == 0 and prior.count == 0
    effects = math.sqrt(sum(s**2 for s in (0.04, 0.03, 0.02, 0.03, 0.02, 0.02)))
    assert prior.scale == pytest.approx(effects, rel=0.01)
    assert prior.chance_below(1.0) == pytest.approx(0.5, abs=1e-6)
    low, high = prior.interval
    assert low == pytest.approx(1 / high)


def test_few_rows_are_shrunk_and_many_are_believed():
    biases = [predict([row(0.1)] * count).bias for count in (1, 3, 30)]
    assert 0.05 < biases[0] < biases[1] < biases[2] < 0.1
    assert biases[2] == pytest.approx(0.1, abs=0.005)
    scales = [predict([row(0.1)] * count).scale for count in (0, 1, 3, 30)]
    assert scales == sorted(scales, reverse=True)


def test_a_row_says_most_about_its_own_kind():
    rows = [row(0.1)] * 5
    fitted = Residuals(rows, SPREAD, "test")
    plans = {
        "own": (PLAN, "m"),
        "recomputed": (Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2,
                            recompute=Recompute.FULL), "m"),
        "model": (PLAN, "other"),
        "engine": (Plan(strategy="fsdp2", engine=Engine.FSDP2), "other"),
    }  # fmt: skip
    found = {name: fitted.predict(plan, model, 8 * GIB) for name, (plan, model) in plans.items()}
    assert found["own"].bias > found["recomputed"].bias > found["engine"].bias > 0
    assert found["own"].bias > found["model"].bias > found["engine"].bias
    assert found["own"].scale < found["model"].scale < found["engine"].scale


def test_records_of_another_machine_leave_the_machines_own_spread():
    here = predict([row(0.1)] * 30)
    elsewhere = predict([row(0.1, here=False)] * 30)
    assert elsewhere.scale**2 - here.scale**2 == pytest.approx(2 * 0.02**2, rel=0.3)


def test_a_fixed_number_of_bytes_weighs_less_on_a_large_run():
    missing = 60 * 2**20
    rows = [
        row(math.log1p(missing / size), size=size) for size in (2**27, 2**27 * 3 // 2, 2**28, 2**29)
    ]
    for size in (3 * 2**27, 2**32):
        found = predict(rows, size=size)
        assert found.bias == pytest.approx(math.log1p(missing / size), abs=0.03)


def test_a_library_may_need_other_fixed_bytes_on_this_machine():
    """Two engines of another machine, of which one is measured here as well."""
    spread = replace(SPREAD, machine_fixed=0.5)
    sizes = [2**26, 2**27, 2**28]

    def small(engine, mebibytes, here):
        ratios = [(size, math.log1p(mebibytes * 2**20 / size)) for size in sizes]
        return [row(ratio, engine=engine, size=size, here=here) for size, ratio in ratios]

    elsewhere = [*small("zero2", 70, False), *small("fsdp2", 40, False)]
    found = predict([*elsewhere, *small("fsdp2", 20, True)], size=2**26, spread=spread)
    low, high = found.interval
    assert low < 1 + 40 / 64 and 1 + 70 / 64 < high, "what another library needs here is open"
    measured = predict([*elsewhere, *small("zero2", 40, True)], size=2**26, spread=spread)
    assert measured.bias == pytest.approx(math.log1p(40 / 64), abs=0.1)
    assert measured.scale < 0.5 * found.scale


def test_an_outlier_does_not_carry_the_estimate():
    clean = [row(0.02 + 0.01 * (-1) ** k) for k in range(12)]
    found = predict([*clean, row(1.5)])
    assert found.bias == pytest.approx(predict(clean).bias, abs=0.01)


def test_running_out_of_memory_is_a_bound_from_below():
    rows = [row(0.0)] * 2
    unmoved = predict([*rows, row(-0.5, exceeded=True)])
    assert unmoved.bias == pytest.approx(predict(rows).bias, abs=1e-3)
    assert unmoved.scale == pytest.approx(predict(rows).scale, rel=0.02)
    raised = [predict([*rows, row(bound, exceeded=True)]).bias for bound in (0.05, 0.1)]
    assert predict(rows).bias + 0.01 < raised[0] < raised[1] < 0.1
    assert predict([row(0.1, exceeded=True)]).count == 0


def simulated(rng, models: int, per_model: int, noise_degrees: float | None):
    """Draw runs from the very model, on one machine."""

    def normal(spread):
        return float(rng.normal(0, spread))

    shared, machine = normal(SPREAD.shared), normal(SPREAD.machine)
    library = {name: normal(SPREAD.library) for name in ("ddp", "zero", "fsdp")}
    group = {(e, r): normal(SPREAD.group) for e in ENGINES for r in ("none", "full")}
    runs = []
    for number in range(models):
        own = normal(SPREAD.model)
        for _ in range(per_model):
            engine, recompute = str(rng.choice(ENGINES)), str(rng.choice(["none", "full"]))
            noise = (
                rng.normal() if noise_degrees is None else rng.standard_t(noise_degrees)
            ) * SPREAD.noise
            effects = shared + machine + own + library[engine.rstrip("123")]
            runs.append(
                Row(
                    engine,
                    recompute,
                    f"m{number}",
                    2**40,
                    effects + group[engine, recompute] + noise,
                )
            )
    return runs


@pytest.mark.parametrize("noise_degrees", [None, 4], ids=["normal", "heavy tails"])
@pytest.mark.parametrize(("models", "per_model"), [(1, 1), (1, 4), (2, 10), (6, 12)])
def test_the_interval_covers(models, per_model, noise_degrees):
    """A run of a new model: the interval holds it in 85% to 97% of 400 draws of everything."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        *known, asked = simulated(rng, models + 1, per_model, noise_degrees)[
            : models * per_model + 1
        ]
        bias, scale, degrees = Residuals(known, SPREAD, "test").predict_many(
            [asked.engine], [asked.recompute], asked.model, np.array([asked.predicted_bytes], float)
        )
        half = student_quantile_95(degrees) * scale
        inside += bool(abs(asked.log_ratio - bias[0]) <= half[0])
    assert 0.85 <= inside / 400 <= 0.97


@pytest.mark.parametrize("ruler", list(Ruler))
def test_the_committed_file_is_complete(ruler):
    known = Residuals.known(ruler).predict(PLAN, "never measured", 8 * GIB)
    low, high = known.interval
    assert 0.3 < low < 1 < high < 3
    if known.count == 0:
        assert known.source.startswith("assumed") and known.bias == 0


def test_the_demonstrations_trials_are_foreseen_from_a_few_of_them():
    """Real CPU trials: five of a study foretell the others, bias of a small model included."""
    file = Path(__file__).parents[2] / "reports/examples/demo-2-cpu-ranks/trials.jsonl"
    if not file.exists():
        pytest.skip("the examples are not part of an installed package")
    rows = []
    for line in file.read_text().splitlines():
        trial = json.loads(line)
        plan = Plan.from_dict(trial["plan"])
        if trial["outcome"] == "ok":
            rows.append(
                Row.measured(
                    engine_label(plan), str(plan.recompute), "tiny", trial["predicted_bytes"],
                    trial["peak_reserved_bytes"], exceeded=False,
                )
            )  # fmt: skip
    known, asked = rows[::5], [r for n, r in enumerate(rows) if n % 5]
    bias, scale, degrees = Residuals.known(Ruler.CPU, known).predict_many(
        [r.engine for r in asked], [r.recompute for r in asked], "tiny",
        np.array([r.predicted_bytes for r in asked], float),
    )  # fmt: skip
    real = np.array([r.log_ratio for r in asked])
    assert np.mean(np.abs(real - bias) <= student_quantile_95(degrees) * scale) >= 0.85
    assert np.sqrt(np.mean((real - bias) ** 2)) < 0.1 < np.sqrt(np.mean(real**2))


def test_the_committed_records_are_covered_from_those_of_other_architectures():
    """What ships: of each architecture's real runs, 85% to 97% inside the others' 90% interval."""
    spread, source, rows = residuals._committed(Ruler.CPU_ALLOCATOR)
    architectures = {row.model for row in rows}
    assert len(architectures) >= 3 and len(rows) >= 40 and "ranks.csv" in source
    inside = []
    for architecture in architectures:
        known = [replace(row, here=True) for row in rows if row.model != architecture]
        asked = [row for row in rows if row.model == architecture]
        bias, scale, degrees = Residuals(known, spread, source).predict_many(
            [row.engine for row in asked],
            [row.recompute for row in asked],
            architecture,
            np.array([row.predicted_bytes for row in asked], float),
        )
        real = np.array([row.log_ratio for row in asked])
        inside += list(np.abs(real - bias) <= student_quantile_95(degrees) * scale)
    assert 0.85 <= np.mean(inside) <= 0.97
