"""Every strategy starts from the same weights; files edited or written by hand train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from autotune.errors import AutotuneError
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from tests.integration.commands import autotune, write_model
from tests.integration.ranks import logged, make_plan, run, run_well, training_request
from tests.integration.reference import held_out_loss

pytestmark = pytest.mark.integration

FP32_LOSS = 1e-5
STRATEGIES = [strategy.name for strategy in load_strategies(None)]


def step_0_loss(strategy: str, folder: Path, corpus: Path, precision: str, **more: object) -> float:
    world = 4 if strategy == "hsdp" else 2
    plan = make_plan(strategy, world, micro_batch_size=2, grad_accum_steps=4 // world)
    request = training_request(
        plan,
        folder,
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=8, precision=precision),
        max_steps=1,
        val_set_size=7,
        **more,
    )
    run_well(request)
    return logged(folder, "eval_loss")[0]


def reference_request(folder: Path, corpus: Path):
    return training_request(
        make_plan("ddp", 1),
        folder,
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=8, precision="fp32"),
        val_set_size=7,
    )


@pytest.mark.parametrize(
    "strategy",
    STRATEGIES,
)
@pytest.mark.slow  # the quick tests of resuming start from the same weights
def test_pretrained_weights_load_under_every_strategy(
    strategy: str, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    want = held_out_loss(initial_state, reference_request(tmp_path, corpus))
    got = step_0_loss(strategy, tmp_path / "run", corpus, "fp32", weights=initial_state)
    assert got == pytest.approx(want, abs=FP32_LOSS)


@pytest.fixture(scope="session")
def random_start(tmp_path_factory, corpus):
    """Step-0 loss of random weights on one DDP pair, by precision."""
    known: dict[str, float] = {}

    def get(precision: str) -> float:
        if precision not in known:
            folder = tmp_path_factory.mktemp("random")
            known[precision] = step_0_loss("ddp", folder, corpus, precision)
        return known[precision]

    return get


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2", "zero2", "zero1", "zero3_offload_params"])
@pytest.mark.slow
def test_random_weights_are_the_same_under_every_engine(
    strategy: str, precision: str, tmp_path: Path, corpus: Path, random_start
) -> None:
    got, want = step_0_loss(strategy, tmp_path, corpus, precision), random_start(precision)
    assert got == pytest.approx(want, abs=FP32_LOSS if precision == "fp32" else 1e-3)


MISMATCHES = {
    "missing": "missing keys: model.layers.1.mlp.up_proj.weight",
    "unexpected": "unexpected keys: model.extra.weight",
    "mismatched": "mismatched keys: ",
}


@pytest.mark.parametrize(
    ("strategy", "change"),
    [
        # Left to itself, transformers lets this one pass in silence.
        ("zero3", "unexpected"),
        *(
            pytest.param(strategy, change, marks=pytest.mark.slow)
            for strategy in ("zero3", "fsdp2", "ddp")
            for change in MISMATCHES
            if (strategy, change) != ("zero3", "unexpected")
        ),
    ],
)
def test_weights_that_do_not_match_the_model_are_fatal(
    strategy: str, change: str, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "weights"
    shutil.copytree(initial_state, weights)
    tensors = load_file(weights / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "mismatched":
        tensors["model.norm.weight"] = torch.ones(63)
    else:
        tensors["model.extra.weight"] = torch.zeros(3)
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    request = training_request(
        make_plan(strategy, 2, micro_batch_size=4),
        tmp_path / "run",
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=8),
        weights=weights,
        max_steps=1,
    )
    with pytest.raises(AutotuneError, match="do not match the model") as caught:
        run(request)
    assert MISMATCHES[change] in str(caught.value)
    assert not (tmp_path / "run" / "log.jsonl").exists(), "no step may run"


AXOLOTL = {
    "sequence_len": 64,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.003,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "max_steps": 4,
    "val_set_size": 7,
    "bf16": True,
}
BLOCK = {"num_gpus": 2, "device": "cpu", "plan_id": "000000000000"}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}}
ZERO3 = {"deepspeed": "deepspeed_configs/zero3.json"}


@pytest.mark.parametrize(
    ("edit", "block", "engine"),
    [
        pytest.param(FSDP2, BLOCK, "fsdp2", id="best-to-fsdp2"),
        pytest.param(ZERO3, BLOCK, "deepspeed", id="best-to-zero3", marks=pytest.mark.slow),
        pytest.param(
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            None,
            "deepspeed",
            id="by-hand",
            marks=pytest.mark.slow,
        ),
        pytest.param({}, None, "ddp", id="by-hand-ddp", marks=pytest.mark.slow),
    ],
)
def test_a_file_edited_or_written_by_hand_trains(
    edit: dict, block: dict | None, engine: str, tmp_path: Path, corpus: Path
) -> None:
    """The block `autotune` of another plan stays in the file: it must not decide what runs."""
    out = tmp_path / "out"
    values = AXOLOTL | {
        "base_model": str(write_model(tmp_path / "model")),
        "datasets": [{"path": str(corpus), "type": "completion"}],
        "output_dir": str(out),
        **edit,
    }
    config = tmp_path / "best.yml"
    config.write_text(yaml.safe_dump(values | ({"autotune": block} if block else {})))
    more = [] if block else ["--gpus", "2", "--device", "cpu"]
    done = autotune("train", str(config), "--json", *more)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["steps"], document["asserted"]["engine"]) == (4, engine)
    losses = logged(out, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (out / "model.safetensors").exists()
    again = autotune("train", str(config), *more)
    assert again.returncode == 2 and "holds another run" in again.stderr
    assert len(logged(out, "loss")) == 4
