"""From a request to sequences: what is cached, who goes first, what is held out."""

import errno
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from autotune.errors import AutotuneError
from autotune.runner.data import build, build_sequences
from autotune.runner.data import cache as cache_module
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import Workload
from autotune.trial.protocol import ModelSource, Request

pytestmark = pytest.mark.integration


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DatasetSource(path=str(path))


def make_request(datasets=(), *, mode="train", seq_len=64, config=None, **more):
    return Request(
        launch_id="x",
        mode=mode,
        model=ModelSource(name="tiny", config=config or {"vocab_size": 300}),
        plan={},
        workload=Workload(seq_len=seq_len, global_batch_size=4),
        device="cpu",
        out_dir="unused",
        datasets=list(datasets),
        **more,
    )


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "a.jsonl", [f"the sea and {i} ships " * (1 + i % 7) for i in range(90)])


def every_row(sequences):
    return sequences.rows(range(len(sequences)))


def same(one, other):
    one, other = every_row(one), every_row(other)
    return (one.input_ids == other.input_ids).all() and (
        one.shift_labels == other.shift_labels
    ).all()


def test_a_trial_without_data_gets_synthetic_documents(tmp_path):
    data = build_sequences(make_request(mode="trial"), tmp_path / "cache")
    assert data.tokenizer is None and data.validation is None
    assert len(data.train) >= 4 and data.train.seq_len == 64
    assert 250 < every_row(data.train).input_ids.max() < 300
    assert not (tmp_path / "cache").exists()


def test_a_nested_config_states_the_vocabulary_too(tmp_path):
    request = make_request(mode="trial", config={"text_config": {"vocab_size": 50}})
    assert every_row(build_sequences(request, tmp_path).train).input_ids.max() < 50


def test_training_needs_data_and_a_vocabulary(tmp_path):
    with pytest.raises(AutotuneError, match="--data"):
        build_sequences(make_request(), tmp_path)
    with pytest.raises(AutotuneError, match="no vocab_size"):
        build_sequences(make_request(config={"hidden_size": 8}), tmp_path)


def test_documents_become_packed_sequences(tmp_path, corpus):
    data = build_sequences(make_request([corpus]), tmp_path / "cache")
    assert data.validation is None
    assert data.train.efficiency > 0.9
    row = every_row(data.train).input_ids[0, every_row(data.train).document_ids[0] == 0]
    text = data.tokenizer.decode(row)
    assert text.startswith("the sea and") and text.endswith("<|endoftext|>")


def test_held_out_sequences_are_no_training_sequences(tmp_path, corpus):
    whole = build_sequences(make_request([corpus]), tmp_path).train
    request = make_request([corpus], train=TrainSettings(val_set_size=0.25))
    data = build_sequences(request, tmp_path)
    assert len(data.validation) == round(0.25 * len(whole))
    assert len(data.train) + len(data.validation) == len(whole)
    rows = {row.tobytes() for row in every_row(data.train).input_ids}
    assert rows.isdisjoint(row.tobytes() for row in every_row(data.validation).input_ids)


def test_test_datasets_are_the_validation(tmp_path, corpus):
    other = write(tmp_path / "test.jsonl", ["ships and the sea"])
    data = build_sequences(make_request([corpus], test_datasets=[other]), tmp_path / "cache")
    assert len(data.validation) == 1
    both = make_request([corpus], test_datasets=[other], train=TrainSettings(val_set_size=0.1))
    with pytest.raises(AutotuneError, match="test_datasets and val_set_size exclude each other"):
        build_sequences(both, tmp_path / "cache")
    kept = every_row(data.validation).input_ids[0, : every_row(data.validation).lengths[0]]
    assert data.tokenizer.decode(kept) == "ships and the sea<|endoftext|>"


