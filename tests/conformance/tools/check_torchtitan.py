"""Gives command lines to torchtitan's own parser."""

import json
import sys

from torchtitan.config import ConfigManager


def answer(flags):
    try:
        read = ConfigManager().parse_args(flags)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    parallelism, training = read.parallelism, read.training
    return {
        "error": None,
        "dp_replicate": parallelism.data_parallel_replicate_degree,
        "dp_shard": parallelism.data_parallel_shard_degree,
        "cp": parallelism.context_parallel_degree,
        "reshard": parallelism.fsdp_reshard_after_forward,
        "micro_batch_size": training.local_batch_size,
        "global_batch_size": training.global_batch_size,
        "offload": training.enable_cpu_offload,
        "seq_len": training.seq_len,
        "param_dtype": training.mixed_precision_param,
        "recompute": type(read.activation_checkpoint).__qualname__,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as questions:
        answers = [answer(question) for question in json.load(questions)]
    with open(sys.argv[2], "w") as out:
        json.dump(answers, out)
