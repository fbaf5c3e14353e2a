"""A search survives what happens to it: a killed rank, its own death, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from autotune.trial.processes import tagged_processes
from tests.integration.commands import (
    assert_nothing_left,
    finished_rungs,
    rank_pid,
    rank_pids,
    search_command,
    start,
    wait_until,
    write_model,
)

pytestmark = pytest.mark.integration


def records(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]


def launches(study: Path) -> list[Path]:
    return sorted((study / "launches").glob("*"))


def journal_states(study: Path) -> Counter[str]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(study / "study.journal")))
    trials = optuna.load_study(study_name="autotune", storage=storage).get_trials()
    return Counter(trial.state.name for trial in trials)


def wait_for_rung(study: Path, number: int) -> Path:
    """Wait until launch `number` has finished a rung on both ranks; return its folder."""

    def reached() -> bool:
        started = launches(study)
        return len(started) >= number and all(
            finished_rungs(started[number - 1], rank) >= 1 for rank in (0, 1)
        )

    wait_until(reached, f"launch {number} to finish its first rung")
    return launches(study)[number - 1]


def test_a_killed_rank_and_a_killed_search_lose_and_repeat_nothing(tmp_path: Path) -> None:
    study, log = tmp_path / "study", tmp_path / "log"
    command = search_command(write_model(tmp_path / "model"), study)
    search = start(command, log)
    first = wait_for_rung(study, 1)
    os.kill(rank_pid(first, 1), signal.SIGKILL)
    second = wait_for_rung(study, 2)
    assert rank_pids(second)
    search.kill()
    search.wait()
    wait_until(
        lambda: not tagged_processes("AUTOTUNE_STUDY", str(study.resolve())),
        "the ranks of the killed search to die with it",
        5,
    )
    assert search.returncode == -signal.SIGKILL
    before = (study / "trials.jsonl").read_bytes()
    killed_rank = [row for row in records(study) if row["launch"] == 1]
    assert killed_rank[0]["outcome"] == "ok"
    assert killed_rank[-1]["outcome"] == "crashed"
    assert "rank 1 was killed by SIGKILL" in killed_rank[-1]["message"]
    assert {row["launch"] for row in records(study)} <= {1, 2}
    assert journal_states(study)["RUNNING"] == 1, "the search was killed with its trial open"

    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    after = (study / "trials.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    rows = records(study)
    assert not [plan for plan, count in Counter(r["plan_id"] for r in rows).items() if count > 1]
    by_launch = {row["plan_id"]: row["launch"] for row in rows}
    other = [row for row in rows if row["plan"]["strategy"] != killed_rank[0]["plan"]["strategy"]]
    assert [row["plan"]["micro_batch_size"] for row in other] == [1, 2, 4]
    assert [row["outcome"] for row in other] == ["ok"] * 3
    assert by_launch[other[0]["plan_id"]] == 2, "the rung that was finished is not measured again"
    assert by_launch[other[2]["plan_id"]] == 3
    assert journal_states(study)["RUNNING"] == 0
    summary = json.loads((study / "summary.json").read_text())
    assert summary["stopped_because"] == "every configuration of the space was tried"

    third = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert third.returncode == 0, third.stderr
    assert (study / "trials.jsonl").read_bytes() == after
    assert len(launches(study)) == 3


@pytest.mark.parametrize(
    "impatient",
    [pytest.param(False, id="once", marks=pytest.mark.slow), pytest.param(True, id="twice")],
)
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_rank(tmp_path: Path, impatient: bool) -> None:
    study, log = tmp_path / "study", tmp_path / "log"
    search = start(search_command(write_model(tmp_path / "model"), study), log)
    launch = wait_for_rung(study, 1)
    if impatient:
        # A stopped rank does not hear the polite signal, so that stopping takes its full time.
        os.kill(rank_pid(launch, 1), signal.SIGSTOP)
    search.send_signal(signal.SIGINT)
    while impatient and search.poll() is None:  # somebody leans on the key
        time.sleep(0.005)
        search.send_signal(signal.SIGINT)
    assert search.wait(timeout=30) == 130, log.read_text()
    assert_nothing_left(launch)
    text = log.read_text()
    assert "Traceback" not in text and "The same command resumes" in text
    kept = records(study)
    assert kept and {row["outcome"] for row in kept} == {"ok"}
    assert journal_states(study)["RUNNING"] == 0
    assert json.loads((study / "summary.json").read_text())["stopped_because"] == "interrupted"
    assert (study / "best.yml").exists()
