"""Ring attention on real ranks against SDPA over the whole sequence: a rank of `test_ring`.

Usage: ring_worker RANK WORLD PORT FILE; writes the largest differences of each case, and how often
it gathered from the other ranks, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from autotune.runner.ring import local_documents, ring_attention

BATCH, SEQ, HEADS, KV_HEADS, DIM = 3, 48, 6, 2, 16
SCALING = 0.3
# Starts of the documents of each sequence: none, one across the ranks' border, several.
DOCUMENTS = ([], [17], [5, 11, 30, 31])
CASES = [
    (dtype, packed, stride)
    for dtype in ("float32", "bfloat16")
    for packed, stride in ((False, 1), (True, 1), (True, 2))
]


class Gathers:
    """Counts the gathers of a block of code, which are as they were."""

    def __init__(self) -> None:
        self.count = 0
        self._gather = dist.all_gather_into_tensor

    def __enter__(self) -> Gathers:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self._gather(*args, **kwargs)

        dist.all_gather_into_tensor = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather_into_tensor = self._gather


def differences(rank: int, world: int, dtype: str, packed: bool, stride: int) -> dict[str, float]:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    query, key, value, grad = (
        torch.randn(BATCH, heads, SEQ, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    whole = [x.to(kind).float().requires_grad_() for x in (query, key, value)]
    ids = torch.zeros(BATCH, SEQ, dtype=torch.int32)
    for row, starts in enumerate(DOCUMENTS if packed else ()):
        for start in starts:
            ids[row, start:] += 1
    mask = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]
    want = F.scaled_dot_product_attention(*whole, attn_mask=mask, scale=SCALING, enable_gqa=True)
    want.backward(grad)
    part = slice(rank * SEQ // world, (rank + 1) * SEQ // world)
    own = [x.detach()[:, :, part].to(kind).clone().requires_grad_() for x in whole]
    places = local_documents(ids, cp=world, rank=rank, device=ids.device) if packed else None
    output = ring_attention(
        *own, group=dist.group.WORLD, scaling=SCALING, documents=places, heads_k_stride=stride
    ).transpose(1, 2)
    (output.float() * grad[:, :, part]).sum().backward()
    assert all(x.grad.dtype is kind for x in own), "a gradient of another type"
    pairs = {"output": (output, want[:, :, part])}
    pairs |= {
        f"d{name}": (x.grad, y.grad[:, :, part])
        for name, x, y in zip("qkv", own, whole, strict=True)
    }
    return {name: float((a.float() - b).abs().max()) for name, (a, b) in pairs.items()}


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # the package's, of names torch 2.13 renames
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    found = {}
    for case in CASES:
        with Gathers() as gathers:
            differ = differences(rank, world, *case)
        found[str(case)] = {"differences": differ, "gathers": gathers.count}
    Path(sys.argv[4]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
