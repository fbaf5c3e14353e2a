"""A landscape that is made up, so that every expected number of a replay is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from landscape import Landscape, load_landscape

from tests.unit.search_bench import families_of

COLUMNS = (
    "round", "launch", "plan", "outcome", "step_tokens", "step_times_s", "warmup_s",
    "rung_wall_s", "launch_ready_s", "launch_mode", "peak_allocated_bytes",
    "peak_reserved_bytes", "message",
)  # fmt: skip
STORY = {
    "model": {"name": "tiny-qwen3"},
    "workload": {"seq_len": 128, "global_batch_size": 16},
    "hardware": {"gpu": "cpu", "gpus_per_node": 2, "num_nodes": 1, "memory_bytes": 2**33},
    "memory_limit_bytes": None,
    "space": {
        "strategies": ["ddp", "zero2", "fsdp2"], "micro_batches": None, "cp_degrees": [1],
        "recompute": ["none", "full"],
    },
}  # fmt: skip
STEP_TOKENS, READY_S, COLD_S = 1000.0, 4.0, 20.0
FAILS_AFTER_S = 3.0


def made_up(folder: Path) -> Landscape:
    """Three rounds; the largest micro batch of fsdp2 runs out of memory; noise of 1% a round."""
    (folder / "made-up.json").write_text(json.dumps(STORY))
    with (folder / "made-up.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        launch = 0
        for round_number, mode in ((0, "cold"), (1, "fork"), (2, "fork"), (3, "fork")):
            for family in families_of("ddp", "zero2", "fsdp2"):
                launch += 1
                for estimate in family.ladder[:1] if mode == "cold" else family.ladder:
                    plan = estimate.plan
                    fails = plan.engine == "fsdp2" and plan.micro_batch_size == 8
                    step_s = estimate.time.step_s * (1 + 0.01 * (round_number - 2))
                    writer.writerow(
                        {
                            "round": round_number, "launch": launch,
                            "plan": json.dumps(plan.to_dict()),
                            "outcome": "oom" if fails else "ok",
                            "step_tokens": "" if fails else STEP_TOKENS,
                            "step_times_s": json.dumps([] if fails else [step_s] * 5),
                            "warmup_s": "" if fails else 2 * step_s,
                            "rung_wall_s": FAILS_AFTER_S if fails else 7 * step_s,
                            "launch_ready_s": COLD_S if mode == "cold" else READY_S,
                            "launch_mode": mode, "peak_allocated_bytes": "",
                            "peak_reserved_bytes": "", "message": "",
                        }
                    )  # fmt: skip
    return load_landscape("made-up", folder)
