"""accelerate reads every migrated file and builds its FSDP2 plugin from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.migrate import migrate
from tests.unit.migrate_forms import ACCELERATE

pytest.importorskip("accelerate")
HEAD = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\n"
    "num_machines: 2\nnum_processes: 8\nmachine_rank: 0\nfsdp_config:\n"
)
OLD = "  fsdp_backward_prefetch: BACKWARD_PRE\n  fsdp_forward_prefetch: true\n"
FILES = {
    "full": "  fsdp_sharding_strategy: FULL_SHARD\n" + OLD,
    "grad_op": "  fsdp_sharding_strategy: 2\n  fsdp_offload_params: true\n",
    "local": "  fsdp_state_dict_type: LOCAL_STATE_DICT\n  fsdp_use_orig_params: false\n",
    "sync": "  fsdp_cpu_ram_efficient_loading: true\n  fsdp_sync_module_states: false\n",
    "hybrid": "  fsdp_sharding_strategy: HYBRID_SHARD\n",
    "size": "  fsdp_auto_wrap_policy: SIZE_BASED_WRAP\n  fsdp_min_num_params: 1000\n",
}
# What `accelerate launch` does with a file before it starts anything: flags, environment, plugin.
BUILD = """
import json, os, sys
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
before = dict(os.environ)
for path in sys.argv[1:]:
    os.environ.clear()
    os.environ.update(before)
    args = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    args, _, _ = _validate_launch_command(args)
    os.environ.update(prepare_multi_gpu_env(args))
    plugin = FullyShardedDataParallelPlugin()
    mesh = ParallelismConfig()
    print("BUILT" + json.dumps([
        path, plugin.fsdp_version, plugin.reshard_after_forward, plugin.state_dict_type.name,
        plugin.cpu_offload is not None and type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        mesh.dp_replicate_size, mesh.dp_shard_size]))
"""


def test_accelerate_builds_fsdp2_from_what_was_migrated(tmp_path: Path) -> None:
    for name, config in FILES.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(HEAD + config)
        path.write_text(migrate(path).after)
    # Those that tests/integration/test_migrate_train.py trains.
    for name, form in ACCELERATE.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(form.text)
        path.write_text(migrate(path).after)
    names = [f"{name}.yaml" for name in (*FILES, *ACCELERATE)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path)},
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("BUILT")]
    built = {name: rest for name, *rest in (json.loads(line[5:]) for line in lines)}
    full, sharded = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
    for name, form in ACCELERATE.items():
        version, reshard, _, offload, copies, _ = built.pop(f"{name}.yaml")
        assert (version, reshard, offload, copies) == (2, form.reshard, form.offload, form.copies)
    assert built == {
        "full.yaml": [2, True, full, False, 1, 1],
        "grad_op.yaml": [2, False, full, True, 1, 1],
        "local.yaml": [2, True, sharded, False, 1, 1],
        "sync.yaml": [2, True, full, False, 1, 1],
        "hybrid.yaml": [2, True, full, False, 2, 4],
        "size.yaml": [2, True, full, False, 1, 1],
    }
