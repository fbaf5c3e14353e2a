"""`search --from` and `--deepspeed`: what file and flags make of model, contract and space."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from autotune.cli import main
from autotune.cli.search_contract import contract_of
from autotune.cli.search_flags import add_arguments
from autotune.plan import Recompute
from autotune.planner import enumerate_plans, make_plan
from autotune.report.answer import explain, find_answer
from autotune.report.study import load_study
from autotune.rules import check_plan
from tests.unit.report_studies import make_plan as report_plan
from tests.unit.report_studies import make_record, write_study

AXOLOTL = (
    "base_model: tiny-qwen3\nsequence_len: 128\nsample_packing: false\nmicro_batch_size: 3\n"
    "gradient_accumulation_steps: 2\ngradient_checkpointing: true\nlearning_rate: 1e-4\n"
    "num_epochs: 3\nbf16: false\noptimizer: sgd\nadapter: lora\nlora_r: 4\nlora_alpha: 8\n"
    "lora_target_linear: true\n{engine}\ndatasets:\n  - {{path: a.jsonl, type: completion}}\n"
)
DEEPSPEED = "deepspeed: zero2.json"


@pytest.fixture
def contract(tmp_path):
    """Return what makes a search's contract of flags, as the command does, up to measuring."""
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')

    def make(*flags, engine=DEEPSPEED):
        file = tmp_path / "mine.yml"
        file.write_text(AXOLOTL.format(engine=engine))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        given = ["--from", str(file), "--device", "cpu", *flags]
        made, strategies = contract_of(parser.parse_args(given))
        plans = enumerate_plans(
            made.model, made.workload, made.hardware, strategies,
            micro_batches=made.micro_batches, cp_degrees=made.cp_degrees,
            recompute=[Recompute(mode) for mode in made.recompute], also=[made.start.plan],
        )  # fmt: skip
        return made, strategies, plans

    return make


def test_the_file_decides_what_no_flag_says(contract):
    made, strategies, plans = contract("--gpus", "2")
    workload, start = made.workload, made.start
    assert made.base_model == "tiny-qwen3" and made.hardware.num_gpus == 2
    assert (workload.seq_len, workload.global_batch_size, workload.packing) == (128, 12, False)
    assert (str(workload.precision), workload.optimizer, workload.adapter.r) == ("fp32", "sgd", 4)
    assert [source.path.endswith("a.jsonl") for source in made.datasets] == [True]
    assert len(strategies) > 5
    plan = start.plan
    assert (plan.strategy, plan.micro_batch_size, plan.grad_accum_steps) == ("zero2", 3, 2)
    assert plan.recompute is Recompute.FULL and plan.global_batch_size == 12
    assert plans.count(plan) == 1
    assert start.train.num_epochs == 3 and start.train.learning_rate == 1e-4
    assert made.to_dict("x")["start"]["plan_id"] == plan.id


def test_flags_win_over_the_file(contract):
    made, strategies, plans = contract(
        "--gpus", "2", "--seq-len", "64", "--global-batch-size", "24", "--precision", "bf16",
        "--packing", "--optimizer", "adamw", "--lora-r", "2", "--model", "tiny-llama",
        "--strategies", "ddp", "--micro-batches", "2", "--recompute", "none",
        "--sequence-parallel", "1",
    )  # fmt: skip
    workload = made.workload
    assert made.model.name == "tiny-llama"
    assert (workload.seq_len, workload.global_batch_size, workload.packing) == (64, 24, True)
    assert (str(workload.precision), workload.optimizer, workload.adapter.r) == ("bf16", "adamw", 2)
    assert [strategy.name for strategy in strategies] == ["ddp", "zero2"]
    assert made.start.plan in plans
    assert made.start.plan.global_batch_size == 24 and made.start.plan.micro_batch_size == 3


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("fsdp_version: 2\nfsdp_config: {reshard_after_forward: false}", "fsdp2_no_reshard"),
        ("", "ddp"),
        (
            "deepspeed: {zero_optimization: {stage: 3, offload_optimizer: {device: cpu}, "
            "offload_param: {device: cpu}}}",
            "zero3_offload_params",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 2, reduce_bucket_size: 1000}}",
            "zero2_bucket_1000",
        ),
        (
            "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\ndp_replicate_size: 4",
            "hsdp_4_copies",
        ),
        (
            "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\ndp_replicate_size: 2",
            "hsdp",
        ),
    ],
)
def test_whatever_shards_is_in_the_space_with_its_own_layout(contract, engine, name):
    made, strategies, plans = contract("--gpus", "8", "--global-batch-size", "48", engine=engine)
    start = made.start
    assert start.strategy.name == name and start.strategy in strategies
    assert start.plan in plans
    assert not check_plan(start.plan, made.model, made.workload, made.hardware)
    laid_out = make_plan(start.strategy, made.hardware, recompute=start.plan.recompute)
    assert laid_out == replace(start.plan, micro_batch_size=1, grad_accum_steps=1)
    here = [plan for plan in plans if plan.strategy == name]
    assert len({plan.micro_batch_size for plan in here}) > 1, "it is varied, too"


