"""`autotune capacity`: its cells are `autotune plan`'s, and its sums add up."""

import pytest

from tests.unit.capacity_runs import BASE, COUNTS, PRICED, QUICK, TYPES, by_cell, plan_of, run


def test_every_cell_is_what_plan_answers(capsys):
    cells = by_cell(plan_of(capsys, *BASE, "--tokens", "10B"))
    assert list(cells) == [(gpu, count) for gpu in TYPES for count in COUNTS]
    strategies = set()
    for (gpu, count), cell in cells.items():
        plan = ["plan", "--model", "qwen3-8b", "--gpu-type", gpu, "--gpus", str(count)]
        best = plan_of(capsys, *plan)["candidates"][0]
        assert cell["plan"] == best["plan"]
        assert cell["verdict"] == best["verdict"]
        assert cell["fit_probability"] == best["fit_probability"]
        assert cell["tokens_per_s"] == best["time"]["tokens_per_s"]
        assert cell["memory_bytes"] == best["memory"]["total_bytes"]
        assert cell["basis"] == "predicted" and cell["calibration"] is None
        strategies.add(cell["plan"]["strategy"])
    assert len(strategies) > 1, "the cells are not all alike"


def test_tensor_parallelism_is_asked_for_as_in_plan(capsys):
    flags = ["--model", "qwen3-8b", "--strategies", "fsdp2", "--tensor-parallel", "2"]
    where = ["--gpu-type", "l40s", "--gpus", "4"]
    (cell,) = plan_of(capsys, "capacity", *flags, *where, "--tokens", "1B")["cells"]
    best = plan_of(capsys, "plan", *flags, *where)["candidates"][0]
    assert cell["plan"] == best["plan"] and cell["plan"]["tp"] == 2
    assert cell["tokens_per_s"] == best["time"]["tokens_per_s"]


def test_sums(capsys):
    document = plan_of(capsys, *PRICED)
    price = {"h100-sxm": 2.5, "l40s": 0.9}
    watts = {"h100-sxm": 700, "l40s": 350}
    for (gpu, count), cell in by_cell(document).items():
        hours = 10e9 / cell["tokens_per_s"] / 3600
        assert cell["days"] == pytest.approx(hours / 24)
        assert cell["gpu_hours"] == pytest.approx(hours * count)
        assert cell["cost"] == pytest.approx(hours * count * price[gpu])
        assert cell["kwh"] == pytest.approx(hours * count * watts[gpu] / 1000)
    cheapest = min(document["cells"], key=lambda cell: cell["cost"])
    named = document["answers"]["cheapest"]
    assert (named["gpu_type"], named["num_gpus"]) == (cheapest["gpu_type"], cheapest["num_gpus"])


def test_deadline(capsys):
    document = plan_of(capsys, *PRICED, "--deadline", "5d")
    in_time = [cell for cell in document["cells"] if cell["days"] <= 5]
    assert {cell["meets_deadline"] for cell in in_time} == {True}
    assert 0 < len(in_time) < len(document["cells"])
    answer = document["answers"]["cheapest_in_time"]
    best = min(in_time, key=lambda cell: cell["cost"])
    assert (answer["gpu_type"], answer["num_gpus"]) == (best["gpu_type"], best["num_gpus"])
    for gpu, count in document["answers"]["smallest_in_time"].items():
        counts = [cell["num_gpus"] for cell in in_time if cell["gpu_type"] == gpu]
        assert count == min(counts, default=None)


def test_no_cell_meets_the_deadline(capsys):
    code, out, _ = run(capsys, *PRICED, "--deadline", "1h")
    assert code == 0
    assert "no cell; the fastest takes" in " ".join(out.split())


def test_budget_alone(capsys):
    argv = [*QUICK, "--budget", "500", "--price", "h100-sxm=2.5,l40s=0.9"]
    document = plan_of(capsys, *argv)
    for (gpu, count), cell in by_cell(document).items():
        hours = 500 / ({"h100-sxm": 2.5, "l40s": 0.9}[gpu] * count)
        assert cell["tokens_in_budget"] == pytest.approx(cell["tokens_per_s"] * hours * 3600)
        assert cell["days"] == pytest.approx(hours / 24)
        assert cell["cost"] == pytest.approx(500)
    most = max(document["cells"], key=lambda cell: cell["tokens_in_budget"])
    answer = document["answers"]["most_tokens_in_budget"]
    assert (answer["gpu_type"], answer["num_gpus"]) == (most["gpu_type"], most["num_gpus"])
    cut = plan_of(capsys, *argv, "--deadline", "6h")
    for cell in cut["cells"]:
        assert cell["days"] <= 0.25 + 1e-9
        assert cell["tokens_in_budget"] <= cell["tokens_per_s"] * 6 * 3600 * (1 + 1e-9)


