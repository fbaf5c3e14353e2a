"""Formats, labels token by token, and what bad data says."""

import numpy as np
import pytest

from autotune.errors import AutotuneError
from autotune.runner.data.documents import Limit
from autotune.runner.data.prompts import PROMPTS
from autotune.spec.training import DATASET_TYPES, DatasetSource, PromptFormat
from tests.integration.documents import CHAT, load, read, runs, trained_text

pytestmark = pytest.mark.integration


def test_completion_trains_on_all_of_it_and_ends(tokenizer, write):
    path = write("a.jsonl", [{"text": "The sea ünd 海."}, {"text": "Tell me."}])
    first, second = load(tokenizer, path)
    assert runs(first, tokenizer) == [(True, "The sea ünd 海.<|endoftext|>")]
    assert runs(second, tokenizer) == [(True, "Tell me.<|endoftext|>")]
    assert first.input_ids.dtype == first.labels.dtype == np.int32


def test_completion_is_cut_and_nothing_is_lost(tokenizer, write):
    path = write("a.jsonl", [{"body": "The story is long. " * 30}])
    (whole,) = load(tokenizer, path, field="body")
    parts = load(tokenizer, path, field="body", max_tokens=16)
    assert len(parts) > 3
    assert all(len(part.input_ids) == 16 for part in parts[:-2])
    joined = np.concatenate([part.input_ids for part in parts])
    assert joined.tolist() == whole.input_ids.tolist()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"instruction": "Tell me", "input": "the {sea}", "output": "Wide."},
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nTell me\n\n### Input:\nthe {sea}\n\n### Response:\n",
        ),
        (
            {"instruction": "Tell me", "input": "", "output": "Wide."},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nTell me\n\n### Response:\n",
        ),
    ],
)
def test_alpaca_trains_on_the_output_alone(tokenizer, write, row, prompt):
    (document,) = load(tokenizer, write("a.jsonl", [row]), "alpaca")
    assert runs(document, tokenizer) == [(False, prompt), (True, "Wide.<|endoftext|>")]
    alone = tokenizer(prompt)["input_ids"]
    assert document.input_ids[: len(alone)].tolist() == alone, "as at inference"


def test_alpaca_input_may_be_missing_or_null(tokenizer, write):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
    first, second = load(tokenizer, write("a.jsonl", rows), "alpaca")
    assert (first.input_ids == second.input_ids).all()


def test_a_tokenizer_s_bos_comes_once_and_masked_prompts_keep_it(tokenizer, write):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    (text,) = load(tokenizer, write("a.jsonl", [{"text": "The sea."}]))
    assert runs(text, tokenizer) == [(False, "<|im_start|>"), (True, "The sea.<|endoftext|>")]
    row = {"instruction": "Tell me", "output": "Wide."}
    (answer,) = load(tokenizer, write("b.jsonl", [row]), "alpaca")
    assert (answer.input_ids == tokenizer.bos_token_id).sum() == 1
    assert runs(answer, tokenizer)[1:] == [(True, "Wide.<|endoftext|>")]


@pytest.mark.parametrize("kind", ["alpaca", "chat_template"])
def test_too_long_an_answer_is_left_out(tokenizer, write, kind):
    short = {"instruction": "a", "output": "b", "messages": CHAT[1:3]}
    long = {"instruction": "a", "output": "b" * 999, "messages": [*CHAT, CHAT[1], CHAT[2]] * 9}
    source = DatasetSource(path=write("a.jsonl", [short, long]), type=kind)
    documents, counts = read(tokenizer, source, max_tokens=200)
    assert len(documents) == 1
    assert (counts.rows, counts.dropped) == (2, {"longer than 200 tokens": 1})
    with pytest.raises(AutotuneError, match="1 of 1 are longer than 200"):
        load(tokenizer, write("b.jsonl", [long]), kind, max_tokens=200)


