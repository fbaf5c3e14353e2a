"""`optuna-dashboard` reads the journal of a study: its trials, their values, how each ended."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("optuna")

from autotune.planner import rank_plans
from autotune.search.asker import JOURNAL_FILE, Asker, journal_of
from autotune.search.policy import Charge, Offer, Stop
from autotune.search.samplers import make_sampler
from autotune.search.space import make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

COMMAND = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None or COMMAND is None,
    reason="optuna-dashboard is not installed (pip install optuna-dashboard)",
)


def _tell_a_ladder(folder: Path) -> list[TrialRecord]:
    """What a search writes after a launch: two micro batches that ran, one out of memory."""
    ranking = rank_plans(
        load_model("tiny-qwen3"), Workload(), load_hardware("cpu", 2), load_strategies(["zero1"])
    )
    families = make_families(ranking.candidates)[0]
    asker = Asker(journal_of(folder), families, make_sampler("tpe", families, seed=0), seed=0)
    asker.recover([])
    asked = asker.ask(Offer(rungs={family.name: family.ladder for family in families}))
    assert not isinstance(asked, Stop)
    family = asked.family
    outcomes = (Outcome.OK, Outcome.OK, Outcome.OOM)
    records = [
        TrialRecord(
            launch=1,
            plan_id=estimate.plan.id,
            outcome=outcome,
            message="",
            plan=estimate.plan.to_dict(),
            tokens_per_s=1234.5 * number if outcome is Outcome.OK else None,
        )
        for number, (estimate, outcome) in enumerate(
            zip(family.ladder, outcomes, strict=False), start=1
        )
    ]
    for record in records:
        asker.tell(family, record, Charge(seconds=1.0, opened=record is records[0]))
    asker.abandon(family)
    return records


def _get(address: str, limit_s: float = 60.0) -> Any:
    until = time.monotonic() + limit_s
    while True:
        try:
            with urlopen(address, timeout=10) as answer:
                return json.load(answer)
        except URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)


def test_dashboard_shows_trials_values_and_outcomes(tmp_path):
    records = _tell_a_ladder(tmp_path)
    assert len(records) == 3
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            str(COMMAND), "--quiet", "--port", str(port),
            "--storage-class", "JournalFileStorage", str(tmp_path / JOURNAL_FILE),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        api = f"http://127.0.0.1:{port}/api/studies"
        (study,) = _get(api)["study_summaries"]
        assert study["study_name"] == "autotune" and study["directions"] == ["maximize"]
        trials = _get(f"{api}/{study['study_id']}")["trials"]
    finally:
        server.terminate()
        server.wait(timeout=20)
    shown = {
        attributes["plan_id"]: (trial["state"], trial["values"], attributes["outcome"])
        for trial in trials
        if "plan_id" in (attributes := {a["key"]: a["value"] for a in trial["user_attrs"]})
    }
    assert shown == {
        record.plan_id: ("Complete", [record.tokens_per_s or 0.0], str(record.outcome))
        for record in records
    }
