"""The trained tokenizer and the checks of a loaded one."""

import os
import subprocess
import sys

import pytest

from autotune.errors import AutotuneError
from autotune.runner.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.integration

TEXTS = [f"The sea number {i} is wide, and wider than sea {i * i}." for i in range(300)]


def unused():
    raise AssertionError("the texts must not be read")


def trained(tmp_path, vocab_size=400):
    return load_tokenizer(
        None, texts=lambda: TEXTS, vocab_size=vocab_size, save_dir=tmp_path / "new" / "bpe"
    )


def test_trained_vocabulary_is_of_the_model_s_size_and_round_trips(tmp_path):
    tokenizer = trained(tmp_path)
    assert len(tokenizer) == 400
    for text in ["The sea.", "  two  spaces\n\n\ttab ", "ünïcödé 海 😀", "a<|im_end|>b"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    talk = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert talk == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_trained_once_and_reused(tmp_path):
    first = trained(tmp_path)
    again = load_tokenizer(None, texts=unused, vocab_size=400, save_dir=tmp_path / "new" / "bpe")
    assert first.get_vocab() == again.get_vocab()
    assert again(TEXTS[7])["input_ids"] == first(TEXTS[7])["input_ids"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bpe"], "no leftovers"


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path):
    trained(tmp_path)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_data_tokenizer import trained\n"
        "trained(Path(sys.argv[2]))"
    )
    here = os.path.dirname(__file__)
    subprocess.run(
        [sys.executable, "-c", script, here, str(tmp_path / "other")],
        check=True,
        cwd=os.path.join(here, "..", ".."),
        env={**os.environ, "PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "1"},
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        mine = (tmp_path / "new" / "bpe" / name).read_bytes()
        assert mine == (tmp_path / "other" / "new" / "bpe" / name).read_bytes(), name


def test_a_local_folder_is_loaded_as_it_is(tmp_path):
    own = trained(tmp_path)
    folder = str(tmp_path / "new" / "bpe")
    loaded = load_tokenizer(folder, texts=unused, vocab_size=400, save_dir=tmp_path / "x")
    assert loaded.get_vocab() == own.get_vocab()
    assert not (tmp_path / "x").exists()


def test_ids_without_an_embedding_are_refused(tmp_path):
    trained(tmp_path)
    folder = str(tmp_path / "new" / "bpe")
    with pytest.raises(AutotuneError, match=r"ids up to 399.*embedding for 399 only"):
        load_tokenizer(folder, texts=unused, vocab_size=399, save_dir=tmp_path / "x")


def test_no_end_of_sequence_token_is_refused_and_a_missing_pad_is_not(tmp_path):
    tokenizer = trained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "nopad")
    loaded = load_tokenizer(
        str(tmp_path / "nopad"), texts=unused, vocab_size=400, save_dir=tmp_path
    )
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "noeos")
    with pytest.raises(AutotuneError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "noeos"), texts=unused, vocab_size=400, save_dir=tmp_path)


def test_too_small_a_vocabulary_for_bytes(tmp_path):
    with pytest.raises(AutotuneError, match="260 or more; the model has 259"):
        trained(tmp_path, vocab_size=259)
    assert len(trained(tmp_path, vocab_size=260)) == 260


@pytest.mark.parametrize("name", ["/no/such/folder", "./none"])
def test_a_missing_folder(tmp_path, name):
    with pytest.raises(AutotuneError, match="There is no tokenizer folder"):
        load_tokenizer(name, texts=unused, vocab_size=400, save_dir=tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AutotuneError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"), texts=unused, vocab_size=400, save_dir=tmp_path)
