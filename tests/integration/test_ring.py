"""Ring attention by itself: torch's kernels under flash-attn's names, and the ring over ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from autotune.plan import CpBackend  # noqa: E402
from autotune.runner import checks, flash_kernels, ring_package, ulysses  # noqa: E402
from tests.integration import ring_worker  # noqa: E402
from tests.integration.ranks import make_plan, trial_request  # noqa: E402

pytestmark = pytest.mark.integration
F = torch.nn.functional
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
"""Scores of order 1: in fp32 the order of sums, in bf16 seven bits of mantissa."""


def random(*shape):
    return torch.randn(*shape, dtype=torch.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_one_length(causal):
    torch.manual_seed(1)
    q, k, v, dout = random(2, 9, 4, 8), random(2, 9, 2, 8), random(2, 9, 2, 8), random(2, 9, 4, 8)
    out, lse, *_ = flash_kernels._flash_attn_forward(q, k, v, 0.0, 0.3, causal)
    heads_first = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(
        *heads_first, is_causal=causal, scale=0.3, enable_gqa=True
    )
    scores = 0.3 * heads_first[0] @ heads_first[1].repeat_interleave(2, 1).transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    assert lse.shape == (2, 4, 9) and lse.dtype is torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.transpose(1, 2), want, atol=1e-5, rtol=0)
    want.backward(dout.transpose(1, 2))
    made = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_kernels._flash_attn_backward(dout, q, k, v, out, lse, *made, 0.0, 0.3, causal)
    for gradient, x in zip(made, heads_first, strict=True):
        torch.testing.assert_close(gradient.transpose(1, 2), x.grad, atol=1e-5, rtol=0)


def test_documents_with_keys_of_earlier_ranks():
    """The first document's queries are its last 3 tokens of 8: the last query sees the last key."""
    torch.manual_seed(2)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 7], [0, 8, 12]))
    q, k, v, dout = random(7, 4, 8), random(12, 2, 8), random(12, 2, 8), random(7, 4, 8)
    out, lse, *_ = flash_kernels._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, 4, 8, 0.0, 0.3, True
    )
    mask = torch.zeros(7, 12, dtype=torch.bool)
    mask[:3, :8] = torch.ones(3, 8, dtype=torch.bool).tril(5)
    mask[3:, 8:] = torch.ones(4, 4, dtype=torch.bool).tril()
    whole = [x[None].transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*whole, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert lse.shape == (4, 7)
    torch.testing.assert_close(out, want[0].transpose(0, 1), atol=1e-5, rtol=0)
    want.backward(dout[None].transpose(1, 2))
    made = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_kernels._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *made, cu_q, cu_k, 4, 8, 0.0, 0.3, True
    )
    for gradient, x in zip(made, whole, strict=True):
        torch.testing.assert_close(gradient, x.grad[0].transpose(0, 1), atol=1e-5, rtol=0)


def test_documents_of_many_lengths_leave_nothing_in_the_process():
    """A kernel compiled for each length would stay."""
    script = """
import torch
from autotune.runner.flash_kernels import _flash_attn_varlen_backward, _flash_attn_varlen_forward
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for number, length in enumerate(range(5, 205)):
    cu = torch.tensor([0, length], dtype=torch.int32)
    q, k, v, dout, *made = (torch.randn(length, 4, 32, dtype=torch.bfloat16) for _ in range(7))
    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu, cu, length, length, 0.0, 0.2, True)
    _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *made, cu, cu, length, length, 0.0, 0.2, True
    )
    if number == 20:
        before = resident()
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * 2**20


@pytest.mark.parametrize("asked", [(0.1, -1, -1), (0.0, 64, 0)])
def test_what_the_kernels_do_not_know_is_refused(asked):
    q = random(1, 4, 2, 8)
    dropout, left, right = asked
    with pytest.raises(ValueError, match="no dropout, no window"):
        flash_kernels._flash_attn_forward(q, q, q, dropout, 0.3, True, left, right)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_import_leaves_nothing_behind():
    """transformers would take a module `flash_attn` for flash-attn."""
    package = ring_package.load_ring_package("cpu")
    assert package.kernels == ring_package.TORCH_FLASH
    left = ("flash_attn", "flash_attn.flash_attn_interface", "ring_flash_attn.adapters")
    assert not [name for name in left if name in sys.modules]
    assert package.ring._flash_attn_backward is flash_kernels._flash_attn_backward


# With two ranks no document crosses three, and no block makes a second hop.
@pytest.mark.parametrize(
    "world", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_ring_is_attention_over_the_whole_sequence(world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [tmp_path / f"{rank}.json" for rank in range(world)]
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", ring_worker.__name__, *map(str, (rank, world, port, file))],
            env=os.environ | {"PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    words = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(words)
    for file in files:
        found = json.loads(file.read_text())
        assert list(found) == [str(case) for case in ring_worker.CASES]
        for (dtype, packed, stride), seen in zip(ring_worker.CASES, found.values(), strict=True):
            assert max(seen["differences"].values()) < BOUNDS[dtype], (file.name, found)
            # Keys and values apart, forward and backward, of `heads_k_stride` heads at a time.
            gathers = 4 * ring_worker.BATCH * ring_worker.KV_HEADS // stride if packed else 0
            assert seen["gathers"] == gathers, (file.name, found)


RING = make_plan("zero2", 2, cp=2, cp_backend=CpBackend.RING)
# What a step of 2 layers leaves behind, by what went wrong; each rank has 32 of 64 tokens.
RAN = {"calls": 2, "ring_calls": 2, "document_calls": 2, "last_shape": (4, 8, 32, 16)}
WRONG = {
    "ulysses ran": ({"ring_calls": 0}, "ring attention calls in a step: asked for 2, but 0 runs"),
    "a split of heads": ({"last_shape": (4, 4, 64, 16)}, "attention heads a rank: asked for 8"),
    "whole sequences": ({"last_shape": (4, 8, 64, 16)}, "queries of a rank: asked for 32"),
    "one document": ({"document_calls": 0}, "keep documents apart: asked for 2, but 0"),
    "a smaller group": ({"ranks": 1}, "ranks of the ring: asked for 2, but 1"),
    "another stride": ({"heads_k_stride": 2}, "heads gathered at a time: asked for 1, but 2"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", [None, *WRONG])
def test_a_run_without_its_ring_is_refused(what, tmp_path, monkeypatch):
    changes, words = WRONG[what] if what else ({}, "")
    values = RAN | changes
    ranks = values.pop("ranks", 2)
    context = ulysses.AttentionContext(cp=2, ring=True, last_dtype=torch.bfloat16, **values)
    monkeypatch.setattr(checks, "CONTEXT", context)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: ranks)
    request = trial_request(RING, tmp_path, rungs=[(4, 1)])
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=8)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: SimpleNamespace(config=config)),
        model_wrapped=None,
        args=SimpleNamespace(device=torch.device("cpu")),
    )
    if what is None:
        found = checks.check_attention(trainer, RING, request, 1)
        assert found["attention"] == "ring, varlen_llama3, torch's flash kernels"
        return
    with pytest.raises(checks.InvalidRunError) as refused:
        checks.check_attention(trainer, RING, request, 1)
    assert words in str(refused.value)
