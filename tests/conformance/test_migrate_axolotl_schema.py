"""Axolotl's own schema takes every migrated file, and so does `autotune estimate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from autotune.cli import main
from autotune.migrate import Mesh, migrate
from tests.conformance.tools.ask import ask
from tests.conformance.tools.environments import python_of
from tests.unit.migrate_configs import make_config
from tests.unit.migrate_forms import AXOLOTL, COMMON

FOLDER = Path(__file__).parent / "axolotl"
# What Axolotl 0.19 asks of every file.
MINIMUM = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
DATA = "datasets: [{path: corpus.jsonl, type: completion}]\n"
FORMS = {
    "bitsandbytes": "optimizer: adamw_bnb_8bit\nfsdp: [full_shard, auto_wrap]\n",
    "qlora": (
        "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
        "fsdp: [full_shard, auto_wrap]\nfsdp_config:\n  fsdp_cpu_ram_efficient_loading: true\n"
        "  fsdp_sync_module_states: true\n  fsdp_use_orig_params: false\n"
    ),
    "local": "fsdp_config: {fsdp_state_dict_type: LOCAL_STATE_DICT, fsdp_offload_params: true}\n",
    "size": "fsdp_config: {auto_wrap_policy: SIZE_BASED_WRAP, min_num_params: 100000}\n",
    "hybrid": "fsdp: [hybrid_shard, auto_wrap]\n",
}


def migrated(
    folder: Path, name: str, text: str, mesh: Mesh | None = None, *, as_written: bool = False
) -> Path:
    path = folder / f"{name}.yml"
    path.write_text(text, encoding="utf-8")
    after = migrate(path, mesh=mesh, as_written=as_written).after
    path.write_text(after, encoding="utf-8")
    return path


def completed(text: str) -> str:
    """Add what Axolotl wants of any file; a generated one is about FSDP alone."""
    values = yaml.safe_load(text)
    missing = {key: value for key, value in MINIMUM.items() if key not in values}
    return (
        "".join(f"{key}: {value}\n" for key, value in missing.items())
        + ("" if "datasets" in values else DATA)
        + text
    )


def test_axolotl_takes_what_was_migrated(tmp_path: Path) -> None:
    paths = [
        migrated(tmp_path, path.stem, completed(path.read_text("utf-8")))
        for path in sorted(FOLDER.glob("fsdp*.yml"))
    ]
    paths += [
        migrated(
            tmp_path,
            name,
            completed(f"base_model: tiny-llama\n{text}"),
            Mesh(num_gpus=8, num_nodes=2) if name == "hybrid" else None,
        )
        for name, text in FORMS.items()
    ]
    paths += [
        migrated(tmp_path, f"generated-{seed}", completed(make_config(seed)[0]))
        for seed in range(60)
    ]
    # Those that tests/integration/test_migrate_train.py trains.
    paths += [
        migrated(
            tmp_path,
            f"trained-{name}",
            completed(COMMON + form.text),
            Mesh(num_gpus=4, num_nodes=2) if "--gpus" in form.flags else None,
            as_written="--as-written" in form.flags,
        )
        for name, form in AXOLOTL.items()
    ]
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(completed("base_model: a\nfsdp_config: {reshard_after_forward: FULL_SHARD}\n"))
    refused = tmp_path / "refused.yml"
    refused.write_text(completed(f"base_model: a\nfsdp_version: 2\n{FORMS['bitsandbytes']}"
                                 "fsdp_config: {reshard_after_forward: true}\n"))  # fmt: skip
    asked = [*paths, wrong, refused]
    questions = [
        {"file": str(path), "ranks": 4 if path.stem.startswith("trained") else 8} for path in asked
    ]
    answers = ask(python_of("axolotl"), "check_axolotl.py", questions, tmp_path)
    said = {path: each["error"] or "" for path, each in zip(asked, answers, strict=True)}
    # It does refuse: what stands in the file is looked at, and what FSDP2 cannot is noticed.
    assert "reshard_after_forward" in said.pop(wrong)
    assert "adamw_torch_8bit" in said.pop(refused)
    assert {path.name: words for path, words in said.items() if words} == {}
    assert len(said) == len(paths)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("fsdp1*.yml")), ids=lambda path: path.stem)
def test_estimate_takes_it(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub("(?m)^base_model: .*", "base_model: tiny-llama", path.read_text("utf-8"))
    config = migrated(tmp_path, path.stem, text)
    with pytest.raises(SystemExit) as ended:
        main(["estimate", str(config), "--gpus", "8", "--gpu-type", "h100-sxm", "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    assert json.loads(out)["plan"]["engine"] == "fsdp2"
    assert "FSDP1" not in err
