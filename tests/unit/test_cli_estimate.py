"""`autotune estimate`: its text, its JSON, and the knowledge base as it meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from autotune.cli import main
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import VARIABLE, Entry, KnowledgeBase, model_key
from autotune.memory.residuals import Ruler
from autotune.spec.model import load_model

CONFIG = (
    "base_model: {model}\nsequence_len: {length}\nsample_packing: true\nmicro_batch_size: {batch}\n"
    "gradient_accumulation_steps: 4\nlearning_rate: 1e-5\nbf16: true\n"
    "deepspeed: {preset}.json\ndatasets:\n  - {{path: a.jsonl, type: completion}}\n"
)
H100 = ["--gpus", "8", "--gpu-type", "h100-sxm"]


@pytest.fixture
def estimate(capsys, tmp_path):
    def run(*options, model="qwen3-8b", length=4096, batch=2, preset="zero2", code=0):
        config = tmp_path / "c.yml"
        config.write_text(CONFIG.format(model=model, length=length, batch=batch, preset=preset))
        with pytest.raises(SystemExit) as caught:
            main(["estimate", str(config), *options])
        out, err = capsys.readouterr()
        assert caught.value.code == code, err
        return out if code == 0 else err

    return run


def test_json_has_all_of_it(estimate):
    document = json.loads(estimate(*H100, "--json"))
    memory = document["memory"]
    assert set(memory) >= {
        "total_bytes", "expected_bytes", "interval_bytes", "residual", "components", "instants",
        "peak_instant", "host_bytes", "activations_from",
    }  # fmt: skip
    assert set(memory["residual"]) == {"source", "count", "bias", "scale", "degrees"}
    assert sum(memory["components"].values()) == memory["total_bytes"]
    assert memory["instants"][memory["peak_instant"]] == memory["total_bytes"]
    low, high = memory["interval_bytes"]
    assert low < memory["expected_bytes"] < high
    assert document["verdict"] == "oom" and document["fit_probability"] < 0.1
    best = document["advice"][0]
    assert set(best) == {
        "change", "freed_bytes", "expected_bytes", "host_bytes", "fit_probability", "verdict",
        "plan",
    }  # fmt: skip
    assert best["change"] == "recompute activations" and best["verdict"] == "fits"
    assert best["freed_bytes"] + best["expected_bytes"] == memory["expected_bytes"]


@pytest.mark.parametrize("width", [60, 200])
def test_the_text_keeps_to_the_width_and_says_it(estimate, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = estimate(*H100)
    assert max(map(len, out.splitlines())) <= width
    text = " ".join(out.split())
    for words in (
        "OOM:", "chance to fit", "with 90% between", "at the peak", "activations", "later loss",
        "optimizer step", "recompute activations", "sequence parallel 2", "LoRA",
        "Predicted, not measured; the error is assumed: no CUDA run was measured",
        "to save the weights", "tokens/s",
    ):  # fmt: skip
        assert words in text, words


def test_host_memory_is_a_nodes(estimate):
    out = " ".join(estimate(*H100, preset="zero3_bf16_cpuoffload_all", length=512).split())
    assert "FITS:" in out and "The host of the first node needs" in out
    assert "a rank and" in out and "to save the weights." in out


def test_a_plan_that_does_not_divide_is_one_error(estimate):
    err = estimate("--gpus", "8", "--gpu-type", "h100-sxm", length=1, code=2)
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Five runs of the tiny model on this machine, each 30% above its prediction."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "known"))
    machine = machine_fingerprint("cpu").to_dict()
    KnowledgeBase(tmp_path / "known").add(
        [
            Entry(
                fingerprint=machine, ruler=Ruler.CPU, model=model_key(load_model("tiny-qwen3")),
                plan_id=str(number), workload="w", engine="zero2", recompute="none",
                predicted_bytes=10**8, real_bytes=13 * 10**7,
            )
            for number in range(5)
        ]
    )  # fmt: skip
    return tmp_path / "known"


def test_what_this_machine_measured_is_used_said_and_switched_off(estimate, measured):
    tiny = {"model": "tiny-qwen3", "length": 256, "batch": 1}
    cpu = ["--gpus", "2", "--gpu-type", "cpu"]
    known = json.loads(estimate(*cpu, "--json", **tiny))["memory"]
    assert known["residual"]["source"] == "trials on this machine"
    assert known["residual"]["count"] >= 5
    text = " ".join(estimate(*cpu, **tiny).split())
    assert "as runs measured" in text and "trials on this machine" in text
    unknown = json.loads(estimate(*cpu, "--no-knowledge", "--json", **tiny))["memory"]
    assert unknown["residual"]["source"] != known["residual"]["source"]
    assert unknown["total_bytes"] == known["total_bytes"]
    miss, before = (
        abs(memory["expected_bytes"] / memory["total_bytes"] - 1.3) for memory in (known, unknown)
    )
    assert miss < 0.5 * before


def test_another_gpu_type_does_not_use_it(estimate, measured):
    document = json.loads(estimate(*H100, "--json", model="tiny-qwen3"))
    assert document["memory"]["residual"]["source"].startswith("assumed")


def test_a_damaged_knowledge_base_is_a_warning(estimate, measured):
    file = measured / "memory.jsonl"
    file.write_bytes(b"{nonsense}\n" + file.read_bytes())
    cpu = ["--gpus", "2", "--gpu-type", "cpu", "--json"]
    assert json.loads(estimate(*cpu, model="tiny-qwen3", length=256, batch=1))
    assert list(measured.glob("*.damaged-1"))


def test_no_training_stack_is_imported(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text(CONFIG.format(model="qwen3-8b", length=4096, batch=2, preset="zero2"))
    watch = (
        "import sys\nfrom autotune.cli import main\ntry:\n main(sys.argv[1:])\n"
        "except SystemExit:\n pass\nprint(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", watch, "estimate", str(config), *H100],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    loaded = {name.partition(".")[0] for name in result.stderr.split()}
    assert "OOM:" in result.stdout and "autotune" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "deepspeed", "pandas", "scipy"}
