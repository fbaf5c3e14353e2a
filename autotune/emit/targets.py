"""The tools a plan can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from autotune.config.keys import key_catalogue
from autotune.emit.job import Exported, Job, cannot_say
from autotune.emit.to_accelerate import to_accelerate
from autotune.emit.to_axolotl import to_axolotl
from autotune.emit.to_deepspeed import to_deepspeed
from autotune.emit.to_llamafactory import to_llamafactory
from autotune.emit.to_torchtitan import to_torchtitan


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A tool, as `--to` names it."""

    write: Callable[[Job, str], Exported]
    """Writes a job; the second argument is the name of the main file."""
    file_name: str
    """Of the main file, when the person gives none."""
    keeps_axolotl_keys: bool = False
    """Keys that are not used here stay in the file."""


TARGETS: Mapping[str, Target] = {
    "axolotl": Target(write=to_axolotl, file_name="axolotl.yml", keeps_axolotl_keys=True),
    "accelerate": Target(write=to_accelerate, file_name="accelerate.yaml"),
    "deepspeed": Target(write=to_deepspeed, file_name="deepspeed.json"),
    "torchtitan": Target(write=to_torchtitan, file_name="torchtitan.sh"),
    "llamafactory": Target(write=to_llamafactory, file_name="llamafactory.yaml"),
}


def export(job: Job, target: str, file_name: str | None = None) -> Exported:
    """Write a job in the words of `target`, a name of `TARGETS`.

    Raises:
        AutotuneError: the tool has no word for what the plan is; the message names the key.
    """
    tool = TARGETS[target]
    done = tool.write(job, file_name or tool.file_name)
    if tool.keeps_axolotl_keys:
        return done
    harmless = key_catalogue().harmless
    unused = {key: value for key, value in job.passthrough.items() if value and key not in harmless}
    if job.tokenizer is not None:
        unused["tokenizer_config"] = job.tokenizer
    advice = "The export is without them."
    return replace(done, warnings=(*done.warnings, *cannot_say("The export", unused, advice)))
