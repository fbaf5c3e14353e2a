"""The published measurements, the engines of other tools, and the figures made of them."""

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotune.memory.profile import ZERO, ActivationProfile, Instant, LayerKind, Phase
from autotune.memory.setup import Checkpointing, Quantised, Regime, Setup, TraceKey
from autotune.memory.sizes import Sizes
from autotune.spec.workload import Lora

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "memory"
sys.path.insert(0, str(FOLDER))
figures, foreign, losses, page, published = (
    importlib.import_module(name) for name in ("figures", "foreign", "losses", "page", "published")
)
sys.path.remove(str(FOLDER))

USES = {"scored", "incomplete", "oom_stated", "oom_inferred", "left_out"}
TOKENS = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)


def committed(name):
    with (FOLDER / name).open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_every_row_says_where_it_is_from_and_what_it_is_good_for():
    rows = published.read_rows()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["reference"].startswith("github:"), row["id"]
        assert row["use"] in USES, row["id"]
        if row["use"] in ("left_out", "incomplete", "oom_inferred"):
            assert row["reason"], row["id"]
        if row["use"] == "scored":
            assert row["measured"] and row["seq_len"] and row["checkpointing"], row["id"]
            assert row["metric"] in ("allocated", "reserved"), row["id"]
        if row["use"] == "oom_stated":
            assert row["outcome"] == "oom", row["id"]


def test_predicted_rows_have_a_model_and_a_setup():
    rows = [r for r in published.read_rows() if r["use"] in published.PREDICTED and r["seq_len"]]
    assert len(rows) > 350
    for row in rows:
        assert published.config_of(row)["model_type"]
        run = published.run_of(row)
        assert (run.setup.key.adapter is None) == (row["method"] == "full"), row["id"]


def test_units_are_not_mixed_up():
    row = {"measured": "2.0", "unit": "GB"}
    assert published.measured_bytes(row) == 2e9
    assert published.measured_bytes(row | {"unit": "GiB"}) == 2 * 2**30


def test_names_of_projections_follow_the_family():
    rows = {row["id"]: row for row in published.read_rows()}
    neox = next(
        r for r in rows.values() if r["model"] == "stablelm-alpha-3b" and r["method"] == "lora"
    )
    assert published.lora_of(neox).target_modules == ("query_key_value",)
    llama = next(r for r in rows.values() if r["set"] == "litgpt" and r["model"] == "llama-2-7b")
    assert published.lora_of(llama).target_modules == ("q_proj", "v_proj")


def profile(kept=10.0, layers=3):
    """Layers that keep `kept` bytes a token, and nothing else."""
    up, down = tuple(kept * x for x in TOKENS), tuple(-kept * x for x in TOKENS)
    kind = LayerKind(
        forward=Phase(end=up, peaks=(Instant(bytes=up),)),
        backward=Phase(end=down, peaks=(Instant(bytes=ZERO),), gradient_elements=100),
        parameter_elements=100,
        trainable_elements=100,
    )
    nothing = Phase(end=ZERO, peaks=(Instant(bytes=ZERO),))
    return ActivationProfile(
        source="traced", embedding_forward=nothing, kinds=(kind,), layers=(0,) * layers,
        head_forward=nothing, loss_forward=nothing, loss_backward=nothing, head_backward=nothing,
        embedding_backward=nothing, evaluation=nothing,
    )  # fmt: skip


def counts(adapter=0, layers=3):
    added = float(adapter)
    return foreign.Counts(
        sizes=Sizes(
            embedding=50, head=50, norm=0, layers=np.full(layers, 100.0 + added),
            layers_trainable=np.full(layers, added or 100.0),
            root_trainable=0 if adapter else 100, module=100, parameters=(100,), counts=(1,),
        ),
        projections={f"{i}.q_proj": (8, 8) for i in range(layers)},
        vocab=5,
        hidden=10,
    )  # fmt: skip


