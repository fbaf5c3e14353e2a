"""Data sets of every kind through the real command, on one rank; the counts are made by hand."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml

from tests.integration.commands import autotune, write_model
from tests.integration.ranks import logged

pytestmark = pytest.mark.integration

ANSWERS = [f"The answer is {i} times {'very ' * (i % 5)}wide." for i in range(60)]


def write_data_sets(folder: Path) -> list[dict]:
    """Write one data set of each kind, 12 rows each; return their entries."""
    from datasets import Dataset

    parts = [ANSWERS[start : start + 12] for start in range(0, 60, 12)]
    with gzip.open(folder / "texts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": answer}) + "\n" for answer in parts[0])
    Dataset.from_list(
        [{"instruction": "Say it.", "input": "", "output": answer} for answer in parts[1]]
    ).to_parquet(str(folder / "alpaca.parquet"))
    with (folder / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["q", "a"])
        writer.writerows(["Say it.", answer] for answer in parts[2])
    talks = [
        [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": answer}]
        for answer in parts[3]
    ]
    talks += [[{"from": "human", "value": "Nobody answers."}]]
    (folder / "talks.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    (folder / "segments").mkdir()
    rows = [
        {"segments": [{"label": False, "text": "Say it: "}, {"label": True, "text": answer}]}
        for answer in parts[4]
    ]
    (folder / "segments" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "segments" / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return [
        {"path": str(folder / "texts.jsonl.gz"), "type": "completion", "field": "body"},
        {"path": str(folder / "*.parquet"), "type": "alpaca"},
        {
            "path": str(folder / "own.csv"),
            "type": {"field_instruction": "q", "field_output": "a", "format": "[{instruction}] "},
        },
        {
            "path": str(folder / "talks.json"),
            "type": "chat_template",
            "chat_template": "chatml",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
        {"path": str(folder / "segments"), "type": "input_output"},
    ]


def tokens_of(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_data_sets_of_every_kind_train_with_the_tokens_that_were_meant(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    entries = write_data_sets(tmp_path)
    out = tmp_path / "out"
    config = tmp_path / "run.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(write_model(tmp_path / "model")),
                "datasets": entries,
                "test_datasets": [{**entries[4], "split": "test"}],
                "sequence_len": 128,
                "sample_packing": True,
                "micro_batch_size": 2,
                "learning_rate": 0.003,
                "max_steps": 5,
                "bf16": False,
                "output_dir": str(out),
            }
        )
    )
    done = autotune("train", str(config), "--device", "cpu", "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    losses = logged(out, "loss")
    assert len(losses) == 5 and losses[-1] < losses[0]

    document = json.loads(done.stdout)
    assert json.loads((out / "run.json").read_text()) == document
    data = document["data"]
    (shown,) = logged(out, "data")
    assert shown == data
    tokenizer = AutoTokenizer.from_pretrained(out)
    end = 1
    expected = [
        # The first token of a text has nothing that predicts it; every other one is trained on.
        sum(tokens_of(answer, tokenizer) - 1 + end for answer in ANSWERS[:12]),
        *(
            sum(tokens_of(answer, tokenizer) + end for answer in ANSWERS[start : start + 12])
            for start in (12, 24, 36)
        ),
        sum(tokens_of(answer, tokenizer) for answer in ANSWERS[48:]),
    ]
    assert [source["trained_tokens"] for source in data["train"]] == expected
    assert [source["rows"] for source in data["train"]] == [12, 12, 12, 13, 12]
    assert [source["dropped"] for source in data["train"]] == [
        {}, {}, {}, {"nothing to train on": 1}, {},
    ]  # fmt: skip
    held_out = tokens_of(ANSWERS[48], tokenizer)
    assert data["test"][0]["trained_tokens"] == held_out
    assert logged(out, "eval_tokens")[-1] == held_out, "what is evaluated is what was counted"
    tokens = sum(source["tokens"] for source in data["train"])
    assert data["padding_share"] == pytest.approx(1 - tokens / (128 * data["sequences"]))
    said = f"Data: 61 rows read, 1 left out (nothing to train on), {tokens:,} tokens, "
    assert said + f"{sum(expected):,} of them trained on" in done.stderr


@pytest.mark.slow
def test_a_search_says_what_it_reads_and_keeps_it(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is wide."}]
    data, out = tmp_path / "talks.jsonl", tmp_path / "study"
    data.write_text((json.dumps({"messages": talk}) + "\n") * 200)
    done = autotune(
        "search", "--model", str(write_model(tmp_path / "model")), "--gpus", "1", "--device", "cpu",
        "--seq-len", "64", "--global-batch-size", "4", "--strategies", "ddp", "--recompute", "none",
        "--micro-batches", "1", "--data", str(data), "--chat-template", "chatml",
        "--out", str(out), "--trials", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = json.loads((out / "summary.json").read_text())["data"]
    assert (held["train"][0]["rows"], held["train"][0]["type"]) == (200, "chat_template")
    assert "data: 200 rows read, " in done.stderr + done.stdout
    best = yaml.safe_load((out / "best.yml").read_text())
    assert best["datasets"] == [
        {
            "path": str(data),
            "type": "chat_template",
            "split": "train",
            "chat_template": "chatml",
        }
    ]
