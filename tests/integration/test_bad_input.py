"""What a user can get wrong, through the real command: one message, the exit code, no traceback."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from autotune.trial.protocol import REQUEST_FILE
from tests.integration.commands import AUTOTUNE, autotune, search_command, write_model
from tests.unit.report_studies import make_plan, make_record

pytestmark = pytest.mark.integration

SEARCH = "search --model tiny-qwen3 --gpus 2 --device cpu"

WRONG = [
    pytest.param(
        "search --model qwen3-8b --gpus 8", 2, ["autotune plan", "--device cpu"], id="no GPU"
    ),
    pytest.param(
        "plan --model qwen3-8bb --gpus 8 --gpu-type h100-sxm",
        2,
        ["'qwen3-8bb'", "Nearest: qwen3-8b"],
        id="unknown model",
    ),
    pytest.param(
        "plan --model llama-3.1-70b --gpus 1 --gpu-type a100-40gb",
        1,
        ["Closest:", "GiB too much"],
        id="too large for any strategy",
    ),
    pytest.param(
        f"{SEARCH} --seq-len 1023 --sequence-parallel 2",
        2,
        ["1023 tokens", "1022 or 1024"],
        id="sequence does not divide",
    ),
    pytest.param(
        f"{SEARCH} --global-batch-size 63 --sequence-parallel 1",
        2,
        ["63", "62 or 64"],
        id="global batch does not divide",
    ),
    pytest.param(
        f"{SEARCH} --strategies zero4", 2, ["'zero4'", "Nearest: zero"], id="unknown strategy"
    ),
    pytest.param(
        f"{SEARCH} --memory-limit 1MiB",
        1,
        ["1.0 MiB", "MiB too much"],
        id="memory limit too small for anything",
    ),
    pytest.param(f"{SEARCH} --memory-limit much", 2, ["'much'", "600MiB"], id="no size"),
    pytest.param(f"{SEARCH} --data nowhere.jsonl", 2, ["nowhere.jsonl"], id="missing data"),
    pytest.param(f"{SEARCH} --data nosuch", 2, ["'nosuch' is neither"], id="no data's name"),
    pytest.param(f"{SEARCH} --gpus 640", 2, ["640", "--gpus"], id="more ranks than cores bear"),
    pytest.param("train nowhere.yml", 2, ["nowhere.yml", "no such file"], id="missing file"),
    pytest.param("serch", 2, ["'serch'", "search"], id="unknown verb"),
]


def assert_refused(command: list[str], code: int, said: list[str], where: Path) -> None:
    done = autotune(*command, cwd=where)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert done.stdout == ""
    messages = [line for line in done.stderr.splitlines() if line.startswith("autotune: ")]
    assert len(messages) == 1, done.stderr
    for words in said:
        assert words in done.stderr


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("command", "code", "said"), WRONG)
def test_wrong_flags(command: str, code: int, said: list[str], tmp_path: Path) -> None:
    assert_refused(command.split(), code, said, tmp_path)
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("learning_rate: [1\nfoo: 1\n", ["line 3"], id="malformed"),
        pytest.param("learning_rat: 1\n", ["`learning_rat`", "Nearest: learning_rate"], id="key"),
        pytest.param("learning_rate: 0.001\n", ["names no datasets", "--data"], id="no data"),
        pytest.param("learning_rate: fast\n", ["learning_rate", "'fast'"], id="value"),
    ],
)
def test_wrong_configuration(text: str, said: list[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    config.write_text("base_model: tiny-qwen3\n" + text)
    assert_refused(["train", str(config), "--device", "cpu"], 2, said, tmp_path)
    assert list(tmp_path.iterdir()) == [config]


def write_run(folder: Path, data: Path) -> Path:
    config = folder / "run.yml"
    config.write_text(
        f"base_model: {write_model(folder / 'model')}\n"
        "sequence_len: 256\nlearning_rate: 0.001\nmax_steps: 1\n"
        f"output_dir: {folder / 'out'}\n"
        f"datasets: [{{path: {data}, type: alpaca}}]\n"
    )
    return config


def test_wrong_columns_found_by_a_rank_are_one_message(tmp_path: Path) -> None:
    """The data is read inside the ranks; a corrected file then trains in the same folder."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    config = write_run(tmp_path, data)
    command = ["train", str(config), "--device", "cpu", "--gpus", "2"]
    said = ["needs the column 'instruction'", "found: prompt, answer", "data.jsonl:1"]
    assert_refused(command, 2, said, tmp_path)
    row = {"instruction": "say it", "output": "it it"}
    data.write_text((json.dumps(row) + "\n") * 200)
    done = autotune(*command)
    assert done.returncode == 0, done.stderr


