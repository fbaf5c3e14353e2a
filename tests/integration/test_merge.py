"""`autotune merge`: the merged model, run by plain transformers, has the adapter's own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.errors import AutotuneError
from autotune.spec.workload import Lora, Workload
from autotune.trial.adapters import MergeOrder
from tests.integration.commands import autotune
from tests.integration.ranks import (
    logged,
    make_plan,
    run_well,
    small_config,
    training_request,
)
from tests.integration.reference import held_out_loss

pytestmark = pytest.mark.integration
LORAS = {"lora": Lora(r=4), "dora": Lora(r=4, rslora=True, dora=True)}
WORKLOAD = Workload(seq_len=64, global_batch_size=8, precision="fp32", optimizer="sgd")


def trained(strategy: str, kind: str, folder: Path, corpus: Path, weights: Path):
    request = training_request(
        make_plan(strategy, 2, micro_batch_size=4),
        folder,
        data=corpus,
        workload=WORKLOAD.model_copy(update={"adapter": LORAS[kind]}),
        weights=weights,
        max_steps=2,
        save_steps=2,
        val_set_size=7,
        learning_rate=1.0,
        save_final_weights=True,
    )
    run_well(request)
    first, *_, last = logged(folder, "eval_loss")
    assert first - last > 0.01, "it must have learnt, or the base alone would pass"
    return request, last


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("fsdp2", "dora"),
        pytest.param("zero3", "dora", marks=pytest.mark.slow),
        pytest.param("zero2", "lora", marks=pytest.mark.slow),
        pytest.param("ddp", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_merged_run_and_a_merged_checkpoint(
    strategy, kind, tmp_path, corpus, initial_state
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    request, want = trained(strategy, kind, run, corpus, initial_state)
    for source in (run, run / "checkpoint-2"):
        out = tmp_path / f"merged-{source.name}"
        done = autotune("merge", str(source), "--out", str(out), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["layers"] == 14
        assert not list(out.glob("adapter*"))
        assert held_out_loss(out, request) == pytest.approx(want, abs=1e-5)
    again = autotune("merge", str(run), "--out", str(out))
    assert again.returncode == 2 and "nothing was overwritten" in again.stderr


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_merged_weights_are_the_formula_s(rslora, scale, tmp_path) -> None:
    """W + s B A from the files: the run and the merge make the adapter by the same code."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotune.runner.merge import merge
    from autotune.runner.models import add_adapter

    config = AutoConfig.for_model(**small_config())
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    whole = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = add_adapter(base, Lora(r=4, alpha=8, rslora=rslora))
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    merge(
        MergeOrder(
            adapter=str(tmp_path / "adapter"), base=str(tmp_path / "base"),
            out=str(tmp_path / "out"),
        )
    )  # fmt: skip
    merged = load_file(tmp_path / "out/model.safetensors")
    parts = load_file(tmp_path / "adapter/adapter_model.safetensors")
    names = [name for name in whole if name.endswith("_proj.weight")]
    assert len(names) == 14
    for name in names:
        stem = "base_model.model." + name.removesuffix(".weight")
        low, high = parts[f"{stem}.lora_A.weight"], parts[f"{stem}.lora_B.weight"]
        want = whole[name] + scale * high @ low
        torch.testing.assert_close(merged[name], want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("layers", "words"), [(3, "the adapter has none for"), (1, "no place")])
def test_a_base_of_other_layers_is_refused(layers, words, tmp_path) -> None:
    """PEFT warns, and merges the layers that are there."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotune.runner.merge import merge
    from autotune.runner.models import add_adapter

    def model(count):
        config = AutoConfig.for_model(**small_config(num_hidden_layers=count))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    model(layers).save_pretrained(tmp_path / "base")
    adapter = Lora(r=4, dora=True, target_modules=("q_proj", "up_proj"))
    add_adapter(model(2), adapter).save_pretrained(tmp_path / "adapter")
    order = MergeOrder(
        adapter=str(tmp_path / "adapter"), base=str(tmp_path / "base"), out=str(tmp_path / "out")
    )
    with pytest.raises(AutotuneError, match=words):
        merge(order)
    model(2).save_pretrained(tmp_path / "base")
    assert merge(order)["layers"] == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("file", "kept", "words"),
    [
        ("plain/adapter_model.safetensors", 3000, "adapter_model.safetensors is not whole"),
        ("base/model.safetensors", 3000, "The base .* cannot be read"),
        ("sharded/pytorch_model_fsdp_0/.metadata", None, "pytorch_model_fsdp_0 is not whole"),
        ("sharded/pytorch_model_fsdp_0/.metadata", 0, "pytorch_model_fsdp_0 is not whole"),
        ("sharded/pytorch_model_fsdp_0/__0_0.distcp", None, "pytorch_model_fsdp_0 is not whole"),
        ("sharded/pytorch_model_fsdp_0/__0_0.distcp", 900, "pytorch_model_fsdp_0 is not whole"),
    ],
)
def test_what_was_half_written_is_refused(file, kept, words, tmp_path) -> None:
    """safetensors and DCP fail with errors of their own, DCP's no `Exception`."""
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotune.runner.merge import merge
    from autotune.runner.models import add_adapter

    config = AutoConfig.for_model(**small_config())
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    lora = Lora(r=4, target_modules=("q_proj",))
    adapted = add_adapter(base, lora)
    adapted.save_pretrained(tmp_path / "plain")
    held = {
        f"model.{name}": p.detach() for name, p in adapted.named_parameters() if "lora_" in name
    }
    dcp.save(held, checkpoint_id=tmp_path / "sharded/pytorch_model_fsdp_0", no_dist=True)
    path = tmp_path / file
    whole = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(whole[:kept])
    order = MergeOrder(
        adapter=str(tmp_path / ("sharded" if "sharded" in file else "plain")),
        base=str(tmp_path / "base"), out=str(tmp_path / "out"), lora=lora.model_dump(mode="json"),
    )  # fmt: skip
    with pytest.raises(AutotuneError, match=words):
        merge(order)