def test_a_batch_that_does_not_divide_is_refused_by_name_not_moved(contract):
    made, _, plans = contract("--gpus", "2", "--global-batch-size", "16")
    plan = made.start.plan
    assert plan in plans and plan.micro_batch_size == 3
    codes = [v.code for v in check_plan(plan, made.model, made.workload, made.hardware)]
    assert "AT104" in codes


def test_deepspeed_alone_and_beside_named_strategies(contract):
    _, strategies, _ = contract("--gpus", "2", "--deepspeed", "zero3,zero1.json", engine="")
    assert [s.name for s in strategies] == ["zero3", "zero1", "ddp"]
    _, strategies, _ = contract(
        "--gpus", "2", "--deepspeed", "zero2", "--strategies", "fsdp2,zero2", engine=""
    )
    assert [s.name for s in strategies] == ["fsdp2", "zero2", "ddp"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model and --gpus needed"),
        (["--model", "tiny-qwen3"], "--gpus needed"),
        (["--from", "{tmp}/none.yml", "--gpus", "2"], "none.yml"),
        (["--from", "{tmp}/ds.json", "--gpus", "2"], "names no model"),
        (["--from", "{tmp}/ax.yml"], "names no number of GPUs"),
        (["--from", "{tmp}/ax.yml", "--gpus", "3"], "3 GPUs"),
        (["--model", "tiny-qwen3", "--gpus", "2", "--deepspeed", "zero22"], "Nearest: zero2"),
        (["--model", "tiny-qwen3", "--gpus", "2", "--deepspeed", "{tmp}/no.json"], "no.json"),
        (["--model", "tiny-qwen3", "--gpus", "2", "--deepspeed", ""], "--deepspeed"),
    ],
)
def test_bad_input_is_one_message_and_2(tmp_path, capsys, flags, words):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "ax.yml").write_text(
        "base_model: tiny-qwen3\nlearning_rate: 1e-4\ncontext_parallel_size: 2\n"
    )
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        main(["search", "--device", "cpu", "--out", str(tmp_path / "study"), *flags])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "study").exists()


def test_estimate_takes_it_either_way(tmp_path, capsys):
    file = tmp_path / "ax.yml"
    file.write_text("base_model: qwen3-8b\nlearning_rate: 1e-4\ndeepspeed: zero3\n")
    texts = []
    hardware = ["--gpus", "8", "--gpu-type", "h100-sxm", "--json"]
    for given in ([str(file)], ["--from", str(file)]):
        with pytest.raises(SystemExit) as caught:
            main(["estimate", *given, *hardware])
        texts.append(capsys.readouterr().out)
        assert caught.value.code == 0
    assert texts[0] == texts[1] and json.loads(texts[0])["plan"]["zero_stage"] == 3
    for given in ([], [str(file), "--from", str(file)]):
        with pytest.raises(SystemExit) as caught:
            main(["estimate", *given, *hardware])
        assert caught.value.code == 2 and "one configuration" in capsys.readouterr().err


def test_the_answer_says_what_the_start_reached(tmp_path):
    fast, slow, failed = (report_plan(micro=size) for size in (4, 2, 1))
    records = [make_record(fast, step_s=1.0), make_record(slow, step_s=1.5)]

    def said(plan, folder):
        write_study(tmp_path / folder, records)
        path = tmp_path / folder / "study.json"
        start = {"file": "mine.yml", "plan_id": plan.id, "plan": plan.to_dict()}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"start": start}))
        return explain(find_answer(load_study(tmp_path / folder)))[-1]

    assert "mine.yml, reached" in said(slow, "a") and "winner is 50% faster" in said(slow, "a")
    assert "is the winner itself" in said(fast, "b")
    assert "was not measured" in said(failed, "c")


def test_a_word_given_twice_is_searched_over_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = "--model tiny-qwen3 --gpus 2 --device cpu --seq-len 512"
    twice = "--recompute none,none --sequence-parallel-by ring,ring --sequence-parallel 2,2"
    contract, _ = contract_of(parser.parse_args([*args.split(), *twice.split()]))
    assert contract.recompute == ["none"] and contract.cp_backends == ["ring"]
    assert list(contract.cp_degrees) == [2]