def test_train_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    config = write_run(tmp_path, tmp_path / "data.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n')
    before = fingerprints(tmp_path)
    command = ["train", str(config), "--device", "cpu"]
    assert_refused(command, 2, ["holds another run (log.jsonl)", "--resume"], tmp_path)
    assert_refused([*command, "--resume"], 2, ["no checkpoint"], tmp_path)
    assert_refused([*command, "--resume", "nowhere"], 2, ["nowhere is not a checkpoint"], tmp_path)
    assert fingerprints(tmp_path) == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its study as the command writes it, stopped before its first launch."""
    folder = tmp_path_factory.mktemp("begun")
    done = autotune(*words_of(folder, folder / "study"), "--budget", "0.001s")
    assert (folder / "study" / "study.json").exists(), done.stderr
    return folder


@pytest.fixture
def study(begun: Path, tmp_path: Path) -> Path:
    """The test's own copy of the study."""
    return shutil.copytree(begun / "study", tmp_path / "study")


def words_of(tmp_path: Path, folder: Path, *more: str) -> list[str]:
    command = search_command(write_model(tmp_path / "model"), folder, *more)
    return command[len(AUTOTUNE) :]


def test_what_a_search_will_not_measure_is_said_and_recorded(tmp_path: Path) -> None:
    """7 sequences do not divide over 2 data-parallel ranks, and 3 does not divide 7."""
    command = words_of(tmp_path, tmp_path / "study", "--budget", "0.001s")
    for flag, value in (
        ("--global-batch-size", "7"),
        ("--sequence-parallel", "1,2"),
        ("--micro-batches", "1,3"),
    ):
        command[command.index(flag) + 1] = value
    done = autotune(*command)
    lines = done.stderr.splitlines()
    (uneven,) = [i for i, line in enumerate(lines) if "not measured: AT103 x 2: " in line]
    (dropped,) = [i for i, line in enumerate(lines) if "not measured: AT104 x 2: " in line]
    assert "7" in lines[uneven] and "micro_batch_size 3" in lines[dropped]
    rejected = json.loads((tmp_path / "study" / "summary.json").read_text())["rejected"]
    assert sorted(each["code"] for each in rejected) == ["AT103", "AT103", "AT104", "AT104"]


def test_a_folder_that_holds_another_study_is_left_as_it_is(tmp_path: Path, study: Path) -> None:
    (study / ".lock").unlink()
    record = make_record(make_plan())
    (study / "trials.jsonl").write_text(json.dumps(record.to_dict()) + "\n")
    before = fingerprints(study)
    other = [*words_of(tmp_path, study), "--seq-len", "32"]
    said = ["holds another study", "workload.seq_len is 64 there, 32 here", "--out"]
    assert_refused(other, 2, said, tmp_path)
    assert fingerprints(study) == before


def test_a_study_in_use_is_refused(tmp_path: Path, study: Path) -> None:
    before = fingerprints(study)
    with (study / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(words_of(tmp_path, study), 2, ["Another search is running"], tmp_path)
    assert fingerprints(study) == before


@pytest.mark.parametrize("content", ['{"a": ', "[]", ""])
def test_a_corrupt_study_is_refused(content: str, tmp_path: Path, study: Path) -> None:
    (study / "study.json").write_text(content)
    before = fingerprints(study)
    assert_refused(words_of(tmp_path, study), 2, ["study.json", "--out"], tmp_path)
    assert fingerprints(study) == before


def test_a_folder_or_file_that_is_no_study_is_left_as_it_is(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert_refused(words_of(tmp_path, taken), 2, ["holds no study", "--out"], tmp_path)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    file = taken / "thesis.txt"
    assert_refused(words_of(tmp_path, file), 2, ["is a file", "--out"], tmp_path)


def test_wrong_data_ends_a_search_at_its_first_launch(tmp_path: Path) -> None:
    """Every launch would meet the same mistake, so no trial is recorded as a failure."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    out = tmp_path / "study"
    command = words_of(tmp_path, out, "--data", str(data), "--data-type", "alpaca")
    assert_refused(command, 2, ["found: prompt, answer"], tmp_path)
    assert len(list((out / "launches").glob(f"*/{REQUEST_FILE}"))) == 1
    assert not (out / "trials.jsonl").exists() or (out / "trials.jsonl").read_text() == ""
