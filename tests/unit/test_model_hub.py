import builtins
import json
import os
import sys
import types

import pytest

from autotune.errors import AutotuneError
from autotune.spec.model import hub, load_model

ENVIRONMENT = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME",
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "hub"


def put(cache, hub_id, config, revision="abc"):
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text(json.dumps(config))


def test_cached_config(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put(cache, "someone/Tuned-Llama", load_model("tiny-llama").hf_config)
    model = load_model("someone/Tuned-Llama")
    assert model.name == "Tuned-Llama"
    assert model.weights == model.tokenizer == "someone/Tuned-Llama"
    assert model.num_parameters == load_model("tiny-llama").num_parameters


def test_the_layout_is_that_of_huggingface_hub(cache):
    client = pytest.importorskip("huggingface_hub")
    put(cache, "someone/x", {})
    theirs = client.try_to_load_from_cache("someone/x", "config.json", cache_dir=cache)
    assert theirs == str(hub.find_config("someone/x"))


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_cache_folder(environment, folder, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_folder()) == folder


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_obeyed(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(AutotuneError, match=f"someone/x is neither.*{variable} forbids|TRANSF"):
        load_model("someone/x")


def test_without_huggingface_hub(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AutotuneError, match="needs huggingface_hub: pip install"):
        load_model("someone/x")


class _Http(Exception):
    pass


class _NotFound(_Http):
    pass


class _Gated(_NotFound):
    pass


class _NoEntry(Exception):
    pass


class _NotReached(_NoEntry):
    pass


def test_without_a_network(monkeypatch):
    pytest.importorskip("huggingface_hub")
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that never resolves
    with pytest.raises(AutotuneError, match="the Hub cannot be reached"):
        load_model("someone/x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_Gated(), "is gated: accept its terms"),
        (_NotFound(), "The Hub has no model someone/x"),
        (_NotReached(), "the Hub cannot be reached"),
        (_NoEntry(), "has no config.json"),
        (ValueError("not a repo id"), "cannot be downloaded: not a repo id"),
        (_Http("502 Bad Gateway\nmore"), "cannot be downloaded: 502 Bad Gateway Give a local"),
    ],
)
def test_what_the_hub_answers(error, message, monkeypatch):
    """The classes and their inheritance are those of huggingface_hub 1."""
    client, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")

    def download(hub_id, file, cache_dir):
        assert (hub_id, file, cache_dir) == ("someone/x", "config.json", hub.cache_folder())
        raise error

    client.hf_hub_download = download
    errors.HfHubHTTPError, errors.RepositoryNotFoundError = _Http, _NotFound
    errors.GatedRepoError, errors.EntryNotFoundError = _Gated, _NoEntry
    errors.LocalEntryNotFoundError = _NotReached
    monkeypatch.setattr(hub, "_resolves", lambda: True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    with pytest.raises(AutotuneError, match=message):
        load_model("someone/x")


def test_repositories_whose_weights_are_not_trained():
    with pytest.raises(AutotuneError, match=r"quantised to mxfp4.*in the catalogue: gpt-oss-20b"):
        load_model("openai/gpt-oss-20b")
    with pytest.raises(AutotuneError, match=r"vision tower.*catalogue: gemma-3-4b"):
        load_model("google/gemma-3-4b-pt")
    assert load_model("gemma-3-4b").tokenizer == "google/gemma-3-4b-pt"


@pytest.mark.parametrize("name", ["qwen3-9b", "a/b/c", "-x/y", "org/na me"])
def test_no_hub_id(name):
    with pytest.raises(AutotuneError, match="Unknown model"):
        load_model(name)
