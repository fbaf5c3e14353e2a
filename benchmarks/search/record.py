"""Record a landscape: every configuration of a space, really measured, with repeats.

    python benchmarks/search/record.py cpu2-s128

Writes landscapes/NAME.csv (a row a round and plan, see `record_rows`) and NAME.json (what was
measured, where, with what, and what was left out). The same command goes on where it stopped.

Round 0 starts one arm of each engine cold, for what a start without a preloaded process costs.
Round 1 launches every arm, its whole ladder of micro batches at the true accumulations; after a
failed rung the ones above it are launched alone, so that every point is measured. The rounds after
it repeat the better half of the points, by round 1, in fresh launches. The arms of a round run in a
shuffled order of its own, so that drift meets all alike.

``--cold-only`` stops after round 0 and prints how long the rest will take; ``--list`` measures
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from record_hosts import follow_leader, on_both_hosts, starters_of
from record_launch import Launcher
from record_rows import Row, RowFile
from record_spaces import LANDSCAPES, Arm, Landscape, arms_of, landscape_named, numbered
from record_story import Story

from autotune.errors import AutotuneError
from autotune.spec.nvml import nvml_devices
from autotune.units import format_duration

FOLDER = Path(__file__).parent / "landscapes"
ROUNDS = 3
BETTER = 0.5
"""Share of the points that rounds 2 and up repeat."""


class Recorder:
    """One landscape being recorded."""

    def __init__(
        self, landscape: Landscape, launcher: Launcher, rows: RowFile, story: Story, rounds: int
    ) -> None:
        self._landscape = landscape
        self._launcher = launcher
        self._rows = rows
        self._story = story
        self._rounds = rounds
        self._arms, _ = arms_of(landscape)
        self._spent_s = 0.0

    def record(self, *, cold_only: bool) -> None:
        """Run what is missing of every round."""
        self._cold_round()
        self._print_projection()
        if cold_only:
            return
        if self._launcher.mode == "fork":
            plainest = self._arms[0]
            self._launcher.warm_up(Arm(name=plainest.name, plans=plainest.plans[-1:]))
        for number in range(1, self._rounds + 1):
            self._round(number)

    def _cold_round(self) -> None:
        engines: dict[str, Arm] = {}
        for arm in self._arms:  # sorted by name: the plainest arm of an engine comes first
            engines.setdefault(arm.engine, arm)
        for arm in engines.values():
            missing = _without(arm, self._rows.measured(0))
            if missing is not None and len(missing.plans) == len(arm.plans):
                self._launch(missing, 0, "cold")

    def _round(self, number: int) -> None:
        arms = self._arms if number == 1 else better_part(self._arms, self._rows.rows)
        order = random.Random(number).sample(arms, len(arms))
        done = 0
        for arm in order:
            # After a failed rung the next launch starts above it, until every plan has its row.
            while (missing := _without(arm, self._rows.measured(number))) is not None:
                self._launch(missing, number, self._launcher.mode)
            done += 1
            left_s = self._left_s(number, done, len(arms))
            print(
                f"round {number}/{self._rounds}: {done} of {len(arms)} arms, "
                f"{format_duration(self._spent_s)} so far, about {format_duration(left_s)} left",
                flush=True,
            )

    def _launch(self, arm: Arm, round_number: int, mode: str) -> None:
        number = self._rows.next_launch()
        rows = self._launcher.launch(arm, round_number=round_number, number=number, mode=mode)
        if not rows:
            raise AutotuneError(f"Launch {number} of {arm.name} measured nothing; see its logs.")
        self._rows.add(rows)
        wall_s = launch_wall_s(rows)
        self._spent_s += wall_s
        self._story.after(arm.engine, rows, wall_s, self._launcher.versions)
        print(f"{number:4d} {arm.name} ({mode}, {format_duration(wall_s)}): {_words(rows)}")

    def _left_s(self, number: int, done: int, of: int) -> float:
        """Project the rest from what this landscape's launches took so far."""
        whole = projected_round_s(self._arms, self._rows.rows)
        repeat = BETTER * whole if number == 1 else self._repeat_s()
        now = whole if number == 1 else repeat
        return now * (1 - done / of) + repeat * (self._rounds - max(1, number))

    def _repeat_s(self) -> float:
        return projected_round_s(better_part(self._arms, self._rows.rows), self._rows.rows)

    def _print_projection(self) -> None:
        whole = projected_round_s(self._arms, self._rows.rows)
        total = whole * (1 + BETTER * (self._rounds - 1))
        points = sum(len(arm.plans) for arm in self._arms)
        print(
            f"{self._landscape.name}: {len(self._arms)} arms, {points} points; projected "
            f"{format_duration(total)} for {self._rounds} rounds, "
            f"{format_duration(whole)} of them the first",
            flush=True,
        )


