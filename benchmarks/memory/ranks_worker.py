"""Ranks that train two steps as the runner does and write down what their memory held when.

    python benchmarks/memory/ranks_worker.py FOLDER...

Each folder holds the ``request.json`` of one launch. This process imports the libraries once and
forks the ranks of one launch after the other; each leaves ``rank-N.memory.json``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks_timeline import mark, record, settle_collectives
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as Ddp

from autotune.runner import session as session_module
from autotune.runner import trainer as trainer_module
from autotune.runner.answer import Answer
from autotune.runner.data.loader import EvalLoader
from autotune.runner.engines import training_arguments
from autotune.runner.session import Session, make_trainer, open_session
from autotune.runner.timers import StepTimer
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.training import TrainSettings
from autotune.trial.protocol import REQUEST_FILE, Request, read_message

_STEPS = 2
"""From the second step on the optimizer's states exist."""
_SETTINGS = TrainSettings(learning_rate=1e-4, lr_scheduler="constant")
_LIMIT_S = 240.0


class Phases:
    """Marks a rank's phases: each layer forward and backward, head, loss, optimizer."""

    def __init__(self) -> None:
        self.step, self.micro, self.now = 1, 0, ""
        self._backward = False

    def enter(self, phase: str, *, python_holds_all: bool = False) -> None:
        """Begin a phase, unless it is under way."""
        if phase != self.now:
            self.now = phase
            mark(f"{self.step}.{self.micro}.{phase}", python_holds_all=python_holds_all)

    def in_backward(self, phase: str) -> None:
        """A layer's backward begins with whatever of it is seen first."""
        if self._backward:
            self.enter(phase)

    def watch(self, model: Any) -> None:
        """Set hooks before an engine wraps the model."""
        base = next(m for m in model.modules() if hasattr(m, "layers") and hasattr(m, "norm"))
        self._layers = list(base.layers)
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
            layer.register_forward_hook(self._after(number))
        base.norm.register_forward_pre_hook(lambda *_: self._forward("head_forward"))
        base.embed_tokens.register_forward_pre_hook(lambda *_: self._forward("embedding_forward"))
        base.embed_tokens.register_forward_hook(self._after_embedding)

    def _after_embedding(self, _module: Any, _args: Any, output: Any) -> None:
        if output.requires_grad and not self._backward:
            output.register_hook(lambda _: self.in_backward("embedding_backward"))

    def _forward(self, phase: str) -> None:
        if not self._backward:
            self.enter(phase)

    def _before(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            self._forward(f"forward_{number}")
            self.in_backward(f"backward_{number}")

        return hook

    def _after(self, number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and not self._backward:
                hidden.register_hook(lambda _: self.in_backward(f"backward_{number}"))

        return hook

    def install(self) -> None:
        """Wrap the functions a step goes through."""
        phases, loss = self, trainer_module.token_weighted_loss
        training_step, build = AutotuneTrainer.training_step, session_module.build_model
        pre_backward = FSDPState._pre_backward

        def marked_loss(logits: Any, *rest: Any, **options: Any) -> Any:
            phases.enter("loss_forward")
            if logits.requires_grad:
                logits.register_hook(lambda _: phases.enter("head_backward"))
            value = loss(logits, *rest, **options)
            phases._backward = value.requires_grad
            phases.enter("loss_backward")
            return value

        def marked_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            phases.micro += 1
            phases.enter("embedding_forward")
            value = training_step(self, *args, **kwargs)
            phases._backward = False
            phases.enter("after_micro_step")
            return value

        def marked_build(*args: Any) -> Any:
            model = build(*args)
            phases.watch(model)
            return model

        def marked_pre_backward(state: Any, grad: Any) -> Any:
            for number, layer in enumerate(phases._layers):
                if any(layer is m or layer in m.children() for m in state._modules):
                    phases.in_backward(f"backward_{number}")
            return pre_backward(state, grad)

        trainer_module.token_weighted_loss = marked_loss
        AutotuneTrainer.training_step = marked_step  # type: ignore[method-assign]
        session_module.build_model = marked_build
        FSDPState._pre_backward = marked_pre_backward  # type: ignore[method-assign]


class MarkingTimer(StepTimer):
    """Tells where DeepSpeed, inside backward, begins its optimizer step."""

    def __init__(self, gauge: Any, phases: Phases) -> None:
        super().__init__(gauge, enabled=False)
        self._phases = phases

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Mark the step; leave what follows to the next mark."""
        self._phases.enter("optimizer_step")
        yield
        self._phases.enter("after_optimizer_step")

    def end_step(self) -> Any:
        """Nothing is timed."""


def measure(request: Request, answer: Answer) -> dict[str, Any]:
    """Train, evaluate, gather the weights; return the windows and what stays."""
    settle_collectives()  # before DeepSpeed looks them up
    session = open_session(request, answer)
    phases, found = Phases(), {}
    phases.install()

    def run() -> None:
        trainer = _trainer(session, phases)
        trainer.add_callback(_StepMarks(trainer, phases, found))
        trainer.train()
        phases.micro = 0
        phases.enter("evaluation")
        trainer.evaluate()
        phases.enter("gather")
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        phases.enter("end")
        del state

    windows = record(run)
    return {
        "windows": [asdict(w) for w in windows],
        "found": found,
        "asserted": answer.result.asserted,
    }


def _trainer(session: Session, phases: Phases) -> AutotuneTrainer:
    plan, sequences = session.plan, session.data.train
    few = sequences.take(
        np.arange(min(len(sequences), plan.micro_batch_size * plan.data_parallel_size))
    )
    return make_trainer(
        session,
        lambda: training_arguments(
            session.request, plan, _SETTINGS,
            max_steps=_STEPS, save_strategy="no", logging_strategy="no",
        ),
        loader=session.train_loader(),
        timer=MarkingTimer(session.gauge, phases),
        eval_loader=EvalLoader(few, micro_batch_size=plan.micro_batch_size, **session.place),
    )  # fmt: skip


class _StepMarks(trainer_module.TrainerCallback):
    def __init__(self, trainer: AutotuneTrainer, phases: Phases, found: dict[str, Any]) -> None:
        self._trainer, self._phases, self._found = trainer, phases, found

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """What the engine's preparation allocated stands before this."""
        # DDP's reducer holds its buckets in C++.
        wrapped = self._trainer.model_wrapped
        self._phases.enter("prepared", python_holds_all=not isinstance(wrapped, Ddp))

    def on_pre_optimizer_step(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Note sizes while gradients exist (not reached by DeepSpeed, which steps in backward)."""
        self._found["gradients"] = _bytes(p.grad for p in model.parameters())

    def on_step_end(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Note what stays, and count the step."""
        parameters = list(model.parameters())
        kept = [v for s in optimizer.optimizer.state.values() for v in s.values()]
        kept += [p for g in optimizer.optimizer.param_groups for p in g["params"]]
        kept += getattr(optimizer.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
        parameters = [getattr(p, "ds_tensor", p) for p in parameters]
        self._found["parameters"] = _bytes(parameters)
        self._found["optimizer"] = _bytes(kept, but=parameters)
        self._phases.step += 1
        self._phases.micro = 0
        self._phases.enter("between_steps")


def _bytes(tensors: Any, but: Any = ()) -> int:
    def storages(some: Any) -> dict[int, int]:
        local = (t._local_tensor if isinstance(t, DTensor) else t for t in some)
        real = (t.untyped_storage() for t in local if isinstance(t, torch.Tensor))
        return {s.data_ptr(): s.nbytes() for s in real}

    left = storages(tensors)
    for pointer in storages(but):
        left.pop(pointer, None)
    return sum(left.values())


def _rank(folder: Path, request: Request, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "AUTOTUNE_LAUNCH_DIR": str(folder), "AUTOTUNE_PARENT_PID": str(os.getppid()),
    }  # fmt: skip
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        result = measure(request, Answer(request))
        temporary = folder / f".rank-{rank}.tmp"
        temporary.write_text(json.dumps(result))
        temporary.rename(folder / f"rank-{rank}.memory.json")
        code = 0
    except BaseException:  # a forked child: its parent reads its code and its log
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(folder: Path) -> bool:
    """Run the ranks of one folder; say whether all of them wrote their result."""
    request = read_message(Request, folder / REQUEST_FILE)
    world = request.plan_object().world_size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(world):
        child = os.fork()
        if not child:
            _rank(folder, request, rank, world, port)
        children[child] = rank
    started, well = time.monotonic(), True
    while children:
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.pop(child)
                well &= status == 0
        if children and (not well or time.monotonic() - started > _LIMIT_S):
            time.sleep(2)  # the others' last words
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return False
        time.sleep(0.05)
    return well


def main() -> None:
    """Run every folder named on the command line."""
    import deepspeed  # noqa: F401  (once, before the ranks)
    import peft  # noqa: F401

    for name in sys.argv[1:]:
        started = time.monotonic()
        well = launch(Path(name).resolve())
        print(f"{name}\t{'ok' if well else 'failed'}\t{time.monotonic() - started:.1f}", flush=True)


if __name__ == "__main__":
    main()
