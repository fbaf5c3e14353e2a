"""`autotune capacity`: its cells are `autotune plan`'s, and its sums add up."""

import csv
import json
import shlex
from pathlib import Path

import pytest

from autotune.cli import main
from autotune.report.capacity_words import figure

EXAMPLE = Path(__file__).resolve().parents[2] / "reports" / "examples" / "capacity-qwen3-8b"
TYPES, COUNTS = ["h100-sxm", "l40s"], [1, 2, 4, 8, 16]
BASE = [
    "capacity", "--model", "qwen3-8b", "--gpu-type", ",".join(TYPES),
    "--gpus", ",".join(map(str, COUNTS)),
]  # fmt: skip
# For what does not depend on the strategies, a few of them.
QUICK = [*BASE, "--strategies", "zero3,zero3_offload_params"]
PRICED = [*QUICK, "--tokens", "10B", "--price", "h100=2.5,l40s=0.9", "--power"]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def plan_of(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def by_cell(document):
    return {(cell["gpu_type"], cell["num_gpus"]): cell for cell in document["cells"]}


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EM DASH}"), (0.0, "0"), (147_963.97, "147,964"), (100.4, "100"), (99.94, "99.9"),
        (9.909, "9.91"), (0.78222, "0.782"), (0.1, "0.100"), (0.0123456, "0.0123"),
        (0.000012345, "0.0000123"), (1.2345e-9, "1.23e-09"),
    ],
)  # fmt: skip
def test_a_figure_has_three_significant_figures(value, text):
    assert figure(value) == text


def test_a_tiny_training_shows_its_days_and_cost(capsys):
    argv = [*QUICK, "--tokens", "20K", "--price", "h100=2.5,l40s=0.9", "--power"]
    for cell in plan_of(capsys, *argv)["cells"]:
        for key in ("days", "cost", "kwh"):
            shown = figure(cell[key])
            assert float(shown) == pytest.approx(cell[key], rel=5e-3), key


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_keeps_to_the_width_and_leaves_nothing_out(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(capsys, *PRICED, "--deadline", "5d")
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    text = " ".join(out.split())
    for words in ("16 x h100-sxm", "1 x l40s", "tokens/s", "days", "cost", "kWh", "predicted"):
        assert words in text
    for words in ("Smallest that fits", "Cheapest", "Within 5 days", "TDP", "zero3 mbs="):
        assert words in text


@pytest.mark.parametrize("width", [60, 80])
def test_columns_without_room_go_below_instead_of_vanishing(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    argv = [
        "capacity",
        "--model",
        "qwen3-8b",
        "--gpu-type",
        "rtx-pro-6000-server",
        "--gpus",
        "1,16",
    ]
    argv += ["--tokens", "1T", "--budget", "90000", "--price", "rtx-pro-6000-server=1.5"]
    _, out, _ = run(capsys, *argv, "--power", "--strategies", "zero3,ddp")
    assert max(map(len, out.splitlines())) <= width
    headers = [line.split() for line in out.splitlines() if line.startswith(" GPUs ")]
    assert len(headers) > 1 and all(header[0] == "GPUs" for header in headers)
    shown = " ".join(word for header in headers for word in header[1:])
    assert shown == "fits tokens/s days cost budget buys kWh GPU-h GiB configuration basis"
    assert out.count("16 x rtx-pro-6000-server") >= len(headers)


def test_the_committed_example_is_what_its_command_writes_today(capsys, tmp_path):
    """The command is read out of the example's README."""
    block = (EXAMPLE / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    words = shlex.split(block.replace("\\\n", " "))
    out = words.index("--out") + 1
    assert words[0] == "autotune" and Path(words[out]).name == EXAMPLE.name
    code, _, _ = run(capsys, *words[1:out], str(tmp_path), *words[out + 1 :])
    assert code == 0
    with (EXAMPLE / "capacity.csv").open() as old, (tmp_path / "capacity.csv").open() as new:
        committed, today = list(csv.reader(old)), list(csv.reader(new))
    assert len(committed) == len(today) == 11 and committed[0] == today[0]
    for before, after in zip(committed[1:], today[1:], strict=True):
        assert [number(text) for text in before] == [
            value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            for value in map(number, after)
        ]


def number(text):
    """A figure as such: another machine may round its last digit otherwise."""
    try:
        return float(text)
    except ValueError:
        return text


def test_a_type_without_a_price_has_no_cost(capsys):
    argv = [*QUICK, "--tokens", "1B", "--price", "l40s=1"]
    document = plan_of(capsys, *argv)
    assert {c["cost"] is None for c in document["cells"] if c["gpu_type"] == "h100-sxm"} == {True}
    assert any("No price was given for h100-sxm" in note for note in document["notes"])
    assert document["answers"]["cheapest"]["gpu_type"] == "l40s"


def test_csv_and_json_agree(capsys, tmp_path):
    document = plan_of(capsys, *PRICED, "--csv", str(tmp_path / "c.csv"))
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["cells"]) == 10
    for row, cell in zip(rows, document["cells"], strict=True):
        for name, text in row.items():
            value = cell[name]
            assert text == ("" if value is None else str(value)), name


def test_files_are_written_where_asked_and_only_over_their_own_kind(capsys, tmp_path):
    small = ["capacity", "--model", "qwen3-0.6b", "--gpu-type", "h100", "--gpus", "1"]
    small += ["--tokens", "1B"]
    assert run(capsys, *small)[0] == 0 and list(tmp_path.iterdir()) == []
    out = tmp_path / "plan"
    for _ in range(2):  # the second writes over the first
        code, _, err = run(capsys, *small, "--out", str(out))
        assert code == 0 and "capacity.csv and" in err
    assert {path.name for path in out.iterdir()} == {"capacity.csv", "capacity.html"}
    header, _, rest = (out / "capacity.csv").read_text().partition("\n")
    older = header.replace("within_budget,tokens_in_deadline,", "")
    (out / "capacity.csv").write_text(f"{older}\n{rest}")
    assert older != header and run(capsys, *small, "--out", str(out))[0] == 0
    for name in ("capacity.csv", "capacity.html"):
        (out / name).write_text("my own notes")
        code, stdout, err = run(capsys, *small, "--out", str(out))
        assert (code, stdout) == (2, "") and "left as it is" in err
        assert (out / name).read_text() == "my own notes"
        (out / name).unlink()
    code, _, err = run(capsys, *small, "--csv", str(tmp_path / "no" / "c.csv"))
    assert code == 2 and "no folder" in err
    same = str(tmp_path / "same")
    assert "Give two names" in run(capsys, *small, "--csv", same, "--html", same)[2]
    assert "is a folder" in run(capsys, *small, "--csv", str(tmp_path))[2]


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
