"""The process edge of a rank: whatever stops it, its result file says what, and is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from autotune.errors import AutotuneError
from autotune.runner import rank as edge
from autotune.runner.checks import InvalidRunError
from autotune.trial.protocol import (
    Outcome,
    RankError,
    RankResult,
    rank_result_file,
    read_message,
    write_message,
)
from tests.integration.ranks import make_plan, trial_request

pytestmark = pytest.mark.integration


class Ended(BaseException):
    pass


def error_of(
    raised: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> RankError:
    """Run a rank whose work raises, in this process; return what its result says."""

    def run(*_: Any) -> None:
        raise raised

    def end(code: int) -> None:
        assert code == 1
        raise Ended

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("AUTOTUNE_LAUNCH_DIR", str(folder))):
        monkeypatch.setenv(name, value)
    file = folder / "request.json"
    write_message(trial_request(make_plan("ddp", 1), folder, rungs=[(1, 1)], **changes), file)
    monkeypatch.setattr(edge, "die_with_parent", lambda: None)
    monkeypatch.setattr(edge, "_run", run)
    monkeypatch.setattr(edge.os, "_exit", end)
    with pytest.raises(Ended):
        edge.run_rank(file)
    result = read_message(RankResult, folder / rank_result_file(0))
    assert result.complete and result.error is not None
    return result.error


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (CheckpointException("load", {0: (OSError("no shard"), None)}), "CheckpointException: "),
        (SystemExit(3), "SystemExit: 3"),
        (KeyError("momentum"), "KeyError: 'momentum'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_is_no_exception_of_ours_is_named(
    raised: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's CheckpointException is a BaseException alone."""
    error = error_of(raised, tmp_path, monkeypatch)
    assert error.message.startswith(message)
    assert (error.outcome, error.user_mistake) == (Outcome.CRASHED, False)
    assert type(raised).__name__ in error.traceback


def test_a_users_mistake_is_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(AutotuneError("Give a file."), tmp_path, monkeypatch)
    assert (error.message, error.user_mistake) == ("Give a file.", True)


def test_a_failed_check_is_its_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(InvalidRunError("asked for ZeRO"), tmp_path, monkeypatch)
    assert (error.message, error.outcome) == ("asked for ZeRO", Outcome.INVALID)


def test_host_memory_of_a_gpu_rank_is_not_its_device_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")
    assert error_of(refused, tmp_path, monkeypatch).outcome is Outcome.OOM
    error = error_of(refused, tmp_path, monkeypatch, device="cuda")
    assert error.outcome is Outcome.HOST_OOM


def test_memory_is_told_whatever_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(MemoryError("too much"), tmp_path, monkeypatch)
    assert (error.message, error.outcome) == ("MemoryError: too much", Outcome.OOM)
