"""What lies in a launch's folder from before is not taken for its answer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from autotune import training
from autotune.plan import Engine, Plan
from autotune.spec.workload import Workload
from autotune.trial.folder import numbered_launches, read_results
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.protocol import (
    REQUEST_FILE,
    ModelSource,
    Outcome,
    RankResult,
    Request,
    heartbeat_file,
    rank_result_file,
    read_message,
    write_message,
)
from autotune.trial.ranks import LocalRank


def make_request(folder: Path) -> Request:
    return Request(
        launch_id="0002",
        mode="train",
        model=ModelSource(name="m", config={}),
        plan=Plan(strategy="ddp", engine=Engine.DDP).to_dict(),
        workload=Workload(),
        device="cpu",
        out_dir=str(folder),
    )


def write_result(folder: Path, launch_id: str) -> None:
    result = RankResult(launch_id=launch_id, rank=0, world_size=1, complete=True)
    write_message(result, folder / rank_result_file(0))


class Brief:
    """Starts ranks that end at once, after `leave` left something in the folder."""

    def __init__(self, leave: Callable[[Path], None]) -> None:
        self._leave = leave

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> LocalRank:
        self._leave(folder)
        return LocalRank(subprocess.Popen(["true"], start_new_session=True))

    def kill_stragglers(self, tag: str) -> None:
        pass

    def lost(self) -> None:
        return None

    def notes(self) -> list[str]:
        return []


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_result_of_another_launch_is_not_read(when: str, tmp_path: Path) -> None:
    """A rank that dies without a word, where an earlier one left a complete result."""

    def leave(folder: Path) -> None:
        if when == "during":
            write_result(folder, "0002")

    if when == "before":
        write_result(tmp_path, "0002")
        (tmp_path / heartbeat_file(0)).touch()
    limits = Limits(deadline_s=60, hang_s=60)
    ended = run_launch(make_request(tmp_path), tmp_path, limits, starter=Brief(leave))
    assert ended.outcome is Outcome.CRASHED
    assert not ended.results[0].complete
    assert not (tmp_path / heartbeat_file(0)).exists()


def test_a_result_of_the_folders_own_request_is_read(tmp_path: Path) -> None:
    write_message(make_request(tmp_path), tmp_path / REQUEST_FILE)
    write_result(tmp_path, "0002")
    assert [result.complete for result in read_results(tmp_path)] == [True]
    write_result(tmp_path, "0002-another")
    assert [result.complete for result in read_results(tmp_path)] == [False]


def test_two_launches_of_one_request_are_told_apart(tmp_path: Path) -> None:
    def leave(folder: Path) -> None:
        write_result(folder, read_message(Request, folder / REQUEST_FILE).launch_id)

    request, limits = make_request(tmp_path), Limits(deadline_s=60, hang_s=60)
    first, second = (run_launch(request, tmp_path, limits, starter=Brief(leave)) for _ in range(2))
    assert first.outcome is second.outcome is Outcome.OK
    assert first.results[0].launch_id != second.results[0].launch_id


def test_a_deleted_folder_does_not_give_its_number_again(tmp_path: Path, monkeypatch) -> None:
    used: list[str] = []

    def run(request: Request, folder: Path, *args: object, **more: object) -> Ended:
        used.append(folder.name)
        return Ended(
            outcome=Outcome.OK, message="", rank=None, exit_codes=[0], elapsed_s=1.0, results=[]
        )

    monkeypatch.setattr(training, "run_launch", run)
    launches = tmp_path / training.LAUNCHES
    for name in ("0002", "0010", "notes.txt"):
        (launches / name).mkdir(parents=True)
    training.train(make_request(tmp_path), training.TrainLog(tmp_path, None))  # type: ignore[arg-type]
    assert used == ["0011"]
    assert [number for number, _ in numbered_launches(launches)] == [2, 10]
