"""The one subclass of the Hugging Face `Trainer`, for trials and for full runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from autotune.plan import Engine, Plan
from autotune.runner.data.loader import EvalLoader, RankLoader
from autotune.runner.loss import IGNORED_LABEL, token_weighted_loss
from autotune.runner.offloading import offload_activations
from autotune.runner.timers import StepTimer
from autotune.runner.ulysses import CONTEXT
from autotune.spec.workload import LigerKernel, Workload
from autotune.trial.protocol import Phase

Batch = dict[str, torch.Tensor]


class AutotuneTrainer(Trainer):
    """Owns the data loader, the sequence-parallel split, the loss and the timers.

    Differences from `Trainer` that a reader would not expect:

    - batches come rank-local from `RankLoader`; accelerate never sees the loader, so it can neither
      reorder nor duplicate data;
    - the loss is not the model's: the model returns logits, `token_weighted_loss` does the rest;
    - `evaluate` sums token losses over the held-out sequences, on every engine alike;
    - evaluation and checkpoints are said to `enter`, as phases of their own.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        plan: Plan,
        loader: Any,
        timer: StepTimer,
        workload: Workload,
        enter: Callable[[Phase], None],
        eval_loader: EvalLoader | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        # Trainer refuses an evaluation strategy without a data set; `evaluate` never reads this.
        held_out: list[Batch] | None = [] if eval_loader is not None else None
        super().__init__(model=model, args=args, eval_dataset=held_out, callbacks=callbacks)
        # Tells Trainer that the loss is already normalised over the whole step.
        self.model_accepts_loss_kwargs = True
        self.plan = plan
        self.loader = loader
        self.timer = timer
        self.packed = workload.packing
        self._chunked = workload.chunked_loss
        self._fused_loss = LigerKernel.FUSED_LINEAR_CROSS_ENTROPY in workload.liger
        self._offloads = workload.activation_offloading
        self._eval_loader = eval_loader
        self._enter = enter
        self.last_evaluated_step = -1
        self.step_tokens = 0

    def get_train_dataloader(self) -> RankLoader:
        """Return our own loader, not prepared by accelerate."""
        return self.loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Fetch one optimizer step's micro-batches and count its valid tokens over all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        valid = sum(int((batch["shift_labels"] != IGNORED_LABEL).sum()) for batch in batches)
        tokens = torch.tensor(valid, dtype=torch.int64, device=device)
        if dist.is_initialized():
            dist.all_reduce(tokens)
            tokens //= self.plan.tp  # the ranks of a tensor-parallel group read the same
        self.step_tokens = int(tokens)
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's share of the step's mean token loss; see `token_weighted_loss`."""
        assert num_items_in_batch is not None
        # Over these ranks gradients are averaged; along `tp` they are parts, or the same.
        world = self.args.world_size // self.plan.tp
        with self._offloaded():
            if self._fused_loss:
                return self._fused_loss_of(model, inputs, num_items_in_batch) * world
            logits, labels = self._forward(model, inputs)
            return token_weighted_loss(
                logits, labels, num_items_in_batch, world, chunked=self._chunked
            )

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one micro-step under the timer."""
        with self.timer.micro_step(sync=self.accelerator.sync_gradients):
            return super().training_step(model, inputs, num_items_in_batch)

    def _offloaded(self) -> AbstractContextManager[Any]:
        """Send what autograd keeps to the host; recomputation leaves little but layers' inputs."""
        return offload_activations() if self._offloads else nullcontext()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the mean token loss over the held-out sequences, summed over all ranks."""
        with self._in_phase(Phase.EVALUATE):
            return self._held_out_loss(metric_key_prefix)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._in_phase(Phase.SAVE):
            super()._save_checkpoint(*args, **kwargs)

    @contextmanager
    def _in_phase(self, phase: Phase) -> Iterator[None]:
        """Say the phase, and when it went well that it is over: what fails in it, dies in it."""
        self._enter(phase)
        yield
        self._enter(Phase.STEP)

    def _held_out_loss(self, metric_key_prefix: str) -> dict[str, float]:
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self._eval_loader or ():
                logits, labels = self._forward(model, self._prepare_inputs(batch))
                one = torch.ones((), device=logits.device)
                # Training that needs no fp32 copy of all logits must not meet one here.
                chunked = self._chunked or self._fused_loss
                sums[0] += token_weighted_loss(logits, labels, one, 1, chunked=chunked).double()
                sums[1] += (labels != IGNORED_LABEL).sum()
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train()
        self.last_evaluated_step = self.state.global_step
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= self.plan.tp
        metrics = {
            f"{metric_key_prefix}_loss": float(sums[0] / sums[1].clamp(min=1)),
            f"{metric_key_prefix}_tokens": float(sums[1]),
        }
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _forward(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        CONTEXT.begin(inputs["full_document_ids"] if self.packed else None)
        outputs = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
        return outputs.logits, inputs["shift_labels"]

    def _fused_loss_of(
        self, model: nn.Module, inputs: Batch, step_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed token losses over `step_tokens`, by the forward Liger put in."""
        CONTEXT.begin(inputs["full_document_ids"] if self.packed else None)
        loss: torch.Tensor = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            shift_labels=inputs["shift_labels"],
            num_items_in_batch=step_tokens.clamp(min=1),
            use_cache=False,
        ).loss
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Skip Trainer's own count, which runs every micro-step; ours is in `autotune.timing`."""
        return 0


def wrap_optimizer_step(trainer: AutotuneTrainer) -> None:
    """Time DeepSpeed's optimizer step apart: accelerate runs it inside `backward`."""
    if trainer.plan.engine is not Engine.DEEPSPEED:
        return
    engine = trainer.model_wrapped
    step = engine.step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        with trainer.timer.optimizer_step():
            return step(*args, **kwargs)

    engine.step = timed_step
