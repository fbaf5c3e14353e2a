"""One micro-step of a model under fake tensors, cut into the phases of a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autotune.errors import AutotuneError
from autotune.memory.setup import Attention, Float8, TraceKey
from autotune.runner import ulysses
from autotune.runner.float8 import put_in_float8
from autotune.runner.ring import LocalDocuments, ring_attention
from autotune.runner.trace import liger, losses, models, regimes
from autotune.runner.trace.ledger import Ledger
from autotune.runner.ulysses import AttentionContext, document_mask

_OURS = (Attention.RUNNER, Attention.RING, Attention.SDPA)
EMBEDDING, HEAD, LOSS = "embedding", "head", "loss"
LOSS_BACK, HEAD_BACK, EMBEDDING_BACK = "loss back", "head back", "embedding back"


def layer_phase(place: int, *, back: bool) -> str:
    """Return the name of a layer's phase."""
    return f"layer {place} back" if back else f"layer {place}"


class Tracer:
    """A cut model, ready to be run at several sizes."""

    def __init__(self, cut: models.Cut, key: TraceKey, cp: int) -> None:
        """Wrap the model as the key's engine does.

        Args:
            cut: this tracer's own, without storage.
            key: what decides the allocations.
            cp: ranks of a sequence; 1 when not `key.exchanged`.
        """
        self._key = key
        self._cp = cp
        self.cut = cut
        if key.loss in losses.HEAD_IN_THE_LOSS:
            losses.drop_head(cut.model)
        if key.fused_kernels:
            liger.patch(cut.model)
        if key.float8 is not None:
            put_in_float8(cut.model, emulate=key.float8 is Float8.EMULATED, on_cpu=True)
        self._loss_function = losses.loss_of(key.loss, cut.model)
        self._layer = cut.layers[0]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            models.materialise(cut)
            self._outside = regimes.wrap(cut, key)
        self._ledger: Ledger | None = None
        self._mark_phases()

    def train(self, batch: int, local: int) -> Ledger:
        """Trace a training micro-step of `batch` sequences of `local` tokens."""
        return self._run(batch, local, self._train)

    def evaluate(self, batch: int, local: int) -> Ledger:
        """Trace an evaluation of as much."""
        return self._run(batch, local, self._evaluate)

    def _run(self, batch: int, local: int, step: Any) -> Ledger:
        copies = {layer_phase(i, back=False): n for i, n in enumerate(self.cut.copies)}
        ledger = Ledger(copies)
        fused = self._key.fused_kernels
        rope = liger.patched_rope(self._layer) if fused else contextlib.nullcontext()
        lent = _context(self._key, self._cp, batch, local)
        with self._mode, _lending(lent) as context, rope:
            ledger.ignore([*self.cut.model.parameters(), *self.cut.model.buffers()])
            self._ledger = ledger
            with ledger:
                ledger.enter(EMBEDDING)
                step(self._batch(batch, local))
                ledger.finish()
            self._ledger = None
            if context.calls == 0 and self._key.attention in _OURS:
                raise AutotuneError(models.no_interface(type(self.cut.model).__name__))
        return ledger

    def _batch(self, batch: int, local: int) -> dict[str, torch.Tensor]:
        """Make what the loader hands over; `autotune.runner.data.loader`."""
        made = {
            name: torch.zeros(batch, local, dtype=torch.long)
            for name in ("input_ids", "position_ids", "shift_labels")
        }
        if self._masked_by_document:
            size = local * self._cp
            made["full_document_ids"] = torch.zeros(batch, size, dtype=torch.long)
        return made

    def _train(self, inputs: dict[str, torch.Tensor]) -> None:
        self.cut.model.train()
        tokens = torch.ones((), dtype=torch.long)
        loss = self._loss(inputs, tokens)
        self._enter(LOSS_BACK)
        loss.backward()

    def _evaluate(self, inputs: dict[str, torch.Tensor]) -> None:
        self.cut.model.eval()
        with torch.no_grad():
            self._loss(inputs, torch.ones(()))

    def _loss(self, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Compute the loss as `AutotuneTrainer.compute_loss` does, with its lifetimes."""
        logits, labels = self._forward(inputs)
        self._enter(LOSS)
        if logits.requires_grad:
            logits.register_hook(lambda _: self._enter(HEAD_BACK))
        return self._loss_function(logits, labels, tokens)

    @property
    def _masked_by_document(self) -> bool:
        return self._key.packed and self._key.attention in (Attention.RUNNER, Attention.SDPA)

    def _forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        documents = inputs.get("full_document_ids")
        if documents is not None:
            ulysses.CONTEXT.mask = document_mask(documents)
        outputs = self.cut.model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
        return outputs.logits, inputs["shift_labels"]

    def _enter(self, phase: str) -> None:
        if self._ledger is not None and self._ledger.phase != phase:
            self._ledger.enter(phase)

    def _mark_phases(self) -> None:
        last = len(self._outside) - 1
        for place, layer in enumerate(self._outside):
            layer.register_forward_pre_hook(self._before(place), prepend=True, with_kwargs=True)
            layer.register_forward_hook(self._after(place, is_last=place == last))
        for parameter in self.cut.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._finish_gradient)

    def _finish_gradient(self, parameter: nn.Parameter) -> None:
        assert self._ledger is not None
        self._ledger.finish_gradient(parameter)

    def _before(self, place: int) -> Any:
        def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter(layer_phase(place, back=False))
            hidden = args[0] if args else kwargs["hidden_states"]
            if place == 0 and hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter(EMBEDDING_BACK))

        return mark

    def _after(self, place: int, *, is_last: bool) -> Any:
        own = layer_phase(place, back=False)

        def mark(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter(layer_phase(place, back=True)))
            if is_last and self._ledger is not None and self._ledger.phase == own:
                # Of the layers it stands for, each output goes when the next layer has run.
                self._ledger.count_once(hidden)
                self._ledger.enter_with_next(HEAD)

        return mark


def _context(key: TraceKey, cp: int, batch: int, local: int) -> AttentionContext:
    """Return what the attention function knows of a traced micro-batch.

    Under the ring that is the last rank, which attends to every block. Packed sequences are one
    document of the rank's own tokens (`_in_one_row`): what is gathered is whole for any documents,
    and the CUDA kernel takes no more for many of them.
    """
    if key.attention is not Attention.RING:
        return AttentionContext(cp=cp)
    tokens = batch * local
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    document = LocalDocuments(
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=tokens,
        max_seqlen_k=tokens,
        local_k_slice=slice((cp - 1) * tokens, cp * tokens),
    )
    return AttentionContext(
        group=cast(Any, object()),
        cp=cp,
        ring=True,
        heads_k_stride=key.gathered[1] or 1,
        documents=[document] if key.packed else None,
    )


@contextlib.contextmanager
def _lending(lent: AttentionContext) -> Iterator[AttentionContext]:
    """Lend the attention function a context of its own and an exchange with nobody."""
    distributed = {
        "get_rank": lambda group=None: lent.cp - 1 if lent.ring else 0,
        "get_world_size": lambda group=None: lent.cp,
        "get_global_rank": lambda group, rank: rank,
        # A hop and a gathering write into buffers that are there already.
        "P2POp": lambda *args, **kwargs: None,
        "batch_isend_irecv": lambda operations: [],
        "all_gather_into_tensor": lambda output, x, **kwargs: mock.Mock(),
        "reduce_scatter_tensor": lambda output, x, **kwargs: None,
    }
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(ulysses, "CONTEXT", lent))
        patches.enter_context(mock.patch.object(ulysses, "_all_to_all", _exchange_nothing))
        patches.enter_context(mock.patch.object(ulysses, "ring_attention", _in_one_row))
        # ring-flash-attn merges blocks in TorchScript, which rewrites itself after its first runs:
        # operators and lifetimes would differ from one traced size to the next.
        patches.enter_context(torch.jit.optimized_execution(False))
        for name, stand_in in distributed.items():
            patches.enter_context(mock.patch.object(torch.distributed, name, stand_in))
        yield lent


def _in_one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Attend to packed sequences one after another in one call, so that none is an operator more.

    The runner calls once a sequence and gathers for one at a time: with several, this takes the
    gathered buffers for all of them.
    """
    if settings["documents"] is None:
        return ring_attention(query, key, value, **settings)
    batch, _, local, _ = query.shape
    rows = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
    return ring_attention(*rows, **settings).unflatten(1, (batch, local))[0]


def _exchange_nothing(x: torch.Tensor, group: object) -> torch.Tensor:
    """Allocate what `ulysses._all_to_all` does."""
    return torch.empty_like(x.contiguous())
