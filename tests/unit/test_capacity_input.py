"""What `autotune capacity` is given: mistakes are one message, GPUs of one's own are taken."""

import pytest

from tests.unit.capacity_runs import BASE, plan_of, run


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--gpu-type", "h1000"], 2, "Nearest: h100"),
        (["--gpu-type", ","], 2, "names no GPU"),
        (["--gpu-type", "./nowhere.yaml"], 2, "nowhere.yaml cannot be read"),
        (["--price", "h200=3"], 2, "--price names 'h200', which --gpu-type does not"),
        (["--price", "l40=3"], 2, "Nearest: l40s"),
        (["--price", "l40s=0"], 2, "'0' is not a price above 0"),
        (["--price", "l40s=-1"], 2, "not a price above 0"),
        (["--price", "l40s=nan"], 2, "not a price above 0"),
        (["--price", "l40s"], 2, "--price names ''"),
        (["--price", "h100=1,h100-sxm=2"], 2, "names h100-sxm twice"),
        (["--tokens", "10X"], 2, "'10X' is not a count. Write it as 500M, 10B or 1T"),
        (["--tokens", "0"], 2, "'0' is not a count"),
        (["--tokens", "9" * 400], 2, "is not a count"),
        (["--tokens", "9" * 300 + "T"], 2, "is not a count"),
        (["--memory-limit", "9" * 300 + "TB"], 2, "is not a size"),
        (["--deadline", "9" * 306 + "d"], 2, "is not a duration"),
        (
            ["--budget", "1e308", "--price", "h100=1e-10,l40s=1", "--json"],
            2,
            "tokens_in_budget of 1 x h100-sxm is too large for a number",
        ),
        (["--deadline", "soon"], 2, "'soon' is not a duration"),
        (["--budget", "500"], 2, "--budget needs a price for h100-sxm, l40s"),
        (["--calibrate", "nowhere"], 2, "nowhere: no such folder"),
        (["--model", "qwen3-9b"], 2, "Nearest: qwen3-8b"),
        (["--memory-limit", "6GiB", "--strategies", "ddp"], 1, "Nothing fits in any of 10 cells"),
        (["--gpus", "12,20"], 2, "No cell can be planned. 12 x h100-sxm: 12 GPUs are no whole"),
    ],
)
def test_bad_input_is_one_message(capsys, changes, code, words):
    got, out, err = run(capsys, *BASE, "--tokens", "10B", *changes)
    assert (got, out) == (code, "")
    assert words in err and "Traceback" not in err and err.count("\n") == 1


def test_nothing_fits_names_the_closest_cell(capsys):
    argv = [*BASE, "--tokens", "1B", "--memory-limit", "6GiB", "--strategies", "ddp"]
    _, _, err = run(capsys, *argv)
    assert "Closest: " in err and "GiB short" in err
    assert "Closest: ddp mbs=" in err


def test_without_tokens_or_budget(capsys):
    code, _, err = run(capsys, *BASE)
    assert code == 2 and "--tokens 10B, or --budget or --deadline" in err


@pytest.mark.parametrize("flag", [["--gpus", "1,zero"], ["--gpus", ""], ["--budget", "free"]])
def test_usage_errors(capsys, flag):
    code, out, err = run(capsys, *BASE, "--tokens", "1B", *flag)
    assert (code, out) == (2, "") and "usage: autotune capacity" in err


def test_a_gpu_of_ones_own(capsys, tmp_path):
    entry = (
        "memory_gib: 44.4\nhbm_tb_per_s: 0.864\ntflops: {bf16: 181}\nlink: pcie\n"
        "link_gb_per_s: 32\nhost_link_gb_per_s: 32\nnic_gb_per_s: 3\nhost_memory_gib: 512\n"
        "host_gb_per_s: 205\npower_w: 300\n"
    )
    path = tmp_path / "l40.yaml"
    path.write_text(entry)
    argv = ["capacity", "--model", "qwen3-8b", "--gpu-type", f"{path},l40s", "--gpus", "4"]
    document = plan_of(capsys, *argv, "--tokens", "1B", "--price", f"{path}=1,l40s=2")
    own, listed = document["cells"]
    assert own["gpu_type"] == "l40" and own["price_per_gpu_hour"] == 1
    assert own["tokens_per_s"] < listed["tokens_per_s"]
    namesake = tmp_path / "l40s.yaml"
    path.rename(namesake)
    code, _, err = run(capsys, *argv[:-3], f"l40s,{namesake}", *argv[-2:], "--tokens", "1B")
    assert code == 2 and "are both called l40s" in err


def test_one_gpu_by_two_names_is_one(capsys):
    argv = ["capacity", "--model", "qwen3-0.6b", "--gpu-type", "h100,h100-sxm,H100"]
    assert len(plan_of(capsys, *argv, "--gpus", "1,1", "--tokens", "1B")["cells"]) == 1


def test_cpu_ranks_can_be_planned_for(capsys):
    argv = ["capacity", "--model", "tiny-qwen3", "--gpu-type", "cpu", "--gpus", "1,2", "--power"]
    for cell in plan_of(capsys, *argv, "--tokens", "10M")["cells"]:
        assert cell["gpu_type"] == "cpu" and cell["days"] > 0 and cell["kwh"] is None
