"""Check an installed wheel without extras: what it carries, imports and answers, from anywhere.

    python -I benchmarks/check_base_install.py      (-I: the checkout stays out of sys.path)

`make base-test` runs it in an environment that has the wheel and no training stack.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import autotune

CHECKOUT = Path(__file__).resolve().parent.parent
CONFIG = CHECKOUT / "tests" / "golden" / "best_zero3_cp2.yml"
EXAMPLES = CHECKOUT / "reports" / "examples"
TRAINING_STACK = ("torch", "transformers", "accelerate", "deepspeed", "optuna")
# Only `search` loads these, and only after it has said what is missing.
NEEDS_OPTUNA = {
    *(
        f"autotune.search.{name}"
        for name in (
            "asker", "cost_model", "deepspeed_tuning", "finite_sampler", "list_samplers",
            "parameters", "samplers", "told", "tuner",
        )
    ),
    "autotune.report.outputs",
}  # fmt: skip


def main() -> None:
    check_place()
    print(f"{check_imports()} modules import without the training stack")
    for folder in ("strategies", "deepspeed_configs"):
        print(f"{check_data(folder)} files of {folder}/ are in the wheel, as in the checkout")
    with tempfile.TemporaryDirectory() as elsewhere:
        check_verbs(Path(elsewhere))


def check_place() -> None:
    package = Path(autotune.__file__).resolve()
    if package.is_relative_to(CHECKOUT / "autotune"):
        sys.exit(f"{package} is the checkout's package: run with -I in an environment of its own")
    present = [name for name in TRAINING_STACK if importlib.util.find_spec(name)]
    if present:
        sys.exit(f"this environment has {', '.join(present)}: it proves nothing about the base")


def check_imports() -> int:
    names = [module.name for module in pkgutil.walk_packages(autotune.__path__, "autotune.")]
    planner = [
        name for name in names
        if not name.startswith("autotune.runner") and name != "autotune.__main__"
    ]  # fmt: skip
    failed = {}
    for name in planner:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            failed[name] = error.name
    unexpected = {name: lacks for name, lacks in failed.items() if name not in NEEDS_OPTUNA}
    if unexpected:
        sys.exit(f"modules that do not import without extras: {unexpected}")
    return len(planner) - len(failed)


def check_data(folder: str) -> int:
    shipped = {
        path.name: path.read_bytes()
        for path in (Path(autotune.__file__).parent / "_data" / folder).iterdir()
    }
    wanted = {path.name: path.read_bytes() for path in (CHECKOUT / folder).iterdir()}
    if not wanted or shipped != wanted:
        sys.exit(f"{folder}/: the wheel has {sorted(shipped)}, the checkout {sorted(wanted)}")
    return len(wanted)


def check_verbs(folder: Path) -> None:
    hardware = ("--gpu-type", "h100-sxm", "--json")
    plan = run(folder, "plan", "--model", "qwen3-8b", "--gpus", "8", *hardware)
    best = plan["candidates"][0]
    print(f"plan: {len(plan['candidates'])} candidates, best {best['plan']['strategy']}")
    estimate = run(folder, "estimate", str(CONFIG), "--gpus", "4", *hardware)
    print(f"estimate: {estimate['memory']['total_bytes'] / 2**30:.2f} GiB, {estimate['verdict']}")
    for study in sorted(EXAMPLES.glob("**/study.json")):
        outputs = ("--csv", str(folder / "trials.csv"), "--html", str(folder / "report.html"))
        run(folder, "report", str(study.parent), *outputs, "--json")
        sizes = [(folder / name).stat().st_size for name in ("trials.csv", "report.html")]
        print(f"report {study.parent.relative_to(CHECKOUT)}: {sizes[0]} and {sizes[1]} bytes")
    measuring = call(folder, "search", "--model", "tiny-qwen3", "--gpus", "2", "--device", "cpu")
    if measuring.returncode != 2 or "autotune-llm[train]" not in measuring.stderr:
        sys.exit(f"search without the stack: {measuring.returncode} {measuring.stderr}")
    print(f"search: exit 2, {measuring.stderr.strip()}")


def run(folder: Path, *words: str) -> dict[str, object]:
    done = call(folder, *words)
    if done.returncode:
        sys.exit(f"autotune {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "autotune"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


if __name__ == "__main__":
    main()
