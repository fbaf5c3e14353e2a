"""A full run seen from outside: its request, its output folder, its log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from autotune.config import RunConfig
from autotune.errors import AutotuneError
from autotune.folders import make_folder
from autotune.plan import Plan
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import Workload
from autotune.trial.checkpoint import checkpoints_of, is_whole
from autotune.trial.data_counts import DataCounts
from autotune.trial.folder import LAUNCHES, numbered_launches
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.packages import check_packages, warn_of_slow_fp8
from autotune.trial.protocol import LOG_FILE, ModelSource, Outcome, Phase, Request
from autotune.trial.ranks import Starter
from autotune.trial.run_log import split_log

RUN_FILE = "run.json"
_HANG_S = 1800.0
"""NCCL's own watchdog waits as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How a run ended."""

    message: str
    """What stopped it; empty when it reached its end."""
    advice: str = ""
    """What to do about that."""
    document: dict[str, Any] = field(default_factory=dict)


def make_request(
    config: RunConfig,
    *,
    plan: Plan,
    workload: Workload,
    device: str,
    out_dir: Path,
    datasets: Sequence[DatasetSource],
    settings: TrainSettings,
) -> Request:
    """Return the request of a full run.

    Raises:
        AutotuneError: a package that its ranks need is not installed.
    """
    check_packages(workload)
    warn_of_slow_fp8(workload, device, compiled=settings.torch_compile)
    model = config.model
    return Request(
        launch_id=out_dir.resolve().name or "run",
        mode="train",
        model=ModelSource(
            name=model.name,
            config=model.hf_config,
            weights=model.weights,
            tokenizer=model.tokenizer,
        ),
        plan=plan.to_dict(),
        workload=workload,
        device="cuda" if device == "cuda" else "cpu",
        out_dir=str(out_dir.resolve()),
        datasets=list(datasets),
        test_datasets=list(config.test_datasets),
        data=config.data,
        train=settings,
        seed=config.seed,
    )


