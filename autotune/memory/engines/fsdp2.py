"""FSDP2 (PyTorch 2.13, ``torch/distributed/fsdp/_fully_shard``), as accelerate 1.15 wraps.

`fsdp2_prepare_model` makes a unit of each layer, of the embedding, and of final norm and head
together (the tail, which is never resharded in forward). A tied embedding is in the tail, so its
unit lasts from the start of forward to the end of backward. Under recompute each layer's checkpoint
is wrapped once more, without parameters: it casts, but gathers nothing.
"""

from __future__ import annotations

import numpy as np

from autotune.memory.engines.base import Bytes, EngineMemory, Place, Work


class Fsdp2(EngineMemory):
    """Sharded parameters in the stored type, gathered by unit in the compute type."""

    def resting(self) -> dict[str, Bytes]:
        """Return the rank's part of the states."""
        if self.runs.offload_params:
            return {"offloaded": self._offloaded()} if self.runs.on_cpu else {}
        return {
            "parameters": self.setup.parameter_bytes * self.shard(self.sizes.total),
            "optimizer": self.optimizer_bytes(self.shard(self.sizes.trainable)),
        }

    def host(self) -> Bytes:
        """Return offloaded parameters and states, and the gradients of a step."""
        if not self.runs.offload_params:
            return 0.0
        return self._offloaded() + self._sharded(self.sizes.trainable, always=True)

    def held(self) -> Bytes:
        """Return the gradients of micro-steps that do not synchronise: whole, in fp32."""
        return self.setup.reduce_bytes * self.sizes.trainable

    def enter(self, place: Place) -> Work:
        """Return a gather's buffers, while the unit before still has its own."""
        if place.kind == "tail" and self.sizes.tied:
            return Work(gathered=self._lasting(place) + self._output(place.before))
        # The cast shard, the gathered buffer and, on gloo, its copy.
        size = place.unit * (1 / self.runs.shards + 1 + self.runs.on_cpu) * self._several
        return Work(gathered=self._lasting(place) + self._output(place.before) + self.width * size)

    def forward(self, place: Place) -> Work:
        """Return the unit's parameters, and the buffer they were gathered in.

        It is kept until the next unit has copied its own out.
        """
        unit: Bytes = place.unit
        output = self._output(unit)
        if place.kind == "tail" and self.sizes.tied:
            unit, output = 0.0, self._output(place.before)
        if place.kind == "embedding" and self.sizes.tied:
            unit, output = 0.0, self._output(self._tail)
        return Work(gathered=self._lasting(place) + self.width * unit + output)

    def loss(self) -> Work:
        """Return the tail, and all units where forward does not reshard."""
        return Work(gathered=self.width * (self._tail if self.runs.reshard else self.sizes.total))

    def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
        """Return the unit's parameters, the one fetched ahead, and the reduction before."""
        gathered = self._unsharded(place) + self._output(self._ahead(place))
        gradients = self._gradients(place.finished, later=later) + self.width * np.asarray(inside)
        return Work(gradients, gathered, self._reduced_before(place, later=later))

    def arrive(self, place: Place, *, later: bool) -> Work:
        """Return the buffers of the gather of the unit fetched ahead."""
        ahead = self._ahead(place) * (1 / self.runs.shards + 1 + self.runs.on_cpu) * self._several
        gathered = self._unsharded(place) + self.width * ahead
        gradients = self._gradients(place.finished, later=later)
        return Work(gradients, gathered, self._reduced_before(place, later=later))

    def leave(self, place: Place, *, later: bool) -> Work:
        """Return a reduction's input and output beside the gradients it copies."""
        if self.sizes.tied and place.kind == "tail":
            return self.backward(place, place.unit_trainable, later=later)
        gathered = self._unsharded(place) + self._output(self._ahead(place))
        gradients, work = self._leaving(
            place.finished, place.unit_trainable, of_layer=place.kind == "layer", later=later
        )
        return Work(gradients, gathered - self.width * place.unit, work)

    def finish(self, *, later: bool) -> Work:
        """Return the reduction of the unit whose inputs need no gradient, after backward."""
        size = self.sizes
        unit = (size.embedding + (size.norm if size.tied else 0.0)) * size.all_train
        # Gradients of earlier micro-steps are added to before the unit is resharded
        # (`FSDPParamGroup.post_backward`). A tied one is resharded with the tail, before its end.
        kept = 0.0 if size.tied else self.width * unit
        gradients, work = self._leaving(
            size.trainable - unit, unit, of_layer=False, later=later, kept=kept
        )
        return Work(gradients=gradients, temporaries=work)

    def _leaving(
        self, finished: Bytes, unit: Bytes, *, of_layer: bool, later: bool, kept: Bytes = 0.0
    ) -> tuple[Bytes, Bytes]:
        """Return the other units' gradients, and a unit's own with what they turn into.

        They go when they are copied into the input of the reduction; its output, and gloo's copy,
        come after. Only the last one stays, as a loop's variable in `foreach_reduce`: of a layer a
        norm, else the matrix. Whole gradients of earlier micro-steps have taken the last ones in by
        then.
        """
        unit, reduce = np.asarray(unit, float), self.setup.reduce_bytes
        own = (reduce if later else self.width) * unit
        copies = 1 + self.runs.on_cpu * self._several
        moved = reduce * (unit * copies + self.shard(unit)) + own * (not of_layer)
        reduced = np.maximum(own + reduce * unit, moved)
        others = self._gradients(finished, later=later) - reduce * unit * later
        single = np.minimum(unit, self.sizes.largest_layer_parameter) if of_layer else unit
        # A gradient and its cast to the reduce type, one parameter after the other.
        cast = reduce * unit + self.width * single
        if later:
            # On the CPU an addition casts its second operand first.
            adding = kept + self.width * unit + reduce * single * self.runs.on_cpu
            reduced = np.maximum(reduced, reduce * unit + adding)
            reduced = np.maximum(reduced, self._not_last(others) + adding)
        return others, np.where(self._synchronises(later=later), reduced, cast)

    def step(self) -> Work:
        """Return the sharded gradients and the update."""
        on_device = self.runs.on_cpu or not self.runs.offload_params
        work = self.step_over_parameters() * on_device
        return Work(gradients=self._sharded(self.sizes.trainable), temporaries=work)

    def evaluation(self) -> Work:
        """Return the tail."""
        return self.loss()

    def gather(self) -> tuple[Bytes, Bytes]:
        """Return one whole parameter at a time, and all of them on rank 0's host."""
        stored = self.setup.parameter_bytes
        return stored * self.sizes.embedding, stored * self.sizes.total

    @property
    def _several(self) -> Bytes:
        return self.runs.shards > 1

    @property
    def _tail(self) -> float:
        size = self.sizes
        return size.norm + (size.embedding if size.tied else size.head)

    def _output(self, unit: Bytes) -> Bytes:
        """Return the buffer a unit is gathered in; a single rank copies its parameters at once."""
        return self.width * unit * self._several

    def _lasting(self, place: Place) -> Bytes:
        """Return what forward keeps gathered of the units before."""
        if not self.runs.reshard:
            return self.width * place.below
        return self.width * self._tail * self.sizes.tied

    def _offloaded(self) -> Bytes:
        size = self.sizes
        stored = self.setup.parameter_bytes * self.shard(size.total)
        return stored + self.optimizer_bytes(self.shard(size.trainable))

    def _sharded(self, elements: Bytes, *, always: bool = False) -> Bytes:
        on_device = always or self.runs.on_cpu or not self.runs.offload_params
        return self.setup.gradient_bytes * self.shard(elements) * on_device

    def _synchronises(self, *, later: bool) -> Bytes:
        return np.full(self.runs.steps.shape, True) if later else self.runs.steps == 1

    def _gradients(self, finished: Bytes, *, later: bool) -> Bytes:
        """Return finished gradients: sharded once they are reduced, whole before."""
        whole = self.setup.reduce_bytes * np.asarray(finished, float)
        if later:
            left = self.setup.reduce_bytes * (self.sizes.trainable - np.asarray(finished, float))
            return left + self._sharded(finished)
        return np.where(self.runs.steps > 1, whole, self._sharded(finished))

    def _unsharded(self, place: Place) -> Bytes:
        """Return the parameters that backward has: the unit's, and what was never resharded."""
        if not self.runs.reshard:
            return self.width * (place.below + place.unit + self.sizes.norm * self.sizes.tied)
        if not self.sizes.tied:
            return self.width * place.unit
        return self.width * (self._tail + place.unit * (place.kind == "layer"))

    def _ahead(self, place: Place) -> Bytes:
        """Return the unit that is gathered while this one runs backward."""
        if not self.runs.reshard:
            return 0.0
        return np.where(np.asarray(place.first) & self.sizes.tied, 0.0, place.before)

    def _reduced_before(self, place: Place, *, later: bool) -> Bytes:
        """Return the input of the reduction before, let go when the next one begins."""
        size = self.setup.reduce_bytes * np.asarray(place.after_trainable, float)
        if later:
            size = np.maximum(size, self._not_last(self._gradients(place.finished, later=True)))
        return np.where(self._synchronises(later=later), size, 0.0)

    def _not_last(self, gradients: Bytes) -> Bytes:
        """Return what a micro-step between the first and the last holds more: all gradients."""
        return np.where(self.runs.steps > 2, self.held() - gradients, 0.0)
