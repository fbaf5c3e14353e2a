"""Gives YAML files to LLaMA-Factory's own arguments."""

import json
import os
import sys

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for an older transformers

import yaml
from llamafactory.hparams.parser import _TRAIN_ARGS
from transformers import HfArgumentParser
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig


class OnRanks:
    """The arguments as they are on `world_size` ranks."""

    def __init__(self, training, world_size):
        self._training, self.world_size = training, world_size

    def __getattr__(self, name):
        return getattr(self._training, name)


def answer(question):
    with open(question["file"]) as file:
        values = yaml.safe_load(file)
    # Without a GPU bf16 is refused, and DeepSpeed would start a process group here: its file is
    # given to the Trainer's own reading below, which refuses what contradicts the arguments.
    values["use_cpu"] = True
    deepspeed = values.pop("deepspeed", None)
    try:
        model, data, training, finetuning, _ = HfArgumentParser(_TRAIN_ARGS).parse_dict(values)
        if deepspeed is not None:
            config = HfTrainerDeepSpeedConfig(deepspeed)
            config.trainer_config_process(OnRanks(training, question["ranks"]))
            if config.mismatches:
                raise ValueError(f"{config.mismatches}")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "error": None,
        "deepspeed": deepspeed,
        "micro_batch_size": training.per_device_train_batch_size,
        "grad_accum_steps": training.gradient_accumulation_steps,
        "recompute": not model.disable_gradient_checkpointing,
        "bf16": training.bf16,
        "packing": data.packing,
        "adapter": finetuning.finetuning_type,
        "optim": str(training.optim.value if hasattr(training.optim, "value") else training.optim),
        "max_grad_norm": training.max_grad_norm,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as questions:
        answers = [answer(question) for question in json.load(questions)]
    with open(sys.argv[2], "w") as out:
        json.dump(answers, out)
