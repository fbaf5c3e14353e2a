import hashlib
import json

import pytest

from autotune.errors import AutotuneError, NothingFitsError
from autotune.memory import Verdict
from autotune.plan import CpBackend, Plan, Recompute
from autotune.planner import enumerate_plans, rank_plans, refusal_lines
from autotune.rules import check_plan
from autotune.spec.catalogue import read_catalogue
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload
from autotune.units import GIB

MODEL = load_model("qwen3-8b")
WORKLOAD = Workload()
H100 = load_hardware("h100-sxm", 8)
ALL = load_strategies()


def rank(model=MODEL, workload=WORKLOAD, hardware=H100, strategies=ALL, **values):
    return rank_plans(model, workload, hardware, strategies, **values)


def test_order_and_completeness():
    ranking = rank()
    assert ranking.space_size == len(ranking.candidates) + len(ranking.rejected)
    order = [list(Verdict).index(e.verdict) for e in ranking.candidates]
    assert order == sorted(order) and ranking.candidates[0].verdict is Verdict.FITS
    fitting = [e.time.tokens_per_s for e in ranking.candidates if e.verdict is Verdict.FITS]
    assert fitting == sorted(fitting, reverse=True)
    assert len({e.plan.id for e in ranking.candidates}) == len(ranking.candidates)
    assert all(e.plan.global_batch_size == 64 and not e.violations for e in ranking.candidates)
    assert {r.code for r in ranking.rejected} == {"AT107", "AT116"}


def test_no_legal_plan_of_the_space_is_missing():
    tiny, four = load_model("tiny-qwen3"), load_hardware("h100", 4)
    workload = Workload(global_batch_size=12)
    plans = set(enumerate_plans(tiny, workload, four, load_strategies(["zero2"])))
    batches = {(p.cp, p.micro_batch_size, p.grad_accum_steps) for p in plans}
    assert batches == {
        (1, 1, 3), (1, 3, 1),
        (2, 1, 6), (2, 2, 3), (2, 6, 1),
        (4, 1, 12), (4, 2, 6), (4, 4, 3), (4, 12, 1),
    }  # fmt: skip
    assert all(not check_plan(p, tiny, workload, four) for p in plans)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        # 8 heads and 4 key-value heads: Ulysses as far as they divide.
        (None, {(1, "ulysses"), (4, "ulysses"), (8, "ring")}),
        (["ring"], {(1, "ulysses"), (4, "ring"), (8, "ring")}),
        (
            ["ulysses", "ring"],
            {(1, "ulysses"), (4, "ulysses"), (4, "ring"), (8, "ulysses"), (8, "ring")},
        ),
    ],
)
def test_sequences_are_split_as_asked(asked, found):
    backends = asked and [CpBackend(name) for name in asked]
    plans = enumerate_plans(
        load_model("tiny-qwen3"), WORKLOAD, H100, load_strategies(["zero2"]),
        cp_degrees=[1, 4, 8], cp_backends=backends, micro_batches=[1],
        recompute=[Recompute.NONE],
    )  # fmt: skip
    assert {(p.cp, str(p.cp_backend)) for p in plans} == found
    assert len({p.id for p in plans}) == len(plans) == len(found)
    assert all(Plan.from_dict(json.loads(json.dumps(p.to_dict()))) == p for p in plans)


def test_a_plan_of_before_the_ring_keeps_its_id():
    """Ids of committed records: what a plan had no word for then is left out where it is not so."""
    (plan,) = enumerate_plans(
        MODEL, WORKLOAD, H100, load_strategies(["zero2"]), cp_degrees=[2], micro_batches=[1],
        recompute=[Recompute.NONE],
    )  # fmt: skip
    older = {k: v for k, v in plan.to_dict().items() if k not in ("cp_backend", "heads_k_stride")}
    assert Plan.from_dict(older) == plan
    canonical = json.dumps(older, sort_keys=True, separators=(",", ":"))
    assert plan.id == hashlib.sha256(canonical.encode()).hexdigest()[:12]


