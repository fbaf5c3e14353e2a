"""Which rows a data set stands for: files, folders, patterns, slices, the Hub; and bad files."""

import bz2
import gzip
import json
import lzma
import shutil

import pytest

from autotune.errors import AutotuneError
from autotune.runner.data import readers
from autotune.runner.data.documents import raw_text_of
from autotune.runner.data.rows import read_rows
from autotune.spec.training import DatasetSource
from tests.integration.documents import CHAT, load, read

pytestmark = pytest.mark.integration

ROWS = [{"text": 'The sea, "wide"\nand long.'}, {"text": "Tell me."}]


def texts(path, **keys):
    """Return the column `text` of a data set."""
    return [row.values["text"] for row in read_rows(DatasetSource(path=str(path), **keys))]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_kind_of_file_reads_the_same_rows(write, tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "e.parquet"))
    for name, pack in (("f.gz", gzip), ("g.bz2", bz2), ("h.xz", lzma)):
        stem, _, suffix = name.partition(".")
        (tmp_path / f"{stem}.jsonl.{suffix}").write_bytes(pack.compress(lines(ROWS).encode()))
    paths = [
        write("a.jsonl", ROWS),
        write("b.json", json.dumps(ROWS, indent=2)),
        write("c.json", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)),
        write("d.csv", 'text\n"The sea, ""wide""\nand long."\nTell me.\n'),
        tmp_path / "e.parquet",
        tmp_path / "f.jsonl.gz",
        tmp_path / "g.jsonl.bz2",
        tmp_path / "h.jsonl.xz",
    ]
    expected = [row["text"] for row in ROWS]
    for path in paths:
        assert texts(path) == expected, path
    assert texts(write("corpus", ROWS), ds_type="json") == expected
    assert texts("json", data_files=[str(paths[0]), str(paths[1])]) == expected * 2


@pytest.mark.parametrize("size", [1, 7, 2**16])
def test_an_array_is_read_item_by_item(write, monkeypatch, size):
    monkeypatch.setattr(readers, "_JSON_READ", size)
    rows = [{"text": '"]},[' * (i % 9), "n": -1.5e3 * i, "deep": [{"a": [1]}]} for i in range(60)]
    for indent in (None, 2):
        path = write("a.json", json.dumps(rows, indent=indent))
        assert [row.values for row in read_rows(DatasetSource(path=path))] == rows
    for broken, said in (
        ('[{"a": 1}\n\n{"b": 2}]', "a.json:3 is not JSON: ',' is missing"),
        ('[{"a": 1},\n {"text": }]', "a.json:2 is not JSON: Expecting value"),
        ('\n[{"a": 1}', "a.json:2 is not JSON: the array does not end"),
        ('[{"a": 1}, 3]', "item 2 is a JSON int"),
    ):
        with pytest.raises(AutotuneError, match=said):
            list(read_rows(DatasetSource(path=write("a.json", broken))))


def test_rows_of_one_file_may_differ_in_their_columns(write):
    rows = [{"text": "a", "messages": [{"role": "user", "n": 1}]}, {"text": "b", "messages": "x"}]
    found = [row.values for row in read_rows(DatasetSource(path=write("a.jsonl", rows)))]
    assert found == rows, "no gaps filled in"


@pytest.fixture
def folder(tmp_path):
    """A folder as data sets are published: splits by name, a card, hidden files."""
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    (root / ".git").mkdir()
    for name, text in (
        ("data/train-00000.jsonl", "one"),
        ("data/train-00001.jsonl", "two"),
        ("data/test-00000.jsonl", "held out"),
        (".git/x.jsonl", "hidden"),
    ):
        (root / name).write_text(lines([{"text": text}]))
    (root / "README.md").write_text("the card")
    return root


def test_a_folder_has_splits_by_the_names_of_its_files(folder):
    assert texts(folder) == ["one", "two"]
    assert texts(folder, split="test") == ["held out"]
    with pytest.raises(AutotuneError, match=r"no files of the split 'tset'; found: train, test"):
        texts(folder, split="tset")
    assert texts(folder, data_files=["data/*1.jsonl"]) == ["two"]


def test_no_file_is_read_twice(folder):
    files = ["data/train-00001.jsonl", "data/*.jsonl", str(folder / "data/test-00000.jsonl")]
    assert texts(folder, data_files=files) == ["two", "held out", "one"]
    assert texts(folder / "data" / "train*") == ["one", "two"]
    assert texts(folder / "**" / "test*.jsonl") == ["held out"]
    with pytest.raises(AutotuneError, match=r"No data file matches .*nothing"):
        texts(folder, data_files=["nothing*"])
    with pytest.raises(AutotuneError, match="No data file matches"):
        texts(folder / "*.csv")


def test_a_name_with_brackets_in_it_is_a_file(tmp_path):
    (tmp_path / "a[1].jsonl").write_text(lines(ROWS))
    assert (
        len(texts(tmp_path / "a[1].jsonl")) == len(texts(tmp_path, data_files=["a[1].jsonl"])) == 2
    )


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(40)),
        ("train[:10%]", range(4)),
        ("train[30:33]", range(30, 33)),
        ("train[-2:]", [38, 39]),
        ("train[:5%]+train[95%:]", [0, 1, 38, 39]),
    ],
)
def test_slices_of_a_split(write, tmp_path, split, expected):
    from datasets import Dataset

    rows = [{"text": str(i)} for i in range(40)]
    expected = [str(i) for i in expected]
    assert texts(write("a.jsonl", rows), split=split) == expected
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved", split=split) == expected


