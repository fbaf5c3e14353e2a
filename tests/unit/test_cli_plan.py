import json
import os
import subprocess
import sys

import pytest

from autotune import __version__
from autotune.cli import VERBS, main

PLAN = ["plan", "--model", "qwen3-8b", "--gpus", "8", "--gpu-type", "h100-sxm"]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_plan_json_is_the_contract(capsys):
    code, out, err = run(capsys, *PLAN, "--json", "--top", "3")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert set(document) == {
        "model", "hardware", "workload", "candidates", "rejected", "space_size", "elapsed_s",
    }  # fmt: skip
    assert len(document["candidates"]) == 3
    assert document["workload"]["seq_len"] == 2048
    assert {"plan", "code", "reason"} == set(document["rejected"][0])


def test_plan_json_where_nothing_fits_is_the_document_all_the_same(capsys):
    flags = ["--memory-limit", "8GiB", "--strategies", "ddp", "--json"]
    code, out, err = run(capsys, *PLAN, *flags)
    document = json.loads(out)
    assert code == 1
    assert "fits 8 x" in err and "GiB too much" in err and err.count("\n") == 1
    assert document["candidates"]
    assert {candidate["verdict"] for candidate in document["candidates"]} == {"oom"}


@pytest.mark.parametrize("width", [60, 200])
def test_tables_keep_to_the_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(capsys, *PLAN)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    for words in ("zero3", "sequence", "2048", "global batch 64", "optimizer", "logits", "total"):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["plam"], 2, "Nearest: plan"),
        ([*PLAN[:2], "qwen3-9b", *PLAN[3:]], 2, "Nearest: qwen3-8b"),
        ([*PLAN, "--strategies", "zero4"], 2, "Nearest: zero"),
        ([*PLAN[:-1], "h1000"], 2, "Nearest: h100"),
        ([*PLAN, "--global-batch-size", "30"], 0, ""),
        ([*PLAN, "--global-batch-size", "31"], 2, "24 or 32"),
        ([*PLAN, "--seq-len", "1"], 2, "seq_len"),
        ([*PLAN, "--memory-limit", "lots"], 2, "'lots' is not a size"),
        ([*PLAN, "--memory-limit", "8GiB", "--strategies", "ddp"], 1, "GiB too much"),
        (["estimate", "nowhere.yml", "--gpus", "8"], 2, "nowhere.yml"),
    ],
)
def test_bad_input_is_one_message(capsys, argv, code, words):
    got, out, err = run(capsys, *argv)
    assert got == code
    assert words in err and "Traceback" not in err
    if code:
        assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], [*PLAN, "--gpus", "0"], [*PLAN, "--nonsense"], ["plan"]])