def test_the_cache_is_used_and_follows_the_content(tmp_path, corpus, monkeypatch):
    cache = tmp_path / "cache"
    first = build_sequences(make_request([corpus]), cache).train

    def must_not_run(*args, **kwargs):
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "DocumentReader", must_not_run)
        assert same(build_sequences(make_request([corpus]), cache).train, first)
        with pytest.raises(AssertionError, match="not used"):
            build_sequences(make_request([corpus], seq_len=32), cache)
    changed = write(tmp_path / "a.jsonl", ["another text altogether " * 3] * 20)
    assert changed == corpus
    after = build_sequences(make_request([changed]), cache)
    assert after.tokenizer.decode(every_row(after.train).input_ids[0]).startswith("another text")


def test_a_damaged_cache_is_made_anew(tmp_path, corpus):
    cache = tmp_path / "cache"
    first = build_sequences(make_request([corpus]), cache).train
    (folder,) = cache.glob("sequences-*")
    for name in ("tokens.i32", "trained.u8", "sizes.npy", "order.npy", "starts.npy", "counts.json"):
        for damage in (b"", (folder / name).read_bytes()[:-1], None):
            (folder / name).unlink()
            if damage is not None:
                (folder / name).write_bytes(damage)
            assert same(build_sequences(make_request([corpus]), cache).train, first), name
    assert len(list(cache.glob("[!.]*"))) == 2, "the tokenizer and the sequences, no leftovers"


def test_a_run_goes_on_when_the_cache_is_emptied(tmp_path, corpus):
    cache = tmp_path / "cache"
    kept = build_sequences(make_request([corpus]), cache).train
    before = every_row(kept).input_ids
    shutil.rmtree(cache)
    assert (every_row(kept).input_ids == before).all()


def test_no_room_for_the_cache_is_said(tmp_path, corpus, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.np, "save", full)
    with pytest.raises(AutotuneError, match=r"No space left.*AUTOTUNE_CACHE_DIR"):
        build_sequences(make_request([corpus]), tmp_path / "cache")
    monkeypatch.undo()
    assert build_sequences(make_request([corpus]), tmp_path / "cache").train


def test_ranks_that_come_together_read_the_files_once_and_agree(tmp_path, corpus, monkeypatch):
    """Threads stand for ranks: each opens the lock's file for itself, as a process does."""
    real, readers = cache_module.DocumentReader.read, []

    def slow(*args, **kwargs):
        readers.append(args)
        time.sleep(0.3)
        return real(*args, **kwargs)

    monkeypatch.setattr(cache_module.DocumentReader, "read", slow)
    with ThreadPoolExecutor(3) as ranks:
        request = make_request([corpus])
        found = list(ranks.map(lambda _: build_sequences(request, tmp_path / "cache"), range(3)))
    assert len(readers) == 1
    assert len({data.train.digest() for data in found}) == 1


def test_every_rank_says_what_is_wrong_and_the_lock_is_free_again(tmp_path, corpus):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    request = make_request([DatasetSource(path=str(bad))])
    for _ in range(2):
        with pytest.raises(AutotuneError, match=r"bad.jsonl:2 is not JSON"):
            build_sequences(request, tmp_path / "cache")


def streamed(source, **settings):
    settings = {"max_steps": 5} | settings
    return make_request(
        [source], data=DataSettings(streaming=True), train=TrainSettings(**settings)
    )


def test_a_stream_is_read_as_far_as_the_steps_need(tmp_path):
    source = write(tmp_path / "a.jsonl", ["the sea and many ships " * 3] * 3000)
    data = build_sequences(streamed(source), tmp_path / "cache")
    # 5 steps of 4 sequences, of 64 tokens each.
    assert 20 <= len(data.train) and data.counts.train[0].rows < 1000
    assert not data.counts.train[0].complete
    held_out = build_sequences(streamed(source, val_set_size=0.5), tmp_path / "cache")
    assert len(held_out.train) >= 20 and len(held_out.validation) >= 20
    whole = build_sequences(streamed(source, max_steps=None), tmp_path / "cache")
    assert whole.counts.train[0].rows == 3000 and whole.counts.train[0].complete


