"""A sweep of a machine whose laws are known is read back as those laws."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autotune.calibrate.store import (
    calibration_file,
    calibration_for,
    merged,
    read_calibration,
    save_calibration,
)
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import model_key
from autotune.memory.layers import Regime
from autotune.plan import Recompute
from autotune.planner import make_plan, rank_plans
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision, Workload
from autotune.timing import Calibration, Collective, estimate_time
from autotune.timing.calibration import (
    CollectiveCurve,
    EnginePoint,
    EngineTimes,
    MatmulPoint,
    ModelTimes,
    OptimizerTimes,
    PassPoint,
    engine_kind,
)
from autotune.timing.links import Links
from autotune.timing.passes import fit_passes, nonnegative_fit

MODEL = load_model("tiny-qwen3")
WORKLOAD = Workload(seq_len=256, global_batch_size=8)
CPU = load_hardware("cpu", 2)
STRATEGIES = {s.name: s for s in load_strategies()}
ALPHA, RATE = 2e-4, 3e8
LAYER, FIXED, SCORES = 3e-6, 2e-6, 1e-9
"""Seconds a token and layer, a token, and a token, layer and token of the sequence."""


def curve(kind, ranks=2, alpha=ALPHA, rate=RATE):
    sizes = tuple(4.0**power for power in range(5, 13))
    return CollectiveCurve(
        kind=kind, ranks=ranks, num_bytes=sizes, times_s=tuple(alpha + s / rate for s in sizes)
    )


def passes_point(layers, batch, seq):
    tokens = batch * seq
    forward = layers * tokens * (LAYER + SCORES * seq) + tokens * FIXED
    return PassPoint(
        layers=layers,
        micro_batch_size=batch,
        seq_len=seq,
        forward_s=forward,
        backward_s=2 * forward,
        recompute_backward_s=2 * forward + layers * tokens * (LAYER + SCORES * seq),
    )


def model_times(sizes=((1, 128), (4, 128), (1, 512), (2, 512)), regime=Regime.COMPUTE):
    points = tuple(passes_point(layers, *size) for layers in (1, 3) for size in sizes)
    return ModelTimes(model=model_key(MODEL), regime=regime, packing=True, points=points)


def calibration(**parts):
    values = {
        "device": "cpu", "num_ranks": 2, "threads": 1,
        "fingerprint": machine_fingerprint("cpu").to_dict(),
        "recorded_at": "2026-01-01T00:00:00+00:00", "duration_s": 1.0,
    }  # fmt: skip
    return Calibration(**(values | parts))


def plan_of(name, micro=2, steps=2, recompute=Recompute.NONE, cp=1):
    plan = make_plan(STRATEGIES[name], CPU, recompute=recompute, cp=cp)
    return replace(plan, micro_batch_size=micro, grad_accum_steps=steps)


@pytest.mark.parametrize("size", [3e3, 1e5, 7e6, 1e9])
def test_a_link_of_known_law_is_read_back(size):
    links = Links(hardware=CPU, calibration=calibration(collectives=(curve("all_gather"),)))
    expected = ALPHA + size / RATE
    # Between the sizes the line is bent: interpolation is in logarithms.
    assert links.seconds(Collective.ALL_GATHER, size, 2) == pytest.approx(expected, rel=0.12)
    twice = links.seconds(Collective.ALL_GATHER, 2 * size, 2, calls=2)
    assert twice == pytest.approx(2 * links.seconds(Collective.ALL_GATHER, size, 2))


def test_more_bytes_never_take_less():
    dented = curve("all_reduce").model_copy(update={"times_s": (1e-3, 5e-4) + (2e-3,) * 6})
    seconds = dented.seconds(np.geomspace(100, 1e10, 200))
    assert (np.diff(seconds) >= 0).all()


def test_another_group_keeps_the_ratio_to_the_formula():
    hardware = load_hardware("cpu", 8)
    plain = Links(hardware=hardware)
    links = Links(hardware=hardware, calibration=calibration(collectives=(curve("all_gather", 4),)))
    ratio = links.seconds(Collective.ALL_GATHER, 1e6, 4) / plain.seconds(
        Collective.ALL_GATHER, 1e6, 4
    )
    other = links.seconds(Collective.ALL_GATHER, 1e6, 8) / plain.seconds(
        Collective.ALL_GATHER, 1e6, 8
    )
    assert other == pytest.approx(ratio)
    # What was not measured at all is predicted as before.
    assert links.seconds(Collective.ALL_REDUCE, 1e6, 8) == plain.seconds(
        Collective.ALL_REDUCE, 1e6, 8
    )


def test_two_depths_give_layers_and_the_rest():
    passes = model_times().passes
    for tokens, seq in ((128, 128), (512, 512), (2048, 512), (300, 200)):
        layer = tokens * (LAYER + SCORES * seq)
        assert passes.layer_forward.seconds(tokens, seq) == pytest.approx(layer, rel=1e-3)
        assert passes.layer_backward.seconds(tokens, seq) == pytest.approx(2 * layer, rel=1e-3)
        assert passes.layer_recompute.seconds(tokens, seq) == pytest.approx(layer, rel=1e-3)
        assert passes.fixed_forward.seconds(tokens, seq) == pytest.approx(tokens * FIXED, rel=1e-3)


def test_a_curve_passes_through_what_no_term_explains():
    odd = [passes_point(layers, 1, seq) for layers in (1, 3) for seq in (128, 256, 512)]
    odd = [p.model_copy(update={"forward_s": p.forward_s * (1.5 if p.seq_len == 256 else 1)})
           for p in odd]  # fmt: skip
    times = model_times().model_copy(update={"points": tuple(odd)})
    assert times.passes.layer_forward.seconds(256, 256) == pytest.approx(
        1.5 * 256 * (LAYER + SCORES * 256), rel=0.01
    )


def test_one_depth_says_nothing():
    one = np.ones(3)
    with pytest.raises(ValueError, match="two depths"):
        fit_passes(one, np.arange(1.0, 4), one, one, one, one)


def test_weights_are_never_negative():
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative_fit(terms, np.array([3.0, 2.0, 1.0]))[1] == 0
    assert nonnegative_fit(terms, np.array([3.0, 5.0, 7.0])) == pytest.approx([1, 2])


def test_measured_passes_make_the_compute():
    known = calibration(models=(model_times(),))
    layer = 512 * (LAYER + SCORES * 256)
    expected = 2 * 3 * (MODEL.num_layers * layer + 512 * FIXED)
    time = estimate_time(MODEL, WORKLOAD, plan_of("zero1"), CPU, known)
    assert time.compute_s == pytest.approx(expected, rel=0.01)
    full = estimate_time(MODEL, WORKLOAD, plan_of("zero1", recompute=Recompute.FULL), CPU, known)
    assert full.recompute_s == pytest.approx(2 * MODEL.num_layers * layer, rel=0.01)
    # DDP runs other types, which were not measured.
    ddp = estimate_time(MODEL, WORKLOAD, plan_of("ddp"), CPU, known)
    assert ddp == estimate_time(MODEL, WORKLOAD, plan_of("ddp"), CPU)


def test_a_tried_engine_adds_what_it_took():
    each, once = 0.03, 0.05
    passes = 3 * (4 * 128 * (LAYER + SCORES * 128) + 128 * FIXED)
    point = EnginePoint(
        layers=4, micro_batch_size=1, seq_len=128, step_s=passes + each + once,
        step_twice_s=2 * (passes + each) + once,
    )  # fmt: skip
    engine = EngineTimes(
        model=model_key(MODEL), precision=Precision.BF16, packing=True, strategy="zero2",
        num_ranks=2, points=(point,),
    )  # fmt: skip
    known = calibration(models=(model_times(),), engines=(engine,))
    for steps in (1, 2, 4):
        plan = plan_of("zero2", micro=1, steps=steps)
        time = estimate_time(MODEL, WORKLOAD, plan, CPU, known)
        expected = time.compute_s + steps * each + once
        assert time.step_s == pytest.approx(expected, rel=0.01)
        assert min(time.components.values()) >= 0
    # An exchange of sequence parts was not in what was tried.
    plain = estimate_time(MODEL, WORKLOAD, plan_of("zero2", micro=2, steps=1), CPU, known)
    split = estimate_time(MODEL, WORKLOAD, plan_of("zero2", micro=2, steps=1, cp=2), CPU, known)
    assert split.communication_s > plain.communication_s


def test_kinds_tell_what_communicates_differently():
    plans = [make_plan(s, load_hardware("cpu", 4)) for s in STRATEGIES.values()]
    assert len({engine_kind(plan) for plan in plans}) == len(plans)
    base = plan_of("fsdp2")
    other = plan_of("fsdp2", micro=4, recompute=Recompute.FULL, cp=2)
    assert engine_kind(base) == engine_kind(other)


def test_products_reach_the_rates_of_their_shape():
    def point(rows, rate):
        return MatmulPoint(
            precision=Precision.BF16, rows=rows, inputs=256, outputs=256,
            seconds=2 * rows * 256 * 256 / rate,
        )  # fmt: skip

    known = calibration(matmuls=(point(128, 1e9), point(2048, 4e9)))
    small, middle, large = known.matmul_flops_per_s(Precision.BF16, [128, 512, 2048], 256, 256)
    assert small == pytest.approx(1e9, rel=0.01)
    assert large == pytest.approx(4e9, rel=0.01)
    assert small < middle < large
    assert known.matmul_flops_per_s(Precision.FP32, 128, 256, 256) is None


def test_adamw_costs_by_tensor_and_by_element():
    known = calibration(
        optimizer=tuple(
            OptimizerTimes(tensors=t, elements=n, seconds=t * 2e-5 + n * 1e-9)
            for t, n in ((1, 2**18), (1, 2**21), (32, 2**18))
        )
    )
    assert known.optimizer_s(10, 1e6) == pytest.approx(10 * 2e-5 + 1e-3)


def test_a_calibration_is_kept_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    assert calibration_for(CPU) is None
    known = calibration(models=(model_times(),))
    path = save_calibration(known)
    assert calibration_for(CPU) == known
    assert calibration_for(load_hardware("cpu", 4)) is None
    assert calibration_for(load_hardware("h100-sxm", 8)) is None
    # A sweep without the model does not lose it.
    again = calibration(collectives=(curve("all_gather"),))
    save_calibration(again)
    assert calibration_for(CPU) == again.model_copy(update={"models": known.models})
    assert merged(again, None) is again
    assert path == calibration_file(known.fingerprint, 2)


@pytest.mark.parametrize("text", ["{", "", '{"device": "cpu"}', "null", "\xff"])
def test_a_damaged_file_is_set_aside(tmp_path, text, caplog):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert read_calibration(path) is None
    assert not path.exists()
    assert [p.read_text() for p in tmp_path.iterdir()] == [text]


def test_a_calibration_moves_the_ranking():
    slow = calibration(
        collectives=tuple(curve(kind, alpha=1.0) for kind in Collective), models=(model_times(),)
    )
    kwargs = {"micro_batches": [1, 2, 4]}
    plain = rank_plans(MODEL, WORKLOAD, CPU, list(STRATEGIES.values()), **kwargs)
    moved = rank_plans(MODEL, WORKLOAD, CPU, list(STRATEGIES.values()), calibration=slow, **kwargs)
    assert {e.plan.id for e in plain.candidates} == {e.plan.id for e in moved.candidates}
    assert [e.plan.id for e in plain.candidates] != [e.plan.id for e in moved.candidates]
    # With calls of a second each, the fewest calls win.
    assert moved.candidates[0].time.communication_s < 10
    assert max(e.time.communication_s for e in moved.candidates) > 20
    assert all(math.isfinite(e.time.step_s) for e in moved.candidates)
