"""Formats, labels token by token, and what bad data says."""

import json

import numpy as np
import pytest

from autotune.errors import AutotuneError
from autotune.runner.data.documents import load_documents, raw_text_of
from autotune.runner.data.tokenizer import load_tokenizer
from autotune.spec.training import DatasetSource

pytestmark = pytest.mark.integration

TEXTS = ["Tell me a story about the sea.", "The sea is wide, and the story is long.\n"] * 20
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Tell me a story."},
    {"role": "assistant", "content": "The sea is wide."},
    {"role": "user", "content": "The sea is wide."},
    {"role": "assistant", "content": "Tell me."},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer") / "bpe"


@pytest.fixture
def tokenizer(trained):
    return load_tokenizer(None, texts=lambda: TEXTS, vocab_size=400, save_dir=trained)


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write_file


def load(tokenizer, path, kind="completion", max_tokens=1000, **more):
    source = DatasetSource(path=path, type=kind, **more)
    return load_documents([source], tokenizer, max_tokens=max_tokens)


def runs(document, tokenizer):
    """Decode the stretches of labelled and of masked tokens: ``[(trained, text), ...]``."""
    found = []
    for token, label in zip(document.input_ids, document.labels, strict=True):
        assert label in (token, -100)
        if not found or found[-1][0] != (label != -100):
            found.append((label != -100, []))
        found[-1][1].append(int(token))
    return [(trained, tokenizer.decode(ids)) for trained, ids in found]


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
    assert all(len(part.input_ids) == 16 for part in parts[:-1])
    joined = np.concatenate([part.input_ids for part in parts])
    # A last chunk of one token has nothing to predict and is left out.
    assert len(whole.input_ids) - len(joined) in (0, 1)
    assert (joined == whole.input_ids[: len(joined)]).all()


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


def test_chat_trains_on_each_answer_and_its_end_of_turn(tokenizer, write):
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT}]), "chat_template")
    assert runs(document, tokenizer) == [
        (
            False,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTell me a story.<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "The sea is wide.<|im_end|>"),
        (False, "\n<|im_start|>user\nThe sea is wide.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Tell me.<|im_end|>"),
        (False, "\n"),
    ]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert document.input_ids.tolist() == whole


def test_chat_falls_back_to_chatml(tokenizer, write):
    path = write("a.jsonl", [{"talk": CHAT}])
    (with_own,) = load(tokenizer, path, "chat_template", field_messages="talk")
    tokenizer.chat_template = None
    (without,) = load(tokenizer, path, "chat_template", field_messages="talk")
    assert (with_own.input_ids == without.input_ids).all()
    assert (with_own.labels == without.labels).all()


TEMPLATES = {
    # As Qwen3: an earlier answer loses its reasoning, the last one has a block for it.
    "drops earlier reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.content.split('</think>')[0] if '</think>' in m.content else '' }}\n"
        "</think>\n{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}",
        ["The sea is wide.<|im_end|>", "Tell me.<|im_end|>"],
    ),
    "a space before the stop, as Llama 2": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
        "{{ ' <|endoftext|>' if m.role == 'assistant' else '' }}{% endfor %}",
        ["The sea is wide. <|endoftext|>", "Tell me. <|endoftext|>"],
    ),
    "no stop at all": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}",
        ["The sea is wide.", "Tell me.", "<|endoftext|>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_finds_the_answers_in_any_template(tokenizer, write, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT}]), "chat_template")
    assert [text for trained, text in runs(document, tokenizer) if trained] == expected


def test_chat_trains_on_the_reasoning_a_template_writes(tokenizer, write):
    tokenizer.chat_template = TEMPLATES["drops earlier reasoning"][0]
    talk = [CHAT[1], {"role": "assistant", "content": "It is long.</think>Tell me."}]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": talk}]), "chat_template")
    assert [text for trained, text in runs(document, tokenizer) if trained] == [
        "It is long.\n</think>\nTell me.<|im_end|>"
    ]


def test_an_empty_answer_trains_on_the_end_of_turn(tokenizer, write):
    talk = [CHAT[1], {"role": "assistant", "content": ""}]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": talk}]), "chat_template")
    assert [text for trained, text in runs(document, tokenizer) if trained] == ["<|im_end|>"]


def test_no_end_of_sequence_behind_a_user_s_message(tokenizer, write):
    tokenizer.chat_template = TEMPLATES["no stop at all"][0]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT[:4]}]), "chat_template")
    assert [text for trained, text in runs(document, tokenizer) if trained] == ["The sea is wide."]


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
def test_too_long_an_answer_is_left_out(tokenizer, write, kind, caplog):
    short = {"instruction": "a", "output": "b", "messages": CHAT[1:3]}
    long = {"instruction": "a", "output": "b" * 999, "messages": [*CHAT, CHAT[1], CHAT[2]] * 9}
    documents = load(tokenizer, write("a.jsonl", [short, long]), kind, max_tokens=200)
    assert len(documents) == 1
    assert "left out 1 of 2 rows longer than 200 tokens" in caplog.text
    with pytest.raises(AutotuneError, match="1 of 1 are longer than 200"):
        load(tokenizer, write("b.jsonl", [long]), kind, max_tokens=200)


