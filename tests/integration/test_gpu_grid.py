"""The grid of `make gpu`, on one CPU rank: everything but the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_grid.py"


def grid(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


SMALL = (
    "--device", "cpu", "--model", "tiny-qwen3", "--seq-len", "64", "--global-batch-size", "2",
    "--seconds", "0.2", "--strategies", "fsdp2", "--out", "found",
)  # fmt: skip


def document_of(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "found" / "grid.json").read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.slow
def test_one_launch_on_a_cpu_rank(tmp_path: Path) -> None:
    done = grid(tmp_path, *SMALL, "--only", "fsdp2-lora")
    assert done.returncode == 0, done.stdout + done.stderr
    document = document_of(tmp_path)
    assert [(row["adapter"], row["micro_batch_size"]) for row in document["rows"]] == [
        ("lora", 1),
        ("lora", 2),
    ]
    assert all(row["predicted_bytes"] and row["measured_bytes"] for row in document["rows"])
    assert document["errors"][-1]["num_memory_errors"] == 2
    assert document["versions"]["torch"] and not document["skipped"]
    assert len((tmp_path / "found" / "grid.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_grid_on_a_cpu_rank(tmp_path: Path) -> None:
    done = grid(tmp_path, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [
        (row["adapter"], row["recompute"], row["micro_batch_size"], row["outcome"])
        for row in document_of(tmp_path)["rows"]
    ] == [
        ("", "none", 1, "ok"),
        ("", "none", 2, "ok"),
        ("", "full", 1, "ok"),
        ("", "full", 2, "ok"),
        ("lora", "none", 1, "ok"),
        ("lora", "none", 2, "ok"),
    ]


def test_an_unknown_launch_is_refused(tmp_path: Path) -> None:
    done = grid(tmp_path, *SMALL, "--only", "fsdp3")
    assert done.returncode == 2
    assert "fsdp3" in done.stderr and "fsdp2-full" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = grid(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0
    assert "No CUDA GPU here" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_budget_that_is_spent_skips_the_rest(tmp_path: Path) -> None:
    done = grid(
        tmp_path, "--device", "cpu", "--strategies", "ddp", "--budget", "0.000001s",
        "--out", "found",
    )  # fmt: skip
    document = json.loads((tmp_path / "found" / "grid.json").read_text())
    assert done.returncode == 1 and not document["rows"]
    assert {skipped["configuration"] for skipped in document["skipped"]} == {
        "ddp", "ddp-full", "ddp-lora",
    }  # fmt: skip
