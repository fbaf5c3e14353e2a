"""The estimated peak of one process against what PyTorch's allocator really handed out."""

import contextlib
import itertools

import pytest

from autotune.memory import estimate_memory
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.integration.allocator import allocator_peak

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.integration,
    # The name of transformers 5.17, deprecated in 5.23.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning"),
]

# The closed form leaves out small temporaries and the order in which backward frees.
TOLERANCE = 0.03


def train(spec, workload, plan):
    config = transformers.AutoConfig.for_model(**spec.hf_config)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    if plan.recompute is Recompute.FULL:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.zeros(plan.micro_batch_size, workload.seq_len, dtype=torch.long)
    mask = None
    if workload.packing:
        size = (plan.micro_batch_size, 1, workload.seq_len, workload.seq_len)
        mask = torch.ones(size, dtype=torch.bool).tril_()

    def loss():
        autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast if workload.precision == "bf16" else contextlib.nullcontext():
            logits = model(
                input_ids=ids,
                position_ids=torch.arange(workload.seq_len).expand_as(ids),
                attention_mask=mask,
                use_cache=False,
            ).logits
        flat = logits.float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, ids.flatten(), reduction="sum")

    for _ in range(2):  # the optimizer's states exist from the second step on
        for _ in range(plan.grad_accum_steps):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()


ALL_SETTINGS = list(
    itertools.product(
        [("tiny-qwen3", "bf16"), ("tiny-llama", "fp32")], [False, True], list(Recompute)
    )
)
QUICK = [ALL_SETTINGS[1], ALL_SETTINGS[2], ALL_SETTINGS[4], ALL_SETTINGS[7]]
"""Each value of each setting twice; the other half is left to make test-slow."""


@pytest.mark.parametrize(
    ("name", "precision", "packing", "recompute"),
    [
        pytest.param(
            *model,
            packing,
            recompute,
            marks=() if (model, packing, recompute) in QUICK else pytest.mark.slow,
        )
        for model, packing, recompute in ALL_SETTINGS
    ],
)
def test_one_process(name, precision, packing, recompute):
    spec = load_model(name)
    workload = Workload(seq_len=192, global_batch_size=4, precision=precision, packing=packing)
    plan = Plan(
        strategy="ddp", engine=Engine.DDP, micro_batch_size=2, grad_accum_steps=2,
        recompute=recompute,
    )  # fmt: skip
    real = allocator_peak(lambda: train(spec, workload, plan))
    found = estimate_memory(spec, workload, plan, load_hardware("cpu", 1))
    # This process has no group, so nothing wraps the model.
    predicted = found.allocator_bytes - found.components["buckets"]
    assert predicted == pytest.approx(real, rel=TOLERANCE)