def test_too_long_an_answer_is_cut_or_refused_where_asked(tokenizer, write):
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b" * 999}
    late = {"instruction": "a" * 999, "output": "b"}
    source = DatasetSource(path=write("a.jsonl", [short, long, late]), type="alpaca")
    (first, second), counts = read(
        tokenizer, source, max_tokens=200, excess_length_strategy="truncate"
    )
    (whole,) = load(tokenizer, write("b.jsonl", [long]), "alpaca", max_tokens=2000)
    assert len(first.input_ids) < 200 == len(second.input_ids)
    assert (second.input_ids == whole.input_ids[:200]).all()
    assert (second.labels == whole.labels[:200]).all()
    assert counts.truncated == 1
    assert counts.dropped == {"nothing to train on": 1}, "its answer was cut off whole"
    with pytest.raises(AutotuneError, match=r"a.jsonl:2 has \d+ tokens, more than .* 200"):
        read(tokenizer, source, max_tokens=200, excess_length_strategy="raise")


def test_train_on_inputs_trains_on_the_prompt_too(tokenizer, write):
    row = {"instruction": "Tell me", "output": "Wide."}
    source = DatasetSource(path=write("a.jsonl", [row]), type="alpaca")
    (document,), _ = read(tokenizer, source, train_on_inputs=True)
    ((trained, text),) = runs(document, tokenizer)
    assert trained and text.endswith("Tell me\n\n### Response:\nWide.<|endoftext|>")


