"""What each rule's code means, why it is a rule and what to do: for `explain` and docs/rules.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """One code, in words that hold for every plan that breaks it; a `Violation` has the numbers."""

    refused: str
    """What breaks the rule."""
    why: str
    """What would happen otherwise."""
    source: str
    """Where that can be read or seen."""
    do: str
    """How to get a plan that runs."""


EXPLANATIONS: dict[str, Explanation] = {
    "AT101": Explanation(
        refused="the mesh `dp_replicate x dp_shard x cp x tp` is not the number of GPUs",
        why="every rank has one place in the mesh",
        source="accelerate.ParallelismConfig refuses another product; Axolotl divides and rounds",
        do="Choose degrees whose product is the number of GPUs, or leave dp_shard_size out: it is "
        "filled.",
    ),
    "AT102": Explanation(
        refused="the sequence-parallel degree, times the tensor-parallel one, does not divide the "
        "number of GPUs",
        why="their groups are all alike",
        source="accelerate.ParallelismConfig; Axolotl 0.19 does not check it",
        do="Choose context_parallel_size (search: --sequence-parallel) and tensor_parallel_size "
        "(--tensor-parallel) so that their product is among the divisors.",
    ),
    "AT103": Explanation(
        refused="the global batch does not divide over the data-parallel ranks",
        why="the global batch is held exactly",
        source="docs/numerics.md",
        do="Choose a global batch that is a multiple of dp_replicate x dp_shard, or another number "
        "of GPUs or degree of sequence parallelism.",
    ),
    "AT104": Explanation(
        refused="micro batch x data-parallel ranks x accumulation is not the global batch",
        why="the global batch is held exactly",
        source="docs/numerics.md",
        do="Choose micro_batch_size x gradient_accumulation_steps = global batch / data-parallel "
        "ranks.",
    ),
    "AT105": Explanation(
        refused="the sequence length does not divide by the sequence-parallel degree",
        why="each rank holds an equal part",
        source="arXiv:2309.14509 (DeepSpeed Ulysses)",
        do="Choose a sequence_len that is a multiple of the degree, or another degree.",
    ),
    "AT106": Explanation(
        refused="attention or key-value heads do not divide by the sequence-parallel degree",
        why="Ulysses swaps tokens for heads (arXiv:2309.14509)",
        source="arXiv:2309.14509; the model's config.json has the two numbers of heads",
        do="Choose a degree that divides both numbers of heads, or ring attention (ring_attn_func; "
        "search: --sequence-parallel-by ring), which splits no heads.",
    ),
    "AT107": Explanation(
        refused="hybrid sharding (FSDP2 with `dp_replicate` above 1) with `dp_shard` 1",
        why="it would be a slower DDP",
        source="torch.distributed.fsdp.fully_shard: a mesh of one shard gathers what is there",
        do="Use ddp or fsdp2, or at least 4 data-parallel ranks: 2 copies of 2 shards.",
    ),
    "AT108": Explanation(
        refused="FSDP2 that shards nothing on several ranks",
        why="it would be a slower DDP; on one rank it runs",
        source="accelerate 1.15 refuses FSDP2 with dp_shard 1 and cp 1 (accelerate#3798)",
        do="Use ddp, or dp_shard above 1.",
    ),
    "AT109": Explanation(
        refused="a ZeRO stage outside 1 to 3 on DeepSpeed, or any on another engine",
        why="only DeepSpeed has stages, and stage 0 shards nothing",
        source="deepspeed/runtime/zero/config.py (DeepSpeed 0.19.8)",
        do="Use stage 1, 2 or 3 with DeepSpeed, and 0 elsewhere; without sharding use ddp.",
    ),
    "AT110": Explanation(
        refused="parameter offload below ZeRO-3, or one of FSDP2's two offloads alone",
        why="the engines cannot",
        source="deepspeed/runtime/zero/config.py: offload_param is valid with stage 3 alone; "
        "torch.distributed.fsdp.CPUOffloadPolicy moves parameters, gradients and states together",
        do="Use ZeRO-3, or offload the optimizer alone; with FSDP2 offload_params: true.",
    ),
    "AT111": Explanation(
        refused="DDP with shards or offload",
        why="DDP keeps everything on every rank",
        source="torch.nn.parallel.DistributedDataParallel",
        do="Use dp_shard 1 without offload, or zero1 to zero3, or fsdp2.",
    ),
    "AT112": Explanation(
        refused="DeepSpeed with `dp_replicate` above 1",
        why="ZeRO shards over all data-parallel ranks",
        source="deepspeed/runtime/engine.py (DeepSpeed 0.19.8)",
        do="Use dp_replicate 1, or hsdp, which shards inside a node and copies between nodes.",
    ),
    "AT113": Explanation(
        refused="LoRA targets that are no projection of the model, or none",
        why="nothing would train",
        source="peft looks for modules of that name; experts are stacked parameters, no modules",
        do="Name projections the model has (the message lists them), or write lora_target_linear: "
        "true.",
    ),
    "AT114": Explanation(
        refused="a LoRA rank above the smallest side of a target",
        why="the product could not have that rank",
        source="arXiv:2106.09685, section 4.1: r is below both sides",
        do="Use a smaller lora_r, or leave the small projection out.",
    ),
    "AT115": Explanation(
        refused="tensor parallelism outside FSDP2, over heads, FFN or vocabulary that the degree "
        "does not divide, with experts, sinks, fused projections or a norm over all heads, with an "
        "adapter, offload, Liger, fp8, ring attention or attention dropout",
        why="each rank takes an equal part of every projection, and with the others it was never "
        "seen to train the same",
        source="docs/decisions/0006-tensor-parallel.md; arXiv:1909.08053 (Megatron-LM)",
        do="Use fsdp2 or hsdp with tensor_parallel_size (search: --tensor-parallel) among the "
        "degrees the message lists, or tp 1.",
    ),
    "AT116": Explanation(
        refused="sequence parallelism on a strategy whose file says "
        "`supports_sequence_parallel: false`",
        why="its author says so",
        source="the strategy's file",
        do="Use cp 1, or another strategy.",
    ),
    "AT117": Explanation(
        refused="LoRA on a strategy whose file says `supports_lora: false`",
        why="its author says so",
        source="the strategy's file",
        do="Train all parameters, or use another strategy.",
    ),
    "AT119": Explanation(
        refused="LoRA dropout above 0 with FSDP2 and recompute",
        why="accelerate 1.15 checkpoints with `preserve_rng_state=False`",
        source="accelerate/utils/fsdp_utils.py (1.15): forward and backward would drop different "
        "values",
        do="Set lora_dropout to 0, or leave recomputation out.",
    ),
    "AT120": Explanation(
        refused="a config with `output_router_logits: true`",
        why="the routers' balancing loss is not added (see below)",
        source="docs/rules.md, Experts and the balancing loss",
        do="Set output_router_logits to false in the model's config.json.",
    ),
    "AT121": Explanation(
        refused="dropout or router noise in the model's config with FSDP2 and recompute",
        why="as AT119",
        source="as AT119",
        do="Set the dropouts and the noise to 0 in the model's config.json, or leave recomputation "
        "out.",
    ),
    "AT122": Explanation(
        refused="ring attention with what its kernels cannot do: sliding windows shorter than the "
        "sequence, attention sinks, attention dropout, on GPUs fp32 or heads that are no multiple "
        "of 8 up to 256, a `heads_k_stride` that does not divide the key-value heads",
        why="the blocks a rank attends to one after another are causal or whole, and nothing else",
        source="ring-flash-attn 0.1.8 (README: no window, no dropout, no softcap); FlashAttention "
        "2: 16 bits and heads up to 256",
        do="Use Ulysses (search: --sequence-parallel-by ulysses; a config without ring_attn_func "
        "and heads_k_stride), or cp 1; set heads_k_stride to a divisor of the key-value heads.",
    ),
    "AT130": Explanation(
        refused="DoRA over a base in 4 bits with ZeRO-3",
        why="PEFT's unpacked weights are parameters that DeepSpeed never sharded",
        source="run with PEFT 0.21 and DeepSpeed 0.19.8: 'Params4bit' object has no attribute "
        "'ds_id' at the first step",
        do="Use fsdp2, zero1 or zero2, or leave peft_use_dora or load_in_4bit out.",
    ),
    "AT132": Explanation(
        refused="an 8-bit optimizer (`adamw_bnb_8bit`, `paged_adamw_8bit`) with FSDP2",
        why="FSDP2's shards are DTensors, which bitsandbytes' kernels do not take",
        source="bitsandbytes 0.50 optim/optimizer.py; Axolotl 0.19 refuses the unpaged one, too",
        do="Use DeepSpeed or DDP with it, or adamw with FSDP2.",
    ),
    "AT133": Explanation(
        refused="an 8-bit optimizer with optimizer offload",
        why="DeepSpeed steps on the host by its own CPU Adam, whose states are fp32",
        source="deepspeed/runtime/engine.py (DeepSpeed 0.19.8)",
        do="Leave the offload out, or use adamw.",
    ),
    "AT134": Explanation(
        refused="a paged optimizer on CPU ranks",
        why="its states lie in CUDA managed memory; without CUDA they would not be paged",
        source="bitsandbytes 0.50 optim/optimizer.py: it falls back with a warning",
        do="Use adamw_bnb_8bit on CPU ranks.",
    ),
    "AT135": Explanation(
        refused="Liger's kernels on CPU ranks",
        why="they are written in Triton, which compiles for GPUs",
        source="liger-kernel 0.8.5 imports triton at its start",
        do="Leave the plugin and the liger_ keys out on CPU ranks; the loss is the same.",
    ),
    "AT136": Explanation(
        refused="Liger's kernels on a model family that has none, or whose were not checked here",
        why="the model would run its own code without a word",
        source="liger_kernel/transformers/monkey_patch.py, MODEL_TYPE_TO_APPLY_LIGER_FN (0.8.5)",
        do="Leave the liger_ keys out.",
    ),
    "AT137": Explanation(
        refused="`chunked_cross_entropy` with `liger_fused_linear_cross_entropy`",
        why="both say how the one loss is computed",
        source="Axolotl 0.19 refuses two losses as well",
        do="Keep one; Liger's needs less memory.",
    ),
    "AT138": Explanation(
        refused="`activation_offloading` on CPU ranks",
        why="activations lie in host memory already",
        source="autotune/runner/offloading.py",
        do="Leave it out on CPU ranks.",
    ),
    "AT139": Explanation(
        refused="`activation_offloading` without recomputation",
        why="every activation of every layer would cross the bus twice",
        source="Axolotl 0.19 refuses it as well",
        do="Set gradient_checkpointing: true besides.",
    ),
    "AT140": Explanation(
        refused="`fp8` on a GPU without products of 8-bit floats",
        why="torch._scaled_mm would stop at the first step; CPU ranks compute the same roundings "
        "in fp32, slower",
        source="torchao 0.18 README: compute capability 8.9 or above; GPUs and rates in "
        "autotune/spec/catalogue",
        do="Leave fp8 out, or use such a GPU.",
    ),
    "AT141": Explanation(
        refused="`fp8` with an adapter",
        why="gradients of frozen weights would be computed and dropped, and a base in 4 bits has "
        "no linear layers to replace",
        source="torchao/float8/float8_linear.py, matmul_with_hp_or_float8_args.backward (0.18)",
        do="Train all parameters with fp8, or leave fp8 out.",
    ),
    "AT142": Explanation(
        refused="`fp8` with ZeRO-3 without recomputation",
        why="each gathered weight is kept for backward, so a rank would hold all of them",
        source="torchao/float8/float8_linear.py saves the gathered weight (0.18); DeepSpeed's own "
        "linear saves the parameter and gathers it again",
        do="Set gradient_checkpointing: true besides, or use fsdp2, zero1 or zero2.",
    ),
    "AT143": Explanation(
        refused="`fp8` with a model whose projections have no two sides that are multiples of 16, "
        "or on GPUs with a micro-batch whose tokens on a rank are no multiple of 16",
        why="the products' sums run over multiples of 16",
        source="torch._scaled_mm; torchao's filter of layers (float8_linear_utils.py, 0.18)",
        do="Use a sequence length, divided by the sequence-parallel degree, that is a multiple of "
        "16, or leave fp8 out.",
    ),
    "AT144": Explanation(
        refused="`fp8` with fp32 on GPUs",
        why="it was never run, and accelerate computes the rest in bf16 under fp8",
        source="accelerate 1.15, docs of mixed_precision fp8",
        do="Use bf16 with fp8, or leave fp8 out.",
    ),
    "AT145": Explanation(
        refused="`fp8_enable_fsdp_float8_all_gather` without `fp8` or outside FSDP2",
        why="it says how FSDP2 gathers the weights of float8 projections",
        source="torchao/float8/fsdp_utils.py (0.18)",
        do="Add fp8: true and fsdp_version: 2 with fsdp_config, or remove the key.",
    ),
    "AT150": Explanation(
        refused="ZeRO++ hpZ outside ZeRO-3, over a group that is not a part of the ranks, or with "
        "parameter offload or sequence parallelism",
        why="only ZeRO-3 gathers parameters, and over all ranks a second copy is the first again",
        source="deepspeed/utils/groups.py, _create_zero_param_parallel_group (DeepSpeed 0.19.8); "
        "arXiv:2306.10209",
        do="Set zero_hpz_partition_size to the GPUs of a node, on two nodes or more, or remove it.",
    ),
    "AT151": Explanation(
        refused="`deepspeed` together with `fsdp` or `fsdp_config` in one file",
        why="one engine shards; Axolotl takes FSDP and drops `deepspeed` in silence",
        source="axolotl/cli/utils (prepare_optim_env, 0.19): fsdp is asked for first",
        do="Remove one of them.",
    ),
    "AT152": Explanation(
        refused="`fp32_norms` or `fp8_enable_fsdp_float8_all_gather` without FSDP2",
        why="both are settings of FSDP2",
        source="axolotl/utils/schemas/validation.py (0.19)",
        do="Add fsdp_version: 2 with fsdp_config, or remove the key.",
    ),
    "AT153": Explanation(
        refused="`selective_checkpointing` without `gradient_checkpointing`",
        why="it says what becomes of what checkpointing keeps",
        source="axolotl/utils/schemas/validation.py (0.19)",
        do="Add gradient_checkpointing: true, or remove the key.",
    ),
    "AT154": Explanation(
        refused="`torch_compile_mode` or `torch_compile_options` without `torch_compile`",
        why="nothing would be compiled",
        source="axolotl/utils/schemas/validation.py (0.19), for the options",
        do="Add torch_compile: true, or remove the key.",
    ),
    "AT155": Explanation(
        refused="`deepcompile` without `deepspeed`",
        why="it is DeepSpeed's compiler",
        source="axolotl/utils/schemas/validation.py (0.19)",
        do="Use torch_compile: true, or add deepspeed.",
    ),
    "AT156": Explanation(
        refused="`relora` with DeepSpeed or FSDP",
        why="a restart resets optimizer states that other ranks hold",
        source="axolotl/utils/schemas/validation.py (0.19)",
        do="Use adapter: lora without relora, or DDP.",
    ),
    "AT157": Explanation(
        refused="`device_map`, `max_memory` or `gpu_memory_limit` with DeepSpeed or FSDP",
        why="they spread a model over the devices of one process; a rank has one",
        source="transformers, from_pretrained: device_map; refused by DeepSpeed ZeRO-3 there, too",
        do="Remove the key: the engine shards.",
    ),
    "AT158": Explanation(
        refused="`expert_parallel_size` above 1",
        why="experts are not spread over ranks here",
        source="README.md, What it does not do yet",
        do="Use 1: ZeRO-3 and FSDP2 shard the experts' parameters with the others.",
    ),
}
RETIRED = {
    "AT118": "refused sequences longer than a sliding window, which are masked now",
}
"""Codes of rules that went, which stay unused, and what each was."""


def rules_table() -> str:
    """Return the table of docs/rules.md; benchmarks/write_rules_table.py puts it there."""
    rows = [f"| {code} | {each.refused} | {each.why} |" for code, each in EXPLANATIONS.items()]
    table = ["| Code | Refused | Why |", "| --- | --- | --- |", *rows]
    return "\n".join(table) + "\n"


def retired_lines() -> str:
    """Return the lines of docs/rules.md about rules that went."""
    return "".join(f"{code} is unused: it {what}.\n" for code, what in RETIRED.items())
