"""Gives mappings to DeepSpeed's own configuration classes, on a stated number of ranks."""

import json
import sys

import deepspeed.runtime.config as ds


def answer(question):
    ranks, config = question["ranks"], question["config"]
    # What `dist` says of the ranks is all that is replaced: no process group is needed for it.
    ds.dist.get_rank = lambda group=None: 0
    ds.dist.get_world_size = lambda group=None: ranks
    try:
        read = ds.DeepSpeedConfig(config)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    zero = read.zero_config
    return {
        "error": None,
        "stage": int(zero.stage),
        "micro_batch_size": read.train_micro_batch_size_per_gpu,
        "grad_accum_steps": read.gradient_accumulation_steps,
        "train_batch_size": read.train_batch_size,
        "offload_optimizer": device(zero.offload_optimizer),
        "offload_params": device(zero.offload_param),
        "bucket": zero.reduce_bucket_size,
        "clipping": read.gradient_clipping,
        "bf16": bool(read.bfloat16_config.enabled),
    }


def device(offload):
    return None if offload is None else str(getattr(offload.device, "value", offload.device))


if __name__ == "__main__":
    with open(sys.argv[1]) as questions:
        answers = [answer(question) for question in json.load(questions)]
    with open(sys.argv[2], "w") as out:
        json.dump(answers, out)