@pytest.mark.parametrize("price", [[], ["--price", "h100=2.5,l40s=0.9"]])
def test_deadline_alone_asks_what_can_be_had_in_it(capsys, price):
    argv = [*QUICK, "--deadline", "3d", *price]
    document = plan_of(capsys, *argv)
    cells = by_cell(document)
    for (gpu, count), cell in cells.items():
        assert cell["tokens_in_deadline"] == pytest.approx(cell["tokens_per_s"] * 3 * 86400)
        assert cell["days"] == pytest.approx(3) and cell["tokens_in_budget"] is None
        cost = {"h100-sxm": 2.5, "l40s": 0.9}[gpu] * count * 72
        assert cell["cost"] == (pytest.approx(cost) if price else None)
    most = max(cells, key=lambda each: cells[each]["tokens_per_s"])
    named = document["answers"]["most_tokens_in_deadline"]
    assert (named["gpu_type"], named["num_gpus"]) == most
    assert document["answers"]["most_tokens_in_budget"] is None
    for gpu, count in document["answers"]["most_tokens"].items():
        own = {n: cell["tokens_per_s"] for (t, n), cell in cells.items() if t == gpu}
        assert own[count] == max(own.values())
    text = " ".join(run(capsys, *argv)[1].split())
    billions = f"{cells[most]['tokens_in_deadline'] / 1e9:.3g}B"
    assert f"Within 3 days: {most[1]} x {most[0]}: {billions} tokens at most" in text
    assert f"Most of each type: h100-sxm: {billions} on {most[1]}; l40s: " in text


def test_budget_and_deadline_of_one_length_say_who_keeps_both(capsys):
    argv = [*PRICED, "--budget", "1135", "--deadline", "3.35d"]
    document = plan_of(capsys, *argv)
    cells = by_cell(document)
    kept = {key: (c["cost"] <= 1135, c["days"] <= 3.35) for key, c in cells.items()}
    assert len(set(kept.values())) == 4, "some keep both, some either, some neither"
    assert {k: (c["within_budget"], c["meets_deadline"]) for k, c in cells.items()} == kept
    both = [key for key, limits in kept.items() if all(limits)]
    answers = document["answers"]
    named = [(a["gpu_type"], a["num_gpus"]) for a in answers["within_budget_and_deadline"]]
    assert named == both
    best = min(both, key=lambda key: cells[key]["cost"])
    cheapest = answers["cheapest_within_both"]
    assert (cheapest["gpu_type"], cheapest["num_gpus"]) == best
    text = " ".join(run(capsys, *argv)[1].split())
    assert f"Cheapest within both: {best[1]} x {best[0]}: " in text
    assert f"Within both: {', '.join(f'{n} x {gpu}' for gpu, n in both)} Cheapest" in text
    for word in ("both", "budget", "deadline", "neither", "keeps"):
        assert word in text


def test_no_cell_keeps_both(capsys):
    argv = [*PRICED, "--budget", "1100", "--deadline", "1h"]
    assert plan_of(capsys, *argv)["answers"]["within_budget_and_deadline"] == []
    text = " ".join(run(capsys, *argv)[1].split())
    assert "Cheapest within both: no cell keeps a budget of 1,100 and 0.04167 days" in text


def test_counts_no_cluster_has_are_cells_with_a_reason(capsys):
    argv = ["capacity", "--model", "qwen3-0.6b", "--gpu-type", "h100,gb200", "--gpus", "8,12,96"]
    cells = by_cell(plan_of(capsys, *argv, "--tokens", "1B"))
    twelve = cells["h100-sxm", 12]
    assert twelve["verdict"] == "refused" and "no whole number of nodes" in twelve["reason"]
    assert twelve["tokens_per_s"] is twelve["days"] is None
    # A GB200 node is a tray of 4, but 64 sequences do not divide over 12 or 96 ranks.
    assert "[AT" in cells["gb200", 12]["reason"] and "64 sequences" in cells["gb200", 12]["reason"]
    assert cells["gb200", 8]["num_nodes"] == 2 and cells["h100-sxm", 8]["num_nodes"] == 1


def test_a_gpu_that_does_not_fit_beside_one_that_does(capsys):
    argv = ["capacity", "--model", "qwen3-1.7b", "--gpu-type", "t4,a10g,h100", "--gpus", "1"]
    argv += ["--tokens", "1B", "--strategies", "ddp"]
    document = plan_of(capsys, *argv)
    t4, a10g, h100 = document["cells"]
    assert (t4["verdict"], a10g["verdict"], h100["verdict"]) == ("refused", "oom", "fits")
    assert "no bf16" in t4["reason"] and "--precision fp32" in t4["reason"]
    short = a10g["memory_bytes"] - a10g["device_memory_bytes"]
    assert a10g["missing_bytes"] == short > 0 and "too much" in a10g["reason"]
    assert document["answers"]["smallest_that_fits"] == {"t4": None, "a10g": None, "h100-sxm": 1}


def test_a_type_without_a_price_has_no_cost(capsys):
    argv = [*QUICK, "--tokens", "1B", "--price", "l40s=1"]
    document = plan_of(capsys, *argv)
    assert {c["cost"] is None for c in document["cells"] if c["gpu_type"] == "h100-sxm"} == {True}
    assert any("No price was given for h100-sxm" in note for note in document["notes"])
    assert document["answers"]["cheapest"]["gpu_type"] == "l40s"