def better_part(arms: Sequence[Arm], rows: Sequence[Row]) -> list[Arm]:
    """Return the arms with those of their plans that are in the better half of round 1."""
    speeds = {
        row.plan_id: row.step_tokens / statistics.median(json.loads(row.step_times_s))
        for row in rows
        if row.round == 1 and row.step_tokens and json.loads(row.step_times_s)
    }
    ranked = sorted(speeds, key=lambda plan: -speeds[plan])
    kept = set(ranked[: round(BETTER * len(ranked) + 0.499)])
    parts = (tuple(plan for plan in arm.plans if plan.id in kept) for arm in arms)
    return [
        Arm(name=arm.name, plans=plans) for arm, plans in zip(arms, parts, strict=True) if plans
    ]


def projected_round_s(arms: Sequence[Arm], rows: Sequence[Row]) -> float:
    """Return what launching arms once will take, by the rows there are.

    A start is taken as the mean of those of its engine, in the mode of most rows; a rung as the
    mean of the same engine's and accumulation's, else of the engine's, else of all.
    """
    if not rows:
        return 0.0
    warm = [row for row in rows if row.round] or list(rows)
    engines = {arm.name: arm.engine for arm in arms}
    total = 0.0
    for arm in arms:
        same = [row for row in warm if engines.get(row.family) == arm.engine] or warm
        starts = {row.launch: row.launch_ready_s or 0.0 for row in same}
        total += statistics.mean(starts.values())
        for plan in arm.plans:
            alike = [row for row in same if row.grad_accum_steps == plan.grad_accum_steps]
            total += statistics.mean(row.rung_wall_s for row in alike or same)
    return total


def launch_wall_s(rows: Sequence[Row]) -> float:
    return (rows[0].launch_ready_s or 0.0) + sum(row.rung_wall_s for row in rows)


def _without(arm: Arm, measured: set[str]) -> Arm | None:
    plans = tuple(plan for plan in arm.plans if plan.id not in measured)
    return Arm(name=arm.name, plans=plans) if plans else None


def _words(rows: Sequence[Row]) -> str:
    said = []
    for row in rows:
        times = json.loads(row.step_times_s)
        if row.step_tokens and times:
            rate = row.step_tokens / statistics.median(times)
            said.append(f"mbs {row.micro_batch_size} {rate:,.0f} tokens/s")
        else:
            said.append(f"mbs {row.micro_batch_size} {row.outcome}: {row.message[:60]}")
    return ", ".join(said)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one recorder at a time write a landscape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AutotuneError(f"{path.name}: another recorder writes it.") from None
        yield


def main() -> int:
    args = parse_arguments()
    try:
        landscape = replace(landscape_named(args.landscape), only=args.only)
        if args.list:
            arms, refused = arms_of(landscape)
            print("\n".join([*numbered(arms), *(f"refused: {why}" for why in refused.values())]))
            return 0
        if landscape.device == "cuda" and not _has_gpu():
            print(f"{landscape.name}: no NVIDIA GPU here, nothing recorded.")
            return 0
        if args.follow:
            follow_leader(args.follow)
            return 0
        if landscape.hosts > 1 and args.lead is None:
            return on_both_hosts(landscape, sys.argv[1:])
        record(landscape, args)
        return 0
    except AutotuneError as error:
        print(f"record: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return 130


def _has_gpu() -> bool:
    try:
        return bool(nvml_devices()[0])
    except AutotuneError:
        return False


def record(landscape: Landscape, args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    csv_path = args.out / f"{landscape.name}.csv"
    launches = args.launches / f"{landscape.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    network = json.loads(args.network) if args.network else None
    with locked(args.launches / f"{landscape.name}.lock"), starters_of(landscape, args) as starters:
        launcher = Launcher(landscape, args.steps, launches, starters, args.starts)
        story = Story(csv_path.with_suffix(".json"), landscape, launcher.measurement, network)
        recorder = Recorder(landscape, launcher, RowFile(csv_path), story, args.rounds)
        recorder.record(cold_only=args.cold_only)
    print(f"Wrote {csv_path}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("landscape", help=f"one of {', '.join(LANDSCAPES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="counted steps (default: %(default)s)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="ARMS", help="to try it: some arms"
    )
    parser.add_argument("--cold-only", action="store_true", help="stop after round 0")
    parser.add_argument("--list", action="store_true", help="print the arms and measure nothing")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: landscapes/")
    parser.add_argument(
        "--launches", type=Path, default=Path("reports"), help="for logs (default: %(default)s)"
    )
    parser.add_argument(
        "--starts",
        choices=["fork", "cold"],
        default="fork",
        help="how rounds 1 and up start their ranks (default: %(default)s)",
    )
    parser.add_argument("--lead", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--follow", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--network", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
