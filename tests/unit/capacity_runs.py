"""Runs of `autotune capacity` and `plan` for the tests, and what they ask for."""

import json

import pytest

from autotune.cli import main

TYPES, COUNTS = ["h100-sxm", "l40s"], [1, 2, 4, 8, 16]
BASE = [
    "capacity", "--model", "qwen3-8b", "--gpu-type", ",".join(TYPES),
    "--gpus", ",".join(map(str, COUNTS)),
]  # fmt: skip
# For what does not depend on the strategies, a few of them.
QUICK = [*BASE, "--strategies", "zero3,zero3_offload_params"]
PRICED = [*QUICK, "--tokens", "10B", "--price", "h100=2.5,l40s=0.9", "--power"]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def plan_of(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def by_cell(document):
    return {(cell["gpu_type"], cell["num_gpus"]): cell for cell in document["cells"]}