OTHERS = {
    "alpaca:chat": (
        {"instruction": "Tell me", "input": "now", "output": "Wide."},
        "SYSTEM: Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n"
        "USER: Tell me\nnow\nASSISTANT:",
    ),
    "alpaca:chatml": (
        {"instruction": "Tell me", "output": "Wide."},
        "<|im_start|>system\nBelow is an instruction that describes a task. Write a response that "
        "appropriately completes the request.<|im_end|>\n<|im_start|>user\nTell me<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "gpteacher": (
        {"instruction": "Tell me", "input": "", "response": "Wide."},
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nTell me\n\n### Response:\n",
    ),
    "alpaca_w_system.load_open_orca": (
        {"system_prompt": "Be kind.", "question": "Tell me", "response": "Wide."},
        "### System:\nBe kind.\n### Human:\nTell me\n### Assistant:\n",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_instruction_formats(tokenizer, write, kind):
    row, prompt = OTHERS[kind]
    (document,) = load(tokenizer, write("a.jsonl", [row]), kind)
    assert runs(document, tokenizer) == [(False, prompt), (True, "Wide.<|endoftext|>")]


def test_a_prompt_of_one_s_own(tokenizer, write):
    rows = [
        {"q": "Tell me", "ctx": "the {sea}", "a": "Wide.", "sys": "Be kind."},
        {"q": "Tell me", "ctx": None, "a": "Wide."},
    ]
    prompt = PromptFormat(
        field_instruction="q",
        field_input="ctx",
        field_output="a",
        field_system="sys",
        system_prompt="Be short.",
        system_format="<<{system}>> ",
        format="[{instruction}|{input}] ",
        no_input_format="[{instruction}] {{}} ",
    )
    first, second = load(tokenizer, write("a.jsonl", rows), prompt)
    answer = (True, "Wide.<|endoftext|>")
    assert runs(first, tokenizer) == [(False, "<<Be kind.>> [Tell me|the {sea}] "), answer]
    assert runs(second, tokenizer) == [(False, "<<Be short.>> [Tell me] {} "), answer]
    for key, text, named in (
        ("format", "{instruktion}", "{instruktion} is not filled in"),
        ("no_input_format", "{input}", "{input} is not filled in"),
        ("format", "{instruction", "cannot be read"),
    ):
        wrong = prompt.model_copy(update={key: text})
        with pytest.raises(AutotuneError, match=f"type: {key}: .*{named}"):
            load(tokenizer, write("a.jsonl", rows), wrong)


def test_input_output_trains_on_the_segments_labelled_so(tokenizer, write):
    segments = [
        {"label": True, "text": "The sea"},
        {"label": False, "text": " is wide"},
        {"label": True, "text": ", and long.<|endoftext|>"},
    ]
    source = DatasetSource(path=write("a.jsonl", [{"segments": segments}]), type="input_output")
    (document,), counts = read(tokenizer, source)
    assert runs(document, tokenizer) == [
        (True, "The sea"),
        (False, " is wide"),
        (True, ", and long.<|endoftext|>"),
    ]
    # The first token has nothing that predicts it.
    assert counts.trained_tokens == (document.labels != -100).sum() - 1
    (document,), _ = read(tokenizer, source, train_on_inputs=True)
    assert len(runs(document, tokenizer)) == 1


def test_duplicates_are_left_out_where_asked_and_counted(tokenizer, write):
    rows = [{"text": "Tell me."}, {"text": "The sea."}, {"text": "Tell me."}]
    source = DatasetSource(path=write("a.jsonl", rows))
    documents, counts = read(tokenizer, source, exact_deduplication=True)
    assert [runs(d, tokenizer)[0][1] for d in documents] == [
        "Tell me.<|endoftext|>",
        "The sea.<|endoftext|>",
    ]
    assert (counts.rows, counts.dropped) == (3, {"a duplicate": 1})
    assert counts.tokens == sum(len(d.input_ids) for d in documents)
    assert len(read(tokenizer, source)[0]) == 3, "listed twice is trained on twice, as in Axolotl"


def test_reading_stops_when_there_is_enough(tokenizer, write):
    path = write("a.jsonl", [{"text": f"The sea {i}."} for i in range(2000)])
    documents, counts = read(tokenizer, DatasetSource(path=path), limit=Limit(documents=600))
    assert 600 <= len(documents) == counts.rows < 2000
    assert not counts.complete
    documents, counts = read(tokenizer, DatasetSource(path=path), limit=Limit(tokens=10**6))
    assert len(documents) == 2000 and counts.complete


def test_the_shipped_names_are_those_that_are_read(tokenizer, tmp_path):
    assert set(DATASET_TYPES) == {"completion", "chat_template", "input_output", *PROMPTS}
    with pytest.raises(AutotuneError, match=r"'alpacca'.*Nearest: alpaca"):
        load(tokenizer, "x.jsonl", "alpacca")


def test_every_token_of_a_text_is_kept_whatever_its_length(tokenizer, write):
    """Also the end of sequence that would stand alone behind full chunks; also far in a text."""
    alone = 0
    for words in (*range(1, 40), 600):
        path = write("a.jsonl", [{"text": "The sea is wide. " * words}])
        (whole,) = load(tokenizer, path, max_tokens=100_000)
        parts = load(tokenizer, path, max_tokens=8)
        joined = np.concatenate([part.input_ids for part in parts])
        assert joined.tolist() == whole.input_ids.tolist()
        alone += len(whole.input_ids) > 8 and len(whole.input_ids) % 8 == 1
    assert alone and len(parts) > 64, "the cases that matter must be among them"


def test_an_answer_that_is_not_there_is_left_out(tokenizer, write):
    rows = [{"instruction": "Say it.", "output": text} for text in ("", "Yes.")]
    documents, counts = read(tokenizer, DatasetSource(path=write("a.jsonl", rows), type="alpaca"))
    assert [trained_text(document, tokenizer) for document in documents] == [["Yes.<|endoftext|>"]]
    assert counts.rows == 2 and sum(counts.dropped.values()) == 1


def test_a_text_that_ends_a_sequence_gets_no_second_end(tokenizer, write):
    path = write("a.jsonl", [{"text": "The end.<|endoftext|>"}])
    ids = list(load(tokenizer, path)[0].input_ids)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
