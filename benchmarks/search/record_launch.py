"""One launch of an arm, and what of it becomes rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from record_clock import LaunchClock
from record_rows import Row, rows_of, rungs_of
from record_spaces import Arm, Landscape

from autotune.errors import AutotuneError
from autotune.spec.model import load_model
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops, needed_ops
from autotune.trial.protocol import Measurement, ModelSource, Request
from autotune.trial.ranks import Starter

LAUNCH_LIMIT_S = 300.0
HANG_S = 120.0
CAPPED_S = 4.0
"""A rung counts fewer steps, three at least, where they would take longer than this."""


class Launcher:
    """Starts the arms of a landscape and reads what their ranks measured.

    Args:
        landscape: What is recorded.
        steps: Counted steps of a rung, at most.
        folder: For the launches' requests, results and logs.
        starters: What starts a launch, by its mode.
        mode: How the launches that count are started, ``fork`` or ``cold``.
    """

    def __init__(
        self,
        landscape: Landscape,
        steps: int,
        folder: Path,
        starters: Callable[[str], Starter],
        mode: str,
    ) -> None:
        self._landscape = landscape
        self._model = load_model(landscape.model)
        self._folder = folder
        self._starters = starters
        self.mode = mode
        self._built: set[tuple[str, ...]] = set()
        self.versions: dict[str, str] = {}
        self.measurement = Measurement(
            warmup_steps=1,
            min_steps=min(3, steps),
            max_steps=steps,
            target_seconds=CAPPED_S,
            max_direct_accumulation=landscape.global_batch_size,
            target_relative_interval=0.0,  # the count alone ends a rung
        )

    def warm_up(self, arm: Arm) -> None:
        """Start what forks on every host: the first launch would pay for it."""
        folder = self._folder / "0000-warm-up"
        request = self._request(arm, folder)
        limits = Limits(deadline_s=LAUNCH_LIMIT_S, hang_s=HANG_S)
        ended = run_launch(request, folder, limits, starter=self._starters(self.mode))
        self._check_start(ended, self.mode)

    def launch(self, arm: Arm, *, round_number: int, number: int, mode: str) -> list[Row]:
        """Run the arm's ladder in one launch; return a row for each rung that was reached."""
        folder = self._folder / f"{number:04d}-{arm.name.replace(' ', '-')}"
        request = self._request(arm, folder)
        ops = tuple(needed_ops(arm.first, self._landscape.device))
        if ops not in self._built:  # to look costs an import of DeepSpeed
            build_native_ops(request, folder)
            self._built.add(ops)
        limits = Limits(deadline_s=LAUNCH_LIMIT_S, hang_s=HANG_S)
        starter = self._starters(mode)
        clock = LaunchClock(folder=folder, num_ranks=self._landscape.ranks)
        ended = run_launch(request, folder, limits, on_tick=clock.look, starter=starter)
        clock.look()
        self._check_start(ended, mode)
        found = next((result.versions for result in ended.results if result.versions), {})
        self.versions = found or self.versions
        return rows_of(
            arm, request, ended, clock, round_number=round_number, launch=number, mode=mode
        )

    def _check_start(self, ended: Ended, mode: str) -> None:
        """Refuse ranks that started otherwise than their rows would say."""
        started = {result.start for result in ended.results if result.versions}
        if started - {mode}:
            notes = "; ".join(ended.notes)
            raise AutotuneError(f"Ranks were to start by {mode}, and did by {started}: {notes}")

    def _request(self, arm: Arm, folder: Path) -> Request:
        landscape = self._landscape
        return Request(
            launch_id=folder.name,
            mode="trial",
            model=ModelSource(name=self._model.name, config=self._model.hf_config),
            plan=arm.first.to_dict(),
            workload=landscape.workload(),
            device=landscape.device,
            out_dir=str(folder.resolve()),
            rungs=rungs_of(arm.plans),
            measurement=self.measurement,
            memory_limit_bytes=landscape.memory_limit_bytes(),
        )