def test_every_kind_of_file_reads_the_same_text(tokenizer, write, tmp_path):
    from datasets import Dataset

    rows = [{"text": 'The sea, "wide"\nand long.'}, {"text": "Tell me."}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "e.parquet"))
    paths = [
        write("a.jsonl", rows),
        write("b.json", json.dumps(rows, indent=2)),
        write("c.json", "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)),
        write("d.csv", 'text\n"The sea, ""wide""\nand long."\nTell me.\n'),
        str(tmp_path / "e.parquet"),
    ]
    expected = [row["text"] for row in rows]
    for path in paths:
        assert list(raw_text_of([DatasetSource(path=path)])) == expected, path
    unnamed = write("corpus", rows)
    assert list(raw_text_of([DatasetSource(path=unnamed, ds_type="json")])) == expected


def test_a_text_file_is_one_document_and_a_folder_its_files(write, tmp_path):
    (tmp_path / "books").mkdir()
    write("books/b.txt", "Second.")
    write("books/a.md", "First.\n\nStill first.")
    write("books/ignored.bin", "no")
    source = DatasetSource(path=str(tmp_path / "books"))
    assert list(raw_text_of([source])) == ["First.\n\nStill first.", "Second."]


GOOD = {"text": "The sea."}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", [{"body": "x", "title": "y"}], {}, r"a.jsonl:1.*'text'; found: body, title"),
        ("a.jsonl", [GOOD], {"type": "alpaca"}, r"'instruction'; found: text"),
        ("a.jsonl", [GOOD], {"type": "chat_template"}, r"'messages'; found: text.*field_messages"),
        ("a.jsonl", [GOOD, {"text": 3}], {}, r"a.jsonl:2: column 'text' holds int, not text"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', {}, r"a.jsonl:3 is not JSON"),
        ("a.json", '[{"text": "x"},\n {"text": }]', {}, r"a.json:2 is not JSON"),
        ("a.jsonl", '"just text"\n', {}, r"a.jsonl:1 is a JSON str"),
        ("a.jsonl", "", {}, r"a.jsonl is empty"),
        ("a.json", "[]", {}, r"a.json is empty"),
        ("a.jsonl", [{"text": ""}], {}, r"1 have nothing to train on"),
        ("a.csv", "text,more\nx,y\nz\n", {}, r"a.csv:3 does not have the 2 fields"),
        ("a.parquet", "not parquet", {}, r"a.parquet is not a Parquet file"),
        ("a.bin", "x", {}, r"no known suffix.*ds_type"),
        ("a.jsonl", [GOOD], {"ds_type": "jsn"}, r"'jsn' is not known.*Nearest: json"),
        ("a.jsonl", [GOOD], {"type": "alpacca"}, r"'alpacca'.*Nearest: alpaca"),
        ("a.jsonl", [GOOD], {"train_on_inputs": True}, r"no effect here: train_on_inputs"),
        (
            "a.jsonl",
            [{"messages": [{"role": "human", "content": "x"}]}],
            {"type": "chat_template"},
            r"message 1 has the role 'human'; allowed: system, user, assistant, tool",
        ),
        (
            "a.jsonl",
            [{"messages": [{"from": "human", "value": "x"}]}],
            {"type": "chat_template"},
            r"message 1 needs the keys role, content; found: from, value",
        ),
        (
            "a.jsonl",
            [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}],
            {"type": "chat_template"},
            r"content of type list, not text",
        ),
        ("a.jsonl", [{"messages": []}], {"type": "chat_template"}, r"not a list of messages"),
        (
            "a.jsonl",
            [{"messages": [{"role": "user", "content": "x"}]}],
            {"type": "chat_template"},
            r"1 have nothing to train on",
        ),
    ],
)
def test_bad_data_says_where_and_what(tokenizer, write, name, content, options, message):
    source = DatasetSource(path=write(name, content), **options)
    with pytest.raises(AutotuneError, match="(?s)" + message):
        load_documents([source], tokenizer, max_tokens=100)


def test_a_template_s_refusal_names_the_row(tokenizer, write):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(AutotuneError, match=r"a.jsonl:1: the chat template refuses.*alternate"):
        load(tokenizer, write("a.jsonl", [{"messages": CHAT}]), "chat_template")


@pytest.mark.parametrize("path", ["/no/such/file", "./missing.jsonl", "data.jsonl", "~/none"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tokenizer, path):
    with pytest.raises(AutotuneError, match="There is no data file"):
        load(tokenizer, path)


def test_not_utf8_and_an_empty_folder(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(AutotuneError, match="not UTF-8"):
        load(tokenizer, str(tmp_path / "latin.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AutotuneError, match="holds no data file"):
        load(tokenizer, str(tmp_path / "empty"))


def test_another_name_is_a_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if path == "owner/gone":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list([{"text": "Tell me."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(raw_text_of([DatasetSource(path="owner/name", split="train[:9]")])) == ["Tell me."]
    assert asked == [("owner/name", {"split": "train[:9]"})]
    with pytest.raises(AutotuneError, match=r"'owner/gone' is no local file.*no network"):
        list(raw_text_of([DatasetSource(path="owner/gone")]))
