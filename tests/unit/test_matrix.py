"""The matrix of combinations: which are legal, and what the command says of each that is not."""

from __future__ import annotations

import argparse
import json

import pytest

from autotune.cli import train as cli_train
from autotune.config import load_config
from autotune.emit.axolotl import emit_axolotl
from autotune.errors import AutotuneError
from autotune.spec.training import DatasetSource
from tests.integration.matrix import MODEL, STRATEGIES, covering, every_case, pairs_of
from tests.integration.ranks import small_config

CASES = every_case((1, 2, 3, 4, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(small_config()))
    (folder / "a.txt").write_text("words\n")
    return folder


def request_of(case, folder):
    """Do all that `train` does of a case's file before it starts ranks."""
    file = folder / "case.yml"
    source = DatasetSource(path=str(folder / "a.txt"), type="completion")
    text = emit_axolotl(
        MODEL, case.workload, case.plan, datasets=[source], base_model=str(folder / "model"),
        output_dir=str(folder / "out"),
    )  # fmt: skip
    file.write_text(text)
    parser = argparse.ArgumentParser()
    cli_train.add_arguments(parser)
    args = parser.parse_args([str(file), "--gpus", str(case.world), "--device", "cpu"])
    return cli_train._request(args, load_config(file))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_command_takes_what_is_legal_and_refuses_all_else_with_its_code(strategy, folder):
    legal = refused = 0
    for case in (case for case in CASES if case.strategy == strategy):
        codes = case.broken()
        if codes:
            refused += 1
            with pytest.raises(AutotuneError, match=r"\[AT\d+\]") as caught:
                request_of(case, folder)
            assert any(f"[{code}]" in str(caught.value) for code in codes), (case, caught.value)
            assert caught.value.exit_code == 2
        else:
            legal += 1
            # All that is illegal; of what is legal a part, for the time.
            if legal > 3 and legal % 7:
                continue
            request = request_of(case, folder)
            # The file names a strategy by what it shards; all else is the plan's.
            assert request.plan | {"strategy": case.strategy} == case.plan.to_dict()
        assert not (folder / "out").exists()
    assert legal and refused


def test_few_cases_hold_every_pair():
    legal = [case for case in CASES if not case.broken() and case.cp <= 2]
    chosen = covering(legal)
    assert len(chosen) <= 18 and chosen == covering(legal)
    wanted = set().union(*map(pairs_of, legal))
    assert set().union(*map(pairs_of, chosen)) == wanted
    assert {case.attention for case in chosen} == {"plain", "packed"}
