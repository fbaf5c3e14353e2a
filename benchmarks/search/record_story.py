"""NAME.json: what a landscape is of, where and with what it was measured, and how long it took."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record_rows import COLUMNS, Row
from record_spaces import Landscape, arms_of

from autotune.errors import AutotuneError
from autotune.spec.hardware import cpu_name
from autotune.spec.model import load_model
from autotune.trial.protocol import Measurement

SCHEMA_VERSION = 1
_COMPARED = ("model", "workload", "hardware", "memory_limit_bytes", "space", "measurement")
"""What must not differ between the sessions that record one landscape."""


class Story:
    """The file beside the rows; kept up to date after every launch.

    Raises:
        AutotuneError: it is of another landscape than the one that is gone on with.
    """

    def __init__(
        self,
        path: Path,
        landscape: Landscape,
        measurement: Measurement,
        network: dict[str, Any] | None,
    ) -> None:
        self._path = path
        told = describe(landscape, measurement)
        held = json.loads(path.read_text()) if path.exists() else {}
        differ = [name for name in _COMPARED if held and _differ(held.get(name), told[name])]
        if differ:
            raise AutotuneError(
                f"{path} is of another {' and '.join(differ)}. Record into another folder "
                "(--out), or remove the old landscape."
            )
        self._told: dict[str, Any] = {**told, "network": network, "sessions": []}
        self._told["cold_launch_ready_s"] = held.get("cold_launch_ready_s", {})
        self._told["sessions"] = [*held.get("sessions", []), self._session()]
        self._write()

    def _session(self) -> dict[str, Any]:
        return {
            "command": shlex.join(["python", *sys.argv]),
            "commit": _commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "load_average_at_start": os.getloadavg()[0],
            "launches": 0,
            "measured_s": 0.0,
            "outcomes": {},
        }

    def after(
        self, engine: str, rows: Sequence[Row], wall_s: float, versions: dict[str, str]
    ) -> None:
        """Take in a launch."""
        session = self._told["sessions"][-1]
        session["launches"] += 1
        session["measured_s"] += wall_s
        session["versions"] = versions or session.get("versions", {})
        session["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for row in rows:
            session["outcomes"][row.outcome] = session["outcomes"].get(row.outcome, 0) + 1
        if rows[0].round == 0 and rows[0].launch_ready_s is not None:
            self._told["cold_launch_ready_s"][engine] = rows[0].launch_ready_s
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self._told, indent=1) + "\n")
        os.replace(temporary, self._path)


def describe(landscape: Landscape, measurement: Measurement) -> dict[str, Any]:
    """Return what is fixed before anything is measured."""
    model, hardware = load_model(landscape.model), landscape.hardware()
    arms, refused = arms_of(landscape)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": landscape.name,
        "about": landscape.about,
        "model": {"name": model.name, "num_parameters": model.num_parameters},
        "workload": landscape.workload().model_dump(mode="json"),
        "data": "synthetic documents (no --data)",
        "hardware": {
            "device": landscape.device,
            "gpu": hardware.gpu.name,
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "ranks": landscape.ranks,
            "num_nodes": hardware.num_nodes,
            "gpus_per_node": hardware.gpus_per_node,
            "inter_node_bytes_per_s": hardware.inter_node.bytes_per_s,
            "memory_bytes": hardware.gpu.memory_bytes,
        },
        "memory_limit_bytes": landscape.memory_limit_bytes(),
        "space": {
            "strategies": list(landscape.strategies),
            "recomputed": list(landscape.recomputed) if landscape.recomputed else None,
            "micro_batches": list(landscape.micro_batches),
            "cp_degrees": list(landscape.cp_degrees),
            "only": list(landscape.only) if landscape.only else None,
            "recompute": [str(mode) for mode in landscape.recompute],
            "arms": len(arms),
            "points": sum(len(arm.plans) for arm in arms),
        },
        "refused": refused,
        "left_out": landscape.left_out,
        "measurement": measurement.model_dump(mode="json"),
        "columns": COLUMNS,
    }


def network_of(link: Any, rate_mbit: int | None) -> dict[str, Any]:
    """Return what stands between the hosts: what was asked for, and what TCP made of it."""
    how = "network namespaces joined by a veth pair, tc tbf each way, half of the cores each"
    return {"how": how, "rate_mbit": rate_mbit, **asdict(link)}


def _differ(held: Any, told: Any) -> bool:
    """Say whether two descriptions differ in what both state: a later version may state more."""
    told = json.loads(json.dumps(told))
    if isinstance(held, dict) and isinstance(told, dict):
        return any(held[key] != told[key] for key in held.keys() & told.keys())
    return bool(held != told)


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None
