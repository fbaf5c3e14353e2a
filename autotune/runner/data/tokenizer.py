"""The model's tokenizer, or a byte-level BPE trained on the data where the model has none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from autotune.errors import AutotuneError
from autotune.runner.data.templates import shipped_template

_EOS, _PAD = "<|endoftext|>", "<|pad|>"
_SPECIAL = [_EOS, "<|im_start|>", "<|im_end|>", _PAD]
_NUM_BYTES = 256


def load_tokenizer(
    source: str | None,
    *,
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    save_dir: Path,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or train one.

    Args:
        source: local folder or Hub id; None trains a byte-level BPE on `texts()`, unless `save_dir`
            holds one already. The same texts give the same tokenizer.
        texts: the texts to train on; called only to train.
        vocab_size: rows of the model's embedding; no token id may reach it.
        save_dir: where a trained tokenizer is kept. It must belong to these texts alone. Written
            to a temporary folder and renamed, so other ranks never read half of it.

    Raises:
        AutotuneError: no such tokenizer, one whose ids the model has no embedding for, one without
            an end-of-sequence token, or a vocabulary too small to train one.
    """
    if source is None:
        if not (save_dir / "tokenizer_config.json").is_file():
            _train(texts(), vocab_size=vocab_size, save_dir=save_dir)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(save_dir)
    else:
        tokenizer = _load(source)
    _check(tokenizer, source or str(save_dir), vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Padding is never labelled, so any id will do.
    return tokenizer


def _load(source: str) -> PreTrainedTokenizerBase:
    path = Path(source).expanduser()
    if path.is_dir():
        source = str(path)
    elif path.is_absolute() or source.startswith((".", "~")):
        raise AutotuneError(f"There is no tokenizer folder {source}. Check the path.")
    try:
        try:
            # What lies here or in the Hub's cache wins: it needs no network.
            return AutoTokenizer.from_pretrained(source, local_files_only=True)
        except OSError:
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AutotuneError(
            f"The tokenizer {source!r} cannot be loaded: {error}\n"
            "Give a folder with its files, or the id of a model that the Hub has."
        ) from error


def _check(tokenizer: PreTrainedTokenizerBase, name: str, vocab_size: int) -> None:
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise AutotuneError(
            f"The tokenizer {name!r} has ids up to {needed - 1}, but the model has an embedding "
            f"for {vocab_size} only. Use the model's own tokenizer, or a model with a "
            f"vocab_size of {needed} or more."
        )
    if tokenizer.eos_token_id is None:
        raise AutotuneError(
            f"The tokenizer {name!r} names no end-of-sequence token. "
            "Set eos_token in its tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise AutotuneError(
            f"The tokenizer {name!r} has no tokenizer.json, so it cannot say which characters a "
            "token stands for. Convert it to the `tokenizers` format."
        )


def _train(texts: Iterable[str], *, vocab_size: int, save_dir: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = _NUM_BYTES + len(_SPECIAL)
    if vocab_size < smallest:
        raise AutotuneError(
            f"A byte-level tokenizer needs a vocab_size of {smallest} or more; "
            f"the model has {vocab_size}."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_EOS,
        pad_token=_PAD,
        additional_special_tokens=_SPECIAL[1:3],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = shipped_template("chatml")
    _save(tokenizer, save_dir)


def _save(tokenizer: PreTrainedTokenizerBase, save_dir: Path) -> None:
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{save_dir.name}.", dir=save_dir.parent))
    try:
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp keeps others out.
        os.rename(temporary, save_dir)
    except OSError:
        if not (save_dir / "tokenizer_config.json").is_file():
            raise
        # Another process was first, with the same tokenizer.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
