"""`autotune fetch deepspeed_configs`: what is copied, kept, replaced, and the exit code of each."""

import json
import os

import pytest

from autotune.cli import main
from autotune.config import load_config, preset_names
from autotune.config.presets import preset_text

NAMES = preset_names()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _run(*argv):
        with pytest.raises(SystemExit) as caught:
            main(["fetch", *map(str, argv)])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return _run


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


SHIPPED = {name: preset_text(name) for name in NAMES}


def test_all_of_them_and_nothing_the_second_time(run, tmp_path):
    code, out, _ = run("deepspeed_configs")
    assert code == 0 and f"{len(NAMES)} written" in out
    assert contents(tmp_path / "deepspeed_configs") == SHIPPED
    code, out, _ = run("deepspeed_configs")
    assert code == 0 and f"{len(NAMES)} unchanged." in out


def test_a_changed_file_is_kept_back(run, tmp_path):
    run("deepspeed_configs", "--dest", "a/b")
    mine = tmp_path / "a" / "b" / "zero2.json"
    mine.write_text("{}")
    (tmp_path / "a" / "b" / "zero3.json").unlink()
    code, out, _ = run("deepspeed_configs", "--dest", "a/b")
    assert code == 1
    assert "1 written" in out and "1 kept" in out and f"{len(NAMES) - 2} unchanged" in out
    assert contents(tmp_path / "a" / "b") == SHIPPED | {"zero2.json": "{}"}


def test_force_replaces_after_a_copy(run, tmp_path):
    (tmp_path / "zero2.json").write_text("first")
    (tmp_path / "zero2.json.bak").write_text("older")
    code, out, _ = run("deepspeed_configs", "--dest", ".", "--force", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["counts"] == {
        "written": len(NAMES) - 1, "unchanged": 0, "replaced": 1, "kept": 0, "failed": 0,
    }  # fmt: skip
    (replaced,) = [file for file in document["files"] if file["action"] == "replaced"]
    assert replaced == {"name": "zero2.json", "action": "replaced", "note": "zero2.json.bak2"}
    assert contents(tmp_path) == SHIPPED | {"zero2.json.bak": "older", "zero2.json.bak2": "first"}


def test_one_that_cannot_be_written_does_not_stop_the_others(run, tmp_path):
    (tmp_path / "zero1.json").mkdir()
    code, out, err = run("deepspeed_configs", "--dest", ".", "--force")
    assert code == 1 and "1 failed" in out and f"{len(NAMES) - 1} written" in out
    assert "Traceback" not in out + err
    assert sorted(os.listdir(tmp_path)) == NAMES


def test_a_fetched_file_is_the_preset(run, tmp_path):
    run("deepspeed_configs")
    config = tmp_path / "c.yml"
    values = {"base_model": "tiny-llama", "learning_rate": 1e-4, "deepspeed": "zero2_cpuoffload"}
    config.write_text(json.dumps(values))
    by_name = load_config(config)
    by_path = load_config(config, {"deepspeed": "deepspeed_configs/zero2_cpuoffload.json"})
    assert by_path == by_name and by_path.plan(2).offload_optimizer


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("deepspeed_config",), "Nearest: deepspeed_configs"),
        (("examples",), "Known: deepspeed_configs"),
        (("deepspeed_configs", "--dest", "file"), "no folder can be made"),
        (("deepspeed_configs", "--dest", "file/below"), "no folder can be made"),
        ((), "WHAT"),
    ],
)
def test_mistakes(run, tmp_path, argv, words):
    (tmp_path / "file").write_text("mine")
    code, _, err = run(*argv)
    assert code == 2 and words in err
    assert contents(tmp_path) == {"file": "mine"}