def test_a_stream_without_an_end_needs_a_number_of_steps(tmp_path):
    request = streamed(DatasetSource(path="owner/name"), max_steps=None)
    with pytest.raises(AutotuneError, match=r"owner/name is streamed.*Set max_steps"):
        build_sequences(request, tmp_path)


@pytest.mark.parametrize("packing", [True, False])
def test_a_trial_does_not_wait_for_all_of_the_data(tmp_path, monkeypatch, packing):
    source = write(tmp_path / "a.jsonl", ["the sea and many ships " * 3] * 3000)
    monkeypatch.setattr(build, "_TRIAL_TOKENS", 64 * 100)
    request = make_request([source, source], mode="trial")
    workload = request.workload.model_copy(update={"packing": packing})
    data = build_sequences(request.model_copy(update={"workload": workload}), tmp_path / "cache")
    assert 100 <= len(data.train)
    assert [counts.rows < 1000 for counts in data.counts.train] == [True, True]


def test_more_held_out_than_there_is(tmp_path, corpus):
    for size in (500, 0.999):
        request = make_request([corpus], train=TrainSettings(val_set_size=size))
        with pytest.raises(AutotuneError, match=r"val_set_size .* holds out \d+ of \d+ sequences"):
            build_sequences(request, tmp_path / "cache")


def test_several_data_sets_are_read_in_turn_and_counted_apart(tmp_path, corpus):
    other = write(tmp_path / "b.jsonl", ["ships alone"] * 7 + [""])
    data = build_sequences(make_request([corpus, other, other]), tmp_path / "cache")
    assert [source.rows for source in data.counts.train] == [90, 8, 8]
    assert [source.dropped for source in data.counts.train[1:]] == [{"nothing to train on": 1}] * 2
    request = make_request([corpus, other, other], data=DataSettings(exact_deduplication=True))
    once = build_sequences(request, tmp_path / "cache").counts.train
    assert once[1].dropped == {"a duplicate": 6, "nothing to train on": 1}


def test_a_data_set_of_duplicates_alone_is_left_out_and_not_an_error(tmp_path, corpus):
    request = make_request([corpus, corpus], data=DataSettings(exact_deduplication=True))
    first, second = build_sequences(request, tmp_path / "cache").counts.train
    assert (second.rows, second.dropped, second.tokens) == (90, {"a duplicate": 90}, 0)
    assert first.tokens > 0


def test_what_is_counted_is_what_is_trained_on(tmp_path):
    rows = [{"instruction": f"say {i}", "output": "the sea " * (i % 9)} for i in range(80)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DatasetSource(path=str(path), type="alpaca")
    data = build_sequences(make_request([source], seq_len=256), tmp_path / "cache")
    (counts,) = data.counts.train
    laid_out = every_row(data.train)
    assert counts.trained_tokens == (laid_out.shift_labels != -100).sum()
    assert counts.tokens == laid_out.lengths.sum()
    assert data.counts.padding_share == pytest.approx(1 - counts.tokens / laid_out.input_ids.size)


def test_other_settings_are_other_sequences(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "say it", "output": "the sea"}) + "\n")
    source = DatasetSource(path=str(path), type="alpaca")
    masked = build_sequences(make_request([source], seq_len=256), tmp_path / "cache")
    request = make_request([source], seq_len=256, data=DataSettings(train_on_inputs=True))
    whole = build_sequences(request, tmp_path / "cache")
    assert whole.counts.train[0].trained_tokens > masked.counts.train[0].trained_tokens
    assert whole.train.digest() != masked.train.digest()


def test_a_tokenizer_without_a_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    request = make_request(
        [DatasetSource(path=str(path), type="chat_template")], config={"vocab_size": 400}
    )
    model = request.model.model_copy(update={"tokenizer": str(tmp_path / "plain")})
    with pytest.raises(AutotuneError, match=r"plain' has no chat template. Set chat_template"):
        build_sequences(request.model_copy(update={"model": model}), tmp_path / "cache")