def run_of(**changes):
    adapter = Lora(r=2, target_modules=("q_proj",)) if changes.pop("adapter", False) else None
    checkpointing = changes.pop("checkpointing", Checkpointing.NONE)
    setup = Setup(
        key=TraceKey(regime=Regime.COMPUTE, adapter=adapter, checkpointing=checkpointing),
        parameter_bytes=changes.pop("parameter_bytes", 2),
        foreach=True,
        quantised=changes.pop("quantised", None),
    )
    return foreign.Run(setup=setup, micro_batch_size=1, seq_len=1, **changes)


def test_pure_16_bit_training_peaks_in_the_optimizer_at_ten_bytes_a_parameter():
    # Weights, gradients, two moments and the square root that foreach makes of one of them.
    found, instant = foreign.peak(profile(), counts(), run_of())
    assert (found, instant) == (10 * 400, "optimizer_step")
    half, _ = foreign.peak(profile(), counts(), run_of(fsdp1=True, ranks=2, parameter_bytes=4))
    assert half == 20 * 400 / 2


def test_activations_come_on_top_of_weights_and_moments():
    found, instant = foreign.peak(profile(kept=10_000.0), counts(), run_of())
    # With the head's gradient, before the layers free anything.
    assert instant == "head_backward"
    assert found == 6 * 400 + 3 * 10_000 + 2 * 50


def test_fsdp1_keeps_inputs_and_gradients_of_frozen_recomputed_layers():
    how = {"adapter": True, "fsdp1": True, "ranks": 2, "adapter_bytes": 2}
    freed, _ = foreign.peak(profile(10_000.0), counts(adapter=4), run_of(**how))
    kept, instant = foreign.peak(
        profile(10_000.0), counts(adapter=4), run_of(**how, checkpointing=Checkpointing.REENTRANT)
    )
    assert instant in ("backward", "backward_end")
    # Three inputs, and three gradients beside them instead of in their place.
    assert kept - freed == pytest.approx(3 * 10_000, rel=0.05)


def test_adapters_that_are_units_leave_one_layer_gathered_in_backward():
    place = foreign.Place(
        kind="layer", unit=104.0, unit_trainable=4.0, before=104.0, after=104.0,
        after_trainable=4.0, below=0.0, above=0.0, first=False, finished=0.0,
    )  # fmt: skip
    gathered = [
        foreign.Fsdp1(
            counts(4), run_of(adapter=True, fsdp1=True, ranks=2, adapter_units=units)
        ).backward(place, 0.0, later=False).gathered
        for units in (False, True)
    ]  # fmt: skip
    assert gathered == [2 * (100 + 2 * 104), 2 * (100 + 104)]


def test_no_sync_keeps_whole_gradients():
    how = {"adapter": True, "fsdp1": True, "ranks": 2, "adapter_bytes": 2}
    synced, _ = foreign.peak(profile(), counts(adapter=4), run_of(**how))
    whole, _ = foreign.peak(profile(), counts(adapter=4), run_of(**how, unsynced_bytes=2))
    assert whole - synced == 2 * counts(adapter=4).sizes.total


def test_quantised_base_keeps_its_scales_whole_under_fsdp1():
    alone = foreign.OneProcess(counts(4), run_of(adapter=True, quantised=Quantised.NF4))
    assert alone.weights() == 0.5 * 192 + 2 * (400 - 192)
    assert alone.scales() == pytest.approx(192 / 16)
    sharded = foreign.Fsdp1(
        counts(4), run_of(adapter=True, quantised=Quantised.NF4, fsdp1=True, ranks=4)
    )
    parameters = float(sharded.resting()["parameters"][0])
    assert parameters == pytest.approx((alone.weights() + 4 * 12) / 4 + alone.scales())


