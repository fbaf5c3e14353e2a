"""One FSDP1 rank with frozen, recomputed layers: what it holds, in tensors of the hidden states."""

import os
import sys
import tempfile
import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.checkpoint import checkpoint

HIDDEN, TOKENS, LAYERS = 64, 4096, 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False).requires_grad_(False)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Model(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer.__call__, x, use_reentrant=self.reentrant)
        return x


def peak(wrapped, reentrant):
    model = Model(reentrant)
    if wrapped:
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Layer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    x = torch.randn(TOKENS, HIDDEN)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model(x).sum().backward()
    live = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest / x.nbytes


def main():
    warnings.simplefilter("ignore")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store.name}", rank=0, world_size=1
        )
        for wrapped in (False, True):
            for reentrant in (False, True):
                sys.stdout.write(f"{peak(wrapped, reentrant):.2f} ")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
