import pytest

from autotune.errors import AutotuneError
from autotune.plan import Engine
from autotune.planner import enumerate_plans, make_plan
from autotune.rules import check_plan, rule_codes
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload

SHIPPED = {strategy.name: strategy for strategy in load_strategies()}


def test_the_shipped_set():
    assert set(SHIPPED) == {
        "ddp", "zero1", "zero2", "zero3", "zero2_offload_optimizer", "zero3_offload_optimizer",
        "zero3_offload_params", "fsdp2", "fsdp2_no_reshard", "fsdp2_offload", "hsdp",
    }  # fmt: skip
    assert all(name == strategy.name for name, strategy in SHIPPED.items())


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("name", SHIPPED)
def test_each_plans_or_is_refused_by_a_rule(name, gpus):
    model, workload = load_model("qwen3-8b"), Workload(global_batch_size=64)
    hardware = load_hardware("h100-sxm", gpus)
    plans = enumerate_plans(model, workload, hardware, [SHIPPED[name]])
    assert plans
    codes, legal = set(), 0
    for plan in plans:
        broken = check_plan(plan, model, workload, hardware)
        codes |= {violation.code for violation in broken}
        if not broken:
            legal += 1
            assert plan.world_size == gpus and plan.global_batch_size == 64
    assert codes <= set(rule_codes())
    if name == "hsdp" and gpus < 4:
        assert not legal and "AT107" in codes
    else:
        assert legal


def test_hybrid_mesh_follows_the_nodes():
    hsdp = SHIPPED["hsdp"]
    plan = make_plan(hsdp, load_hardware("h100-sxm", 32))
    assert (plan.dp_replicate, plan.dp_shard) == (4, 8)
    plan = make_plan(hsdp, load_hardware("h100-sxm", 8))
    assert (plan.dp_replicate, plan.dp_shard) == (2, 4)


def test_order_and_repeats():
    assert [s.name for s in load_strategies(["zero3", "ddp"])] == ["zero3", "ddp"]
    with pytest.raises(AutotuneError, match="given twice"):
        load_strategies(["ddp", "ddp"])
    with pytest.raises(AutotuneError, match="No strategy given"):
        load_strategies([])


def test_unknown_name_says_the_nearest():
    with pytest.raises(AutotuneError, match=r"'zero4'.*Nearest: zero"):
        load_strategies(["zero4"])


def test_own_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsummary: s\nengine: fsdp2\n")
    (mine,) = load_strategies([str(file)])
    assert mine.engine is Engine.FSDP2 and mine.reshard_after_forward


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\nsummary: s\nengine: fsdp2\nofload_params: true\n", "Nearest: offload_params"),
        ("name: mine\nsummary: s\nengine: fsdp3\n", "engine: Input should be"),
        ("name: mine\nsummary: s\nengine: fsdp2\nzero_stage: 4\n", "zero_stage: Input should be"),
        ("name: mine\n  engine: x: y\n", "line 2"),
        ("- 1\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("name: mine\nsummary: 2020-13-45\n", "month must be in"),
        ("name: mine\nsummary: \xe9\n", "it is not UTF-8 text"),
    ],
)
def test_malformed_file(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(AutotuneError, match=message):
        load_strategies([str(file)])


def test_missing_file():
    for name in ("./nowhere.yaml", "~nobody-of-that-name/mine.yaml"):
        with pytest.raises(AutotuneError, match="No strategy file"):
            load_strategies([name])
