"""What `autotune capacity` shows and writes: tables, CSV, JSON, files."""

import csv
import shlex
from pathlib import Path

import pytest

from autotune.cli.tables import format_count
from autotune.report.capacity_words import count_words, figure
from tests.unit.capacity_runs import PRICED, QUICK, plan_of, run

EXAMPLE = Path(__file__).resolve().parents[2] / "reports" / "examples" / "capacity-qwen3-8b"


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


@pytest.mark.parametrize(
    ("count", "tokens", "parameters"),
    [
        (8.19e9, "8.19B", "8.19 billion"),
        (4.2e6, "4.2M", "4.2 million"),
        (999.7e6, "1B", "1 billion"),
        (1.034e12, "1.03T", "1030 billion"),
        (999.7e9, "1T", "1000 billion"),
    ],
)
def test_a_count_keeps_its_unit_when_rounded(count, tokens, parameters):
    assert (count_words(count), format_count(count)) == (tokens, parameters)


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
