"""Gives config files to `accelerate launch`, up to the start, and builds what the script would."""

import json
import os
import sys

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

BEFORE = dict(os.environ)


def answer(file):
    os.environ.clear()
    os.environ.update(BEFORE)
    try:
        loaded = load_config_from_file(file)
        args = launch_command_parser().parse_args(["--config_file", file, "script.py"])
        args, defaults, said_here = _validate_launch_command(args)
        facts = {"error": None, "type": loaded.distributed_type.value, "ranks": args.num_processes}
        if args.use_deepspeed:
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if said_here else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            args.main_process_port = 0
            os.environ.update(prepare_deepspeed_cmd_env(args)[1])
            plugin = DeepSpeedPlugin()
            config = plugin.deepspeed_config
            facts |= {"stage": plugin.zero_stage, "config": config}
        else:
            os.environ.update(prepare_multi_gpu_env(args))
        if args.use_fsdp:
            plugin = FullyShardedDataParallelPlugin()
            facts |= {
                "version": plugin.fsdp_version,
                "reshard": plugin.reshard_after_forward,
                "offload": type(plugin.cpu_offload).__name__,
                "recompute": plugin.activation_checkpointing,
            }
        if args.use_parallelism_config:
            sizes = ParallelismConfig()
            facts["sizes"] = [sizes.dp_replicate_size, sizes.dp_shard_size, sizes.cp_size,
                              sizes.sp_size]  # fmt: skip
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return facts


if __name__ == "__main__":
    with open(sys.argv[1]) as questions:
        answers = [answer(question) for question in json.load(questions)]
    with open(sys.argv[2], "w") as out:
        json.dump(answers, out, default=str)