def test_given_micro_batches():
    plans = enumerate_plans(
        MODEL, WORKLOAD, H100, load_strategies(["zero2"]), micro_batches=[1, 3, 8],
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    assert [(p.micro_batch_size, p.grad_accum_steps) for p in plans] == [(1, 8), (3, 1), (8, 1)]
    (refused,) = enumerate_plans(
        MODEL, WORKLOAD, H100, load_strategies(["zero2"]), micro_batches=[3],
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    assert [v.code for v in check_plan(refused, MODEL, WORKLOAD, H100)] == ["AT104"]


def test_a_given_size_that_does_not_divide_is_recorded():
    ranking = rank_plans(
        MODEL, WORKLOAD, H100, load_strategies(["zero2"]), micro_batches=[1, 3],
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    assert [e.plan.micro_batch_size for e in ranking.candidates] == [1]
    (refused,) = ranking.rejected
    assert (refused.plan.micro_batch_size, refused.code) == (3, "AT104")
    assert "micro_batch_size 3 x 8" in refused.reason


def test_refusals_are_counted_by_code_with_their_first_reason():
    refused = [("AT104", "three"), ("AT103", "seven"), ("AT104", "five")]
    assert refusal_lines(refused) == ["AT103 x 1: seven", "AT104 x 2: three"]


def test_less_memory_never_helps():
    tight = load_hardware("h100-sxm", 8, 40 * GIB)
    roomy, small = rank(), rank(hardware=tight)
    assert small.candidates[0].memory.total_bytes < 40 * GIB
    assert small.candidates[0].time.tokens_per_s < roomy.candidates[0].time.tokens_per_s


def test_all_refused_says_the_nearest_batches():
    with pytest.raises(AutotuneError, match="Nearest that do: 16 or 24") as caught:
        rank(workload=Workload(global_batch_size=17))
    assert caught.value.exit_code == 2
    with pytest.raises(AutotuneError, match=r"AT113.*wqkv"):
        rank(workload=Workload(adapter=Lora(target_modules=("wqkv",))))


def test_nothing_fits_names_the_closest_and_the_gap():
    with pytest.raises(NothingFitsError) as caught:
        rank(load_model("llama-3.1-70b"), strategies=load_strategies(["ddp", "zero2"]))
    assert caught.value.exit_code == 1
    assert "Closest: zero2" in str(caught.value) and "GiB too much" in str(caught.value)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", sorted(read_catalogue("models")))
def test_every_catalogue_model_is_ranked_or_said_not_to_fit(name, adapter):
    model = load_model(name)
    lora = Lora(target_modules=tuple(model.linears)) if adapter else None
    some = load_strategies(["zero3", "zero3_offload_params", "fsdp2", "ddp"])

    def ranking():
        return rank(model, workload=Workload(adapter=lora), strategies=some)

    too_large = ("gpt-oss-120b", "llama-3.1-405b", "qwen3-235b-a22b")
    if not adapter and name in too_large:
        with pytest.raises(NothingFitsError, match=f"{name} fits 8 x h100-sxm under no strategy"):
            ranking()
    else:
        assert ranking().candidates[0].verdict is not Verdict.OOM


def test_host_memory_can_be_what_misses():
    small = load_hardware("a100-40gb", 1)
    with pytest.raises(NothingFitsError, match="host memory for a node's GPUs"):
        rank(load_model("llama-3.1-70b"), hardware=small)


def test_json_form_round_trips():
    best = rank().candidates[0]
    document = json.loads(json.dumps(best.to_dict(MODEL)))
    assert Plan.from_dict(document["plan"]) == best.plan
    assert set(document) == {
        "model", "plan", "world_size", "memory", "time", "verdict", "fit_probability",
        "violations",
    }  # fmt: skip
    assert {"total_bytes", "interval_bytes", "components", "peak_instant"} <= set(
        document["memory"]
    )
    assert sum(document["memory"]["components"].values()) == document["memory"]["total_bytes"]
    assert {"step_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "components"} == set(
        document["time"]
    )
