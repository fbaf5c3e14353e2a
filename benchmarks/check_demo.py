"""Check and sum up what `make demo` left: the search's answer, the run, the resumed run.

    python benchmarks/check_demo.py demo

Exits 1 unless the held-out loss fell by at least 1 nat and the run that was resumed from a
checkpoint logged the same losses as the run that was not interrupted.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

LEAST_FALL = 1.0
LARGEST_DIFFERENCE = 0.0


def main() -> int:
    folder = Path(sys.argv[1])
    for study in ("study", "lora"):
        show_search(study, json.loads((folder / study / "summary.json").read_text()))
    run, resumed = (read_log(folder / name / "log.jsonl") for name in ("run", "resumed"))
    checks = [held_out_loss_fell(run), resumed_alike(run, resumed)]
    print(f"report: {folder / 'study' / 'report.html'}")
    return 0 if all(checks) else 1


def show_search(study: str, summary: dict[str, Any]) -> None:
    outcomes = Counter(trial["outcome"] for trial in summary["trials"])
    tried = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    best = summary["best"]
    plan = best["plan"]
    print(f"{study}: {tried} in {summary['launches']} launches, {summary['elapsed_s']:.0f} s")
    print(
        f"best: {plan['strategy']}, sequence parallel {plan['cp']}, micro batch "
        f"{plan['micro_batch_size']} x accumulation {plan['grad_accum_steps']}, "
        f"{best['measured']['tokens_per_s']:.0f} tokens/s"
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def held_out_loss_fell(run: list[dict[str, Any]]) -> bool:
    losses = [(row["step"], row["eval_loss"]) for row in run if "eval_loss" in row]
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    fell = first - last
    print(
        f"held-out loss: {first:.3f} at step {first_step}, {last:.3f} at step {last_step}: "
        f"{fell:.3f} nats less (at least {LEAST_FALL})"
    )
    return fell >= LEAST_FALL


def resumed_alike(run: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> bool:
    whole, second = by_step(run), by_step(resumed)
    differences = [abs(whole.get(step, math.inf) - loss) for step, loss in second.items()]
    largest = max(differences, default=math.inf)
    same_end = bool(second) and max(second) == max(whole)
    print(f"resumed run: {len(second)} steps, largest difference in loss {largest:.2g}")
    return same_end and largest <= LARGEST_DIFFERENCE


def by_step(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


if __name__ == "__main__":
    sys.exit(main())
