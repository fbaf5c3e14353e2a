"""FSDP1 configurations as people wrote them: one of every form, and what each trains as FSDP2."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = (
    "base_model: tiny-qwen3\n"
    "sequence_len: 64\nsample_packing: true\n"
    "micro_batch_size: 2\ngradient_accumulation_steps: 1\n"
    "optimizer: adamw_torch_fused\nlearning_rate: 3e-3\nlr_scheduler: constant\nmax_steps: 3\n"
    "bf16: auto\n"
)
LAYER = "transformer_layer_cls_to_wrap: Qwen3DecoderLayer"


@dataclass(frozen=True, kw_only=True)
class Form:
    """An FSDP1 file and what its training must turn out to be."""

    text: str
    """FSDP keys of an Axolotl file, to stand under `COMMON`; or a whole file of accelerate's."""
    flags: tuple[str, ...] = ()
    """Of `migrate`."""
    said: tuple[str, ...] = ()
    """Words of its warnings."""
    reshard: bool = True
    offload: bool = False
    recompute: bool = False
    copies: int = 1
    """Of the model: above 1 there are two ranks to each."""

    @property
    def ranks(self) -> int:
        """CPU ranks it is trained on."""
        return 2 * self.copies


FOUR = ("--gpus", "4", "--nodes", "2")
AXOLOTL = {
    "list": Form(
        text="fsdp:\n  - full_shard\n  - auto_wrap\n",
        said=("fsdp removed",),
    ),
    "list-and-prefixed": Form(
        # The pair that Axolotl's FSDP1 examples have.
        text="fsdp:\n  - full_shard\n  - auto_wrap\nfsdp_config:\n"
        "  fsdp_limit_all_gathers: true\n  fsdp_sync_module_states: true\n"
        "  fsdp_offload_params: true\n  fsdp_use_orig_params: false\n"
        "  fsdp_cpu_ram_efficient_loading: true\n"
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        f"  fsdp_{LAYER}\n  fsdp_state_dict_type: FULL_STATE_DICT\n"
        "  fsdp_sharding_strategy: FULL_SHARD\n",
        said=("fsdp_limit_all_gathers removed", "fsdp_use_orig_params removed"),
        offload=True,
    ),
    "list-offload": Form(text="fsdp: [full_shard, offload, auto_wrap]\n", offload=True),
    "list-grad-op": Form(
        text="fsdp: [shard_grad_op, auto_wrap]\n"
        f"fsdp_config:\n  {LAYER}\n  backward_prefetch: BACKWARD_PRE\n",
        said=("backward_prefetch removed",),
        reshard=False,
    ),
    "text": Form(text="fsdp: full_shard auto_wrap\nfsdp_final_state_dict_type: FULL_STATE_DICT\n"),
    "plain-config": Form(
        text="fsdp_version: 1\nfsdp_config:\n  offload_params: false\n  use_orig_params: true\n"
        f"  activation_checkpointing: true\n  state_dict_type: SHARDED_STATE_DICT\n  {LAYER}\n",
        said=("use_orig_params removed",),
        recompute=True,
    ),
    "prefixed-config": Form(
        text="fsdp_config:\n  fsdp_offload_params: true\n  fsdp_state_dict_type: LOCAL_STATE_DICT\n"
        f"  fsdp_activation_checkpointing: true\n  fsdp_{LAYER}\n",
        said=("LOCAL_STATE_DICT",),
        offload=True,
        recompute=True,
    ),
    "grad-op-inside": Form(
        text="fsdp_config:\n  fsdp_sharding_strategy: SHARD_GRAD_OP\n",
        said=("SHARD_GRAD_OP in fsdp_config was ignored by Axolotl",),
    ),
    "grad-op-inside-as-written": Form(
        text="fsdp_config:\n  fsdp_sharding_strategy: SHARD_GRAD_OP\n",
        flags=("--as-written",),
        reshard=False,
    ),
    "hybrid-list": Form(
        text=f"fsdp: [hybrid_shard, auto_wrap]\nfsdp_config: {{fsdp_{LAYER}}}\n",
        flags=FOUR,
        said=("dp_replicate_size: 2, dp_shard_size: 2 written",),
        copies=2,
    ),
    "hybrid-zero2-sizes": Form(
        text="fsdp: [hybrid_shard_zero2, auto_wrap]\ndp_replicate_size: 2\ndp_shard_size: 2\n",
        reshard=False,
        copies=2,
    ),
    "hybrid-inside": Form(
        text="fsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD\n",
        flags=FOUR,
        said=("HYBRID_SHARD in fsdp_config was ignored by Axolotl",),
        copies=2,
    ),
}


def _accelerate(fsdp: str, nodes: int = 1) -> str:
    return (
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: FSDP\n"
        f"downcast_bf16: 'no'\nfsdp_config:\n{fsdp}machine_rank: 0\nmain_training_function: main\n"
        f"mixed_precision: bf16\nnum_machines: {nodes}\nnum_processes: {2 * nodes}\n"
        "rdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
    )


ACCELERATE = {
    "accelerate-full": Form(
        # What `accelerate config` wrote before FSDP2.
        text=_accelerate(
            "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
            "  fsdp_backward_prefetch: BACKWARD_PRE\n  fsdp_cpu_ram_efficient_loading: true\n"
            "  fsdp_forward_prefetch: false\n  fsdp_offload_params: false\n"
            "  fsdp_sharding_strategy: FULL_SHARD\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
            "  fsdp_sync_module_states: true\n  fsdp_use_orig_params: true\n"
        ),
        said=("fsdp_backward_prefetch removed", "fsdp_sync_module_states removed"),
    ),
    "accelerate-grad-op": Form(
        text=_accelerate(
            "  fsdp_activation_checkpointing: true\n  fsdp_sharding_strategy: 2\n"
            "  fsdp_state_dict_type: FULL_STATE_DICT\n"
        ),
        reshard=False,
        recompute=True,
    ),
    "accelerate-offload": Form(
        text=_accelerate(
            "  fsdp_offload_params: true\n  fsdp_reshard_after_forward: SHARD_GRAD_OP\n"
        ),
        said=("fsdp_reshard_after_forward: SHARD_GRAD_OP was ignored",),
        offload=True,
    ),
    "accelerate-hybrid": Form(
        text=_accelerate("  fsdp_sharding_strategy: HYBRID_SHARD\n", nodes=2),
        said=("parallelism_config written",),
        copies=2,
    ),
}
