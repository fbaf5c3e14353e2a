"""`autotune migrate` as a command: where it writes, what it keeps, how it fails."""

import json
import os
import stat

import pytest

from autotune.cli import main

TEXT = "base_model: tiny-llama\nlearning_rate: 2e-5\nfsdp: [full_shard]   # all of it\n"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _run(*argv):
        with pytest.raises(SystemExit) as caught:
            main(["migrate", *map(str, argv)])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return _run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(TEXT)
    return path


def test_without_a_flag_only_the_diff(run, config, tmp_path):
    code, out, err = run(config)
    assert code == 0
    assert "-fsdp: [full_shard]   # all of it\n" in out and "+fsdp_version: 2\n" in out
    assert "Nothing was written" in err and "fsdp removed" in err
    assert config.read_text() == TEXT and os.listdir(tmp_path) == ["config.yml"]


def test_in_place_keeps_every_older_file(run, config, tmp_path):
    config.chmod(0o640)
    (tmp_path / "config.yml.bak").write_text("mine")
    code, _, err = run(config, "--in-place")
    assert code == 0 and "config.yml.bak2" in err
    assert (tmp_path / "config.yml.bak").read_text() == "mine"
    assert (tmp_path / "config.yml.bak2").read_text() == TEXT
    assert "fsdp_version: 2" in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    migrated = config.read_text()
    code, out, err = run(config, "--in-place")
    assert (code, out) == (0, "") and "needs no change" in err
    assert config.read_text() == migrated
    assert len(os.listdir(tmp_path)) == 3


def test_a_link_stays_a_link(run, config, tmp_path):
    link = tmp_path / "link.yml"
    link.symlink_to(config)
    assert run(link, "--in-place")[0] == 0
    assert link.is_symlink() and "fsdp_version: 2" in config.read_text()


def test_out(run, config, tmp_path):
    code, _, err = run(config, "--out", "new.yml")
    assert code == 0 and "Wrote new.yml" in err
    assert config.read_text() == TEXT
    code, _, err = run(tmp_path / "new.yml", "--out", "same.yml")
    assert code == 0
    assert (tmp_path / "same.yml").read_text() == (tmp_path / "new.yml").read_text()


def test_json(run, config):
    code, out, _ = run(config, "--json", "--in-place")
    document = json.loads(out)
    assert code == 0
    assert document["changed"] and document["kind"] == "axolotl"
    assert document["written"] == str(config) and document["backup"] == f"{config}.bak"
    assert document["result"] == config.read_text()
    assert document["diff"].startswith("--- ") and len(document["warnings"]) == 1
    code, out, _ = run(config, "--json")
    assert json.loads(out)["changed"] is False and json.loads(out)["written"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--in-place", "--out", "x.yml"), "exclude each other"),
        (("--out", "config.yml"), "--in-place changes the file itself"),
        (("--out", "taken.yml"), "it was left as it is"),
        (("--out", "nowhere/x.yml"), "no folder"),
        (("--gpus", "8"), "belong together"),
        (("--gpus", "8", "--nodes", "3"), "evenly"),
        (("--gpus", "0", "--nodes", "1"), "above 0"),
    ],
)
def test_flags_that_make_no_sense(run, config, tmp_path, argv, words):
    (tmp_path / "taken.yml").write_text("mine")
    code, out, err = run("config.yml", *argv)
    assert code == 2 and words in err and not out
    assert config.read_text() == TEXT
    assert sorted(os.listdir(tmp_path)) == ["config.yml", "taken.yml"]


def test_what_cannot_be_read(run, tmp_path):
    assert run("none.yml")[0] == 2
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    code, _, err = run("binary.yml", "--in-place")
    assert code == 2 and "UTF-8" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["binary.yml"]


def test_a_folder_that_takes_no_file(run, config, tmp_path, monkeypatch):
    """The copy comes first: where it cannot be made, the file stays as it is."""

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autotune.cli.backup.back_up", refuse)
    code, _, err = run(config, "--in-place")
    assert code == 2 and "No space left on device" in err and "as it was" in err
    assert config.read_text() == TEXT