def check_output_folder(folder: Path, checkpoint: Path | None = None) -> None:
    """Refuse to write over another run than the one that is gone on with.

    Args:
        folder: Where the run would write.
        checkpoint: Where it goes on from; in `folder` itself, the run there is its own.

    Raises:
        AutotuneError: the folder holds a run's log, weights or checkpoints.
    """
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return
    held = [name for name in (LOG_FILE, RUN_FILE) if (folder / name).exists()]
    patterns = ("*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json")
    held += sorted(path.name for pattern in patterns for path in folder.glob(pattern))[:3]
    held += [path.name for _, path in checkpoints_of(folder)][-1:]
    if held:
        raise AutotuneError(
            f"{folder} holds another run ({', '.join(held)}); nothing was overwritten. Go on with "
            "it by --resume alone, or give another --output-dir."
        )


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint with the most steps, of those that are whole.

    Raises:
        AutotuneError: there is none.
    """
    found = [path for _, path in checkpoints_of(folder) if is_whole(path)]
    if not found:
        raise AutotuneError(
            f"There is no checkpoint in {folder}. Train without --resume first, with save_steps "
            "in the file or --save-steps."
        )
    return found[-1]


def train(request: Request, log: TrainLog, starter: Starter | None = None) -> Trained:
    """Run the request to its end and return how it went; `starter` as in `run_launch`."""
    out_dir = Path(request.out_dir)
    make_folder(out_dir, "--output-dir")
    number = max((n for n, _ in numbered_launches(out_dir / LAUNCHES)), default=0) + 1
    folder = out_dir / LAUNCHES / f"{number:04d}"
    build_native_ops(request, folder)
    limits = Limits(deadline_s=None, hang_s=_HANG_S)
    ended = run_launch(request, folder, limits, on_tick=log.show_new, starter=starter)
    log.show_new(now=True)
    document = {"outcome": str(ended.outcome), "output_dir": request.out_dir, "steps": 0}
    document |= _from_ranks(ended)
    if ended.phase is not None:
        document["stopped_in"] = str(ended.phase)
    write_run_file(out_dir, document)
    if ended.outcome is Outcome.OK:
        return Trained(message="", document=document)
    return Trained(
        message=_why(ended),
        advice=_advice(ended, request) or f"The ranks' logs are in {folder}.",
        document=document,
    )


def write_run_file(out_dir: Path, document: dict[str, Any]) -> None:
    """Write what a run came to into its folder."""
    (out_dir / RUN_FILE).write_text(json.dumps(document, indent=1) + "\n")


def _from_ranks(ended: Ended) -> dict[str, Any]:
    if not ended.results:
        return {}
    first = ended.results[0]
    values = dict(first.train)
    for name in ("host_peak_bytes_after_load", "host_peak_bytes"):
        peaks = [result.train[name] for result in ended.results if name in result.train]
        if peaks:
            values[name] = max(peaks)
    if first.data is not None:
        values["data"] = first.data.model_dump()
    return values | {"asserted": first.asserted, "versions": first.versions}


_DURING = {
    Phase.LOAD: "while it loaded",
    Phase.STEP: "in a training step",
    Phase.EVALUATE: "in evaluation",
    Phase.SAVE: "while it saved",
}


def _why(ended: Ended) -> str:
    when = "" if ended.phase is None else f" {_DURING[ended.phase]}"
    return f"The run stopped ({ended.outcome}){when}: {ended.message.strip().rstrip('.')}."


def _advice(ended: Ended, request: Request) -> str | None:
    """Say what to do about memory that ran out, which depends on what the run was at."""
    if ended.outcome not in (Outcome.OOM, Outcome.HOST_OOM):
        return None
    assert request.train is not None
    if ended.outcome is Outcome.HOST_OOM and request.device != "cpu":
        return (
            "The host's memory ran out, not a GPU's: offload less to it, run fewer ranks on this "
            f"host, or take one with more memory; {_go_on(request)}"
        )
    match ended.phase:
        case Phase.LOAD:
            return (
                "A smaller micro batch loads the same: shard over more ranks, offload, or train an "
                "adapter."
            )
        case Phase.EVALUATE:
            size = request.train.eval_batch_size or request.plan_object().micro_batch_size
            if size > 1:
                return f"Lower eval_batch_size, {size} here; {_go_on(request)}"
            return (
                "eval_batch_size is 1 already: hold nothing out (no val_set_size, no "
                f"test_datasets), or shorten sequence_len; {_go_on(request)}"
            )
        case Phase.SAVE:
            return (
                "Saving takes the same whatever the micro batch: free memory of the host, or raise "
                f"the limit the run is under; {_go_on(request)}"
            )
    return (
        "Lower micro_batch_size and raise gradient_accumulation_steps alike, or set "
        f"gradient_checkpointing: true; {_go_on(request)}"
    )


def _go_on(request: Request) -> str:
    """Say from where a run can go on: its last whole checkpoint, or the one it began from."""
    assert request.train is not None
    whole = [path for _, path in checkpoints_of(Path(request.out_dir)) if is_whole(path)]
    last = str(whole[-1]) if whole else request.train.resume_from
    if last is None:
        return "there is no checkpoint to go on from yet."
    return f"--resume goes on from the last checkpoint, {last}."


class TrainLog:
    """Shows a run's JSON log lines as they appear, one line each.

    Args:
        out_dir: The run's folder.
        stream: Where the lines are shown.
        resumed_step: Of the checkpoint the run goes on from: the ranks cut the log there.
    """

    def __init__(self, out_dir: Path, stream: TextIO, resumed_step: int | None = None) -> None:
        self._path = out_dir / LOG_FILE
        self._stream = stream
        self._position, self._position_when_cut, self._inode = 0, 0, 0
        if self._path.exists():
            old = self._path.read_bytes()
            self._position, self._inode = len(old), self._path.stat().st_ino
            if resumed_step is not None:
                self._position_when_cut = len(split_log(old, resumed_step)[0])
        self._looked = 0.0

    def announce(self, request: Request) -> None:
        """Say what is about to run."""
        plan, workload = request.plan_object(), request.workload
        start = "random weights" if request.model.weights is None else request.model.weights
        resumed = f", from {request.train.resume_from}" if (
            request.train and request.train.resume_from) else ""  # fmt: skip
        self._stream.write(
            f"Training {request.model.name} ({start}) with {plan.describe()} on {plan.world_size} "
            f"{request.device} ranks, sequence {workload.seq_len}, global batch "
            f"{workload.global_batch_size}{resumed}; output in {request.out_dir}\n"
        )

    def show_new(self, *, now: bool = False) -> None:
        """Print the lines written since the last call; looks twice a second, or `now`."""
        if not now and time.monotonic() - self._looked < 0.5:
            return
        self._looked = time.monotonic()
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._position, self._inode = self._position_when_cut, inode
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode().splitlines():
            self._stream.write(_words(json.loads(line)) + "\n")
        self._stream.flush()


def _words(row: dict[str, Any]) -> str:
    if "data" in row:
        return f"Data: {DataCounts.model_validate(row['data']).words()}"
    step = f"step {row['step']}"
    if "eval_loss" in row:
        return f"{step}: held-out loss {row['eval_loss']:.4f} over {row['eval_tokens']:.0f} tokens"
    if "loss" not in row:
        rest = ", ".join(f"{key} {value}" for key, value in row.items() if key != "step")
        return f"{step}: {rest}"
    parts = [f"{step}: loss {row['loss']:.4f}"]
    if "grad_norm" in row:
        parts.append(f"gradient norm {row['grad_norm']:.3f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.2e}")
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)