def test_usage_errors(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and "usage: autotune" in err


def test_estimate(capsys, tmp_path):
    config = tmp_path / "c.yml"
    config.write_text(
        "base_model: qwen3-8b\nsequence_len: 4096\nmicro_batch_size: 1\n"
        "gradient_accumulation_steps: 4\nlearning_rate: 1e-5\nbf16: true\n"
        "gradient_checkpointing: true\ndeepspeed: zero3.json\n"
        "datasets:\n  - {path: a.jsonl, type: completion}\n"
    )
    arguments = ["estimate", str(config), "--gpus", "8", "--gpu-type", "h100"]
    code, out, _ = run(capsys, *arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["plan"]["zero_stage"] == 3 and document["plan"]["recompute"] == "full"
    assert document["world_size"] == 8 and document["violations"] == []
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "later loss" in out and "recompute" in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"autotune {__version__}\n", "")


def test_interrupt_and_bug(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("autotune.cli.plan.run", interrupted)
    assert run(capsys, *PLAN)[0] == 130

    def buggy(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("autotune.cli.plan.run", buggy)
    code, _, err = run(capsys, *PLAN)
    assert code == 1 and err.startswith("autotune: internal error: a bug (traceback in ")
    path = err.rpartition(" in ")[2].strip().rstrip(")")
    with open(path) as file:
        assert "RuntimeError: a bug" in file.read()
    os.unlink(path)


def test_missing_train_stack_says_what_to_install(capsys, monkeypatch):
    def needs_torch(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("autotune.cli.plan.run", needs_torch)
    code, _, err = run(capsys, *PLAN)
    assert code == 2 and "pip install 'autotune-llm[train]'" in err


def command(*argv, **values):
    return subprocess.run(
        [sys.executable, "-m", "autotune", *argv],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, **values,
    )  # fmt: skip


def test_plan_and_help_import_nothing_heavy():
    watch = (
        "import sys\nfrom autotune.cli import main\ntry:\n main(sys.argv[1:])\n"
        "except SystemExit:\n pass\nprint(*sys.modules, file=sys.stderr)"
    )
    for argv, unwanted in (
        (["--help"], {"pydantic", "rich", "yaml", "numpy", "torch", "pandas", "optuna"}),
        (PLAN, {"torch", "transformers", "pandas", "optuna", "plotly", "scipy"}),
    ):
        result = subprocess.run(
            [sys.executable, "-c", watch, *argv], capture_output=True, text=True, timeout=60
        )
        loaded = {name.partition(".")[0] for name in result.stderr.split()}
        assert "autotune" in loaded
        assert not loaded & unwanted


def test_plan_does_not_work_plan_by_plan(capsys):
    """Of twice the configurations the work is hardly more: their numbers are arrays.

    Calls are counted, since a time depends on the machine: `make bench-cli` measures that.
    """

    def calls(*argv):
        count = 0

        def note(frame, event, arg):
            nonlocal count
            count += event == "call"

        run(capsys, *argv)  # what is imported and cached on first use
        sys.setprofile(note)
        try:
            run(capsys, *argv)
        finally:
            sys.setprofile(None)
        return count

    space = calls(*PLAN, "--top", "1")
    twice = calls(*PLAN, "--top", "1", "--global-batch-size", "4096")
    assert 0 < space < twice < 1.4 * space


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "autotune", *PLAN, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and err == b""


def test_a_pipe_that_is_not_stdout_s_is_a_bug(capsys, monkeypatch):
    def writes_to_a_dead_process(args):
        raise BrokenPipeError

    monkeypatch.setattr("autotune.cli.plan.run", writes_to_a_dead_process)
    code, _, err = run(capsys, *PLAN)
    assert code == 1 and err.startswith("autotune: internal error")
    os.unlink(err.rpartition(" in ")[2].strip().rstrip(")"))


def test_every_verb_is_listed(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(verb in out for verb in VERBS)


def test_tensor_parallelism_where_it_is_asked_for(capsys):
    flags = ["--model", "tiny-qwen3", "--gpus", "4", "--gpu-type", "h100-sxm", "--strategies"]
    code, out, _ = run(
        capsys, "plan", *flags, "fsdp2,zero2", "--tensor-parallel", "1,2,3", "--json"
    )
    document = json.loads(out)
    found = {(c["plan"]["strategy"], c["plan"]["tp"]) for c in document["candidates"]}
    assert code == 0 and found == {("fsdp2", 1), ("fsdp2", 2), ("zero2", 1)}
    refused = {(r["plan"]["tp"], r["code"]) for r in document["rejected"]}
    assert {(2, "AT115"), (3, "AT102")} <= refused


@pytest.mark.parametrize("degrees", ["0", "two", "1,-2", ""])
def test_tensor_parallel_degrees_that_are_none(capsys, degrees):
    code, out, err = run(capsys, *PLAN, "--tensor-parallel", degrees)
    assert (code, out) == (2, "")
    assert "--tensor-parallel" in err and "whole numbers above 0" in err and err.count("\n") == 1


def test_the_space_is_narrowed_as_a_search_s_is(capsys):
    flags = "--strategies fsdp2 --sequence-parallel 1,2 --sequence-parallel-by ring,ring".split()
    flags += "--micro-batches 1,2 --recompute full".split()
    code, out, _ = run(capsys, *PLAN, *flags, "--json")
    plans = [each["plan"] for each in json.loads(out)["candidates"]]
    assert code == 0 and {plan["recompute"] for plan in plans} == {"full"}
    found = sorted((p["cp"], p["cp_backend"], p["micro_batch_size"]) for p in plans)
    assert found == [(1, "ulysses", 1), (1, "ulysses", 2), (2, "ring", 1), (2, "ring", 2)]


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--sequence-parallel-by", "rings", "ulysses, ring"),
        ("--recompute", "some", "none, full"),
        ("--recompute", "", "none, full"),
        ("--micro-batches", "0", "whole numbers above 0"),
        ("--sequence-parallel", "two", "whole numbers above 0"),
    ],
)
def test_a_space_that_is_none(capsys, flag, value, allowed):
    code, out, err = run(capsys, *PLAN, flag, value)
    assert (code, out) == (2, "")
    assert flag in err and allowed in err and err.count("\n") == 1