def test_losses_of_other_code():
    base = profile()
    logits = tuple(2.0 * 5 * x for x in TOKENS)
    base = replace(base, head_forward=Phase(end=logits, peaks=(Instant(bytes=logits),)))
    old = losses.with_loss(base, "transformers", vocab=5)
    # bf16 logits, fp32, its shifted copy and log-softmax: 14 bytes a logit.
    assert logits[3] + old.loss_forward.peaks[0].bytes[3] == 14 * 5
    # What forward kept and backward adds: 12.
    assert logits[3] + old.loss_forward.end[3] + old.loss_backward.peaks[0].bytes[3] == 12 * 5
    assert losses.with_loss(base, "fused_linear", vocab=5) is base
    held = losses.with_loss(base, "transformers held", vocab=5)
    # Four bytes a logit more than a gradient in bf16, to the end of backward.
    left = logits[3] + held.loss_forward.end[3] + held.loss_backward.end[3]
    assert left == (2 + 4) * 5
    assert held.embedding_backward.end[3] == -4 * 5


def test_committed_figures_are_those_of_the_committed_predictions():
    stated = {row["figure"]: row for row in committed("figures.csv")}
    found = figures.published(committed("published_predicted.csv"))
    assert len(found) >= 4
    for figure in found:
        assert stated[figure.name]["value"] == figure.text
        assert stated[figure.name]["verdict"] == figure.verdict


def test_a_wrong_prediction_turns_the_lines_to_short():
    rows = committed("published_predicted.csv")
    doubled = [
        row | {"error": str(2 * float(row["error"] or 0) + 1.0), "called_oom": "yes"}
        for row in rows
    ]
    verdicts = {figure.name: figure.verdict for figure in figures.published(doubled)}
    assert verdicts["published, fully stated: median |error|"] == "short"
    assert verdicts["stated out of memory: precision"] == "short"
    blind = [row | {"called_oom": "no"} for row in rows]
    verdicts = {figure.name: figure.verdict for figure in figures.published(blind)}
    assert verdicts["stated out of memory: recall"] == "short"


def test_figures_of_ranks_take_held_out_architectures_alone():
    rows = [
        {"split": "tune", "error": 9.0, "error_net_of_buckets": 9.0},
        *(
            {"split": "held_out", "error": e, "error_net_of_buckets": e}
            for e in (0.01, -0.02, 0.01)
        ),
    ]
    by_name = {figure.name: figure for figure in figures.ranks(rows)}
    assert by_name["CPU ranks, gross: median |error|"].value == 0.01
    assert by_name["CPU ranks, gross: worst under-prediction"].value == 0.02
    assert by_name["CPU ranks: configurations measured"].verdict == "short"


def test_without_a_gpu_its_lines_say_so():
    assert {figure.verdict for figure in figures.gpu([])} == {"not measured"}


def test_rows_of_a_gpu_are_read(tmp_path):
    file = tmp_path / "memory.csv"
    file.write_text("memory_error,outcome,predicted_verdict\n-0.02,ok,fits\n,oom,fits\n")
    median, worst, wrong = figures.gpu([file])
    assert (median.verdict, worst.verdict, wrong.verdict) == ("pass", "pass", "short")


def test_a_peer_counts_where_it_has_an_answer():
    rows = [
        {"measured_bytes": "100", "autotune": "101", "peer": "130"},
        {"measured_bytes": "100", "autotune": "190", "peer": ""},
    ]
    (figure,) = figures.peers(rows, {"peer": False})
    assert figure.value == pytest.approx(30)
    assert figure.least == 3.0


def test_the_page_shows_the_committed_figures():
    rows = committed("figures.csv")
    lines = [(r["figure"], r["value"], r["target"], r["verdict"], r["of"]) for r in rows]
    block = page.markdown(("figure", "value", "target", "", "of"), lines)
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_block(text, "figures", block)
    assert page.with_block(text, "figures", "gone") != text
    with pytest.raises(ValueError, match="no markers"):
        page.with_block(text, "nothing", block)