def test_a_slice_that_is_none_and_a_split_a_file_does_not_have(write):
    path = write("a.jsonl", ROWS)
    for split in ("train[a:]", "train[:2", "train[:200%]"):
        with pytest.raises(AutotuneError, match=r"split: .* cannot be read.*train\[:1000\]"):
            texts(path, split=split)
    with pytest.raises(AutotuneError, match="has the one split `train`"):
        texts(path, split="test")
    with pytest.raises(AutotuneError, match="name and revision are for data sets of the Hub"):
        texts(path, name="main")


def test_shards_and_skipped_rows(write):
    path = write("a.jsonl", [{"text": str(i)} for i in range(10)])
    assert texts(path, shards=3) == ["0", "3", "6", "9"]
    assert texts(path, shards=3, shards_idx=2) == ["2", "5", "8"]
    assert texts(path, skip=7) == ["7", "8", "9"]
    parts = [texts(path, shards=4, shards_idx=i) for i in range(4)]
    assert sorted(row for part in parts for row in part) == [str(i) for i in range(10)], (
        "each row in one of them"
    )


def test_a_saved_data_set_with_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    held = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[1:]))
    held.save_to_disk(str(tmp_path / "saved"))
    assert len(texts(tmp_path / "saved")) == 2
    assert texts(tmp_path / "saved", split="test") == ["Tell me."]
    with pytest.raises(AutotuneError, match="no split 'dev'; found: train, test"):
        texts(tmp_path / "saved", split="dev")


def test_an_empty_slice_of_a_saved_data_set_is_empty_and_its_split_is_its_own(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved", split="train[:0]") == []
    assert texts(tmp_path / "saved", split="train[1:]") == ["Tell me."]
    with pytest.raises(AutotuneError, match="no split 'test'"):
        texts(tmp_path / "saved", split="test")
    with pytest.raises(AutotuneError, match="cannot be read"):
        texts(tmp_path / "saved", split="train[abc]")


def test_linked_files_belong_to_the_split_of_their_own_name(tmp_path):
    """As in the cache of the Hub: names that link to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "data").mkdir()
    for number, (name, row) in enumerate((("train", ROWS[0]), ("test", ROWS[1]))):
        (tmp_path / "blobs" / str(number)).write_text(json.dumps(row) + "\n")
        (tmp_path / "data" / f"{name}.jsonl").symlink_to(tmp_path / "blobs" / str(number))
    assert texts(tmp_path / "data") == [ROWS[0]["text"]]
    assert texts(tmp_path / "data", split="test") == [ROWS[1]["text"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}]\n[{"text": "b"}]', "a.json:2 is not JSON: something stands behind"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "a.json:1 cannot be read"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", "a.json:1 is not JSON"),
        ("[" * 100_000, "a.json:1 is not JSON"),
    ],
)
def test_what_no_reader_takes_is_said(write, text, message):
    with pytest.raises(AutotuneError, match=message):
        texts(write("a.json", text))


def test_half_a_character_is_said(tokenizer, write):
    source = DatasetSource(path=write("a.jsonl", '{"text": "a \\ud800 b"}\n'))
    with pytest.raises(AutotuneError, match=r"a.jsonl:1 holds half of a surrogate pair"):
        read(tokenizer, source)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and one data set in the Hub's cache, laid out as `datasets` leaves it."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "made")
    )
    made = next((tmp_path / "made").rglob("dataset_info.json")).parent
    cached = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / ("0123456789" * 4)
    cached.mkdir(parents=True)
    for file in made.iterdir():
        shutil.copy(file, cached / file.name.replace("json-", "name-"))


def test_a_hub_data_set_is_read_from_the_cache(offline):
    assert texts("owner/name", split="train[1:]") == ["Tell me."]
    for keys, said in (
        ({"path": "owner/gone"}, "'owner/gone' is no local file.*OfflineModeIsEnabled.*network"),
        ({"path": "owner/name", "split": "tset"}, r"split 'tset'.*Should be one of \['train'\]"),
        ({"path": "owner/name", "name": "other"}, "for config 'other'"),
    ):
        with pytest.raises(AutotuneError, match=said):
            list(read_rows(DatasetSource(**keys)))


def test_what_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([{"text": "Tell me."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DatasetSource(path="owner/name", name="en", revision="v1", data_files=["a/*"])
    assert list(raw_text_of([source], streaming=True)) == ["Tell me."]
    assert asked == [
        (
            "owner/name",
            {
                "split": "train", "name": "en", "revision": "v1", "data_files": ["a/*"],
                "streaming": True,
            },
        )
    ]  # fmt: skip


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
        read(tokenizer, source, max_tokens=100)


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


def test_a_long_text_file_becomes_pieces_that_end_with_a_line(write, monkeypatch):
    monkeypatch.setattr(readers, "_TEXT_PIECE", 20)
    text = "The sea is wide.\n" * 5 + "and long" * 9
    pieces = texts(write("a.txt", text))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:4])


def test_files_that_are_not_what_they_say(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\0\1\2" * 50)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "d.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "f.jsonl").write_bytes(b"\0\0\0\0")
    for name, said in {
        "a.txt": "is not text",
        "b.jsonl.gz": "is damaged",
        "c.jsonl.gz": "cannot be read: Not a gzipped file",
        "d.jsonl": "is not UTF-8",
        "e.parquet": "is not a Parquet file",
        "f.jsonl": ":1 is not JSON",
    }.items():
        with pytest.raises(AutotuneError, match=f"{name}.*{said}"):
            texts(tmp_path / name)
