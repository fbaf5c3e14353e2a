"""`autotune merge`: what it refuses before it reads any weights, and what it asks of the runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.cli import main
from autotune.errors import AutotuneError
from autotune.spec.workload import Lora, Workload
from autotune.trial.adapters import merge_order
from autotune.trial.packages import check_packages

LORA = Lora(r=4, dora=True)


@pytest.fixture
def run(capsys):
    def _run(*argv):
        with pytest.raises(SystemExit) as caught:
            main(["merge", *map(str, argv)])
        return caught.value.code, capsys.readouterr().err

    return _run


@pytest.fixture
def finished(tmp_path):
    """The output folder of a finished run, as far as the command looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    identity = {"adapter": LORA.model_dump(mode="json")}
    (folder / "autotune_checkpoint.json").write_text(json.dumps(identity))
    return folder


def test_what_a_finished_run_asks_for(finished, tmp_path):
    order = merge_order(finished, None, tmp_path / "out")
    assert (order.base, order.lora, order.adapter) == ("the/base", None, str(finished))
    assert merge_order(finished, "other", tmp_path / "out").base == "other"


def test_what_a_sharded_checkpoint_asks_for(checkpoint, tmp_path):
    order = merge_order(checkpoint, "base", tmp_path / "out")
    assert Lora.model_validate(order.lora) == LORA
    assert order.run == str(tmp_path / "run")


def test_no_adapter(run, tmp_path):
    out = tmp_path / "out"
    code, said = run(tmp_path / "none", "--out", out)
    assert code == 2 and "is no folder" in said
    (tmp_path / "model").mkdir()
    code, said = run(tmp_path / "model", "--out", out)
    assert code == 2 and "holds no adapter" in said and not out.exists()


def test_a_run_that_was_cut_short_names_its_checkpoints(run, checkpoint, tmp_path):
    code, said = run(checkpoint.parent, "--out", tmp_path / "out")
    assert code == 2 and "Give one of its checkpoints: checkpoint-2" in said


def test_a_checkpoint_of_all_parameters(run, checkpoint, tmp_path):
    (checkpoint / "autotune_checkpoint.json").write_text('{"adapter": null}')
    code, said = run(checkpoint, "--out", tmp_path / "out", "--base", "x")
    assert code == 2 and "of all parameters" in said
    (checkpoint / "autotune_checkpoint.json").unlink()
    code, said = run(checkpoint, "--out", tmp_path / "out", "--base", "x")
    assert code == 2 and "not a whole checkpoint" in said


def test_an_unknown_base(run, checkpoint, tmp_path):
    code, said = run(checkpoint, "--out", tmp_path / "out")
    assert code == 2 and "Give the base by --base" in said


def test_nothing_is_overwritten(run, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, said = run(finished, "--out", out)
    assert code == 2 and "nothing was overwritten" in said
    code, said = run(finished, "--out", out / "mine.txt")
    assert code == 2 and "is a file" in said
    for itself in (finished, tmp_path):
        code, said = run(finished, "--out", itself, "--force")
        assert code == 2 and "holds the adapter itself" in said
    assert (out / "mine.txt").read_text() == "mine" and finished.is_dir()


def test_the_base_is_not_replaced(run, finished, tmp_path):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"weights")
    for out in (base, base.parent):
        code, said = run(finished, "--base", base, "--out", out, "--force")
        assert code == 2 and "holds the base itself" in said
    assert (base / "model.safetensors").read_bytes() == b"weights"


def test_what_out_held_comes_back_where_the_new_cannot_take_its_place(
    run, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    answer = {"layers": 1, "dtype": "float32"}

    def merged_and_lost(order):
        Path(order.out).rmdir()  # so that the last rename fails
        return answer

    monkeypatch.setattr("autotune.cli.merge._merge", merged_and_lost)
    code, _ = run(finished, "--out", out, "--force")
    assert code != 0 and (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("workload", "package"),
    [
        (Workload(liger=("rope",)), "triton"),
        (Workload(optimizer="adamw_8bit"), "bitsandbytes"),
        (Workload(adapter=Lora(base_storage="nf4")), "bitsandbytes"),
    ],
)
def test_missing_packages_are_named_before_ranks_start(workload, package, monkeypatch):
    here = {"liger_kernel", "triton", "bitsandbytes"} - {package}
    monkeypatch.setattr("autotune.trial.packages.find_spec", lambda name: name in here or None)
    with pytest.raises(AutotuneError, match=f"needs {package}, which is not installed"):
        check_packages(workload)
    check_packages(Workload(adapter=Lora()))
