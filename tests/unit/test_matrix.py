"""The matrix of combinations: which are legal, and what the command says of each that is not."""

from __future__ import annotations

import argparse
import json
from collections import Counter

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


def test_the_command_takes_every_legal_one_and_refuses_every_other_with_its_code(folder, caplog):
    legal, seen = Counter(), Counter()
    for case in CASES:
        codes = case.broken()
        seen[case.strategy] += not codes
        # All that is illegal; of what is legal a part, for the time.
        if not codes and seen[case.strategy] > 3 and seen[case.strategy] % 7:
            continue
        if codes:
            with pytest.raises(AutotuneError, match=r"\[AT\d+\]") as caught:
                request_of(case, folder)
            assert any(f"[{code}]" in str(caught.value) for code in codes), (case, caught.value)
            assert caught.value.exit_code == 2
        else:
            legal[case.strategy] += 1
            request = request_of(case, folder)
            # The file names a strategy by what it shards; all else is the plan's.
            assert request.plan | {"strategy": case.strategy} == case.plan.to_dict()
        assert not (folder / "out").exists()
    assert set(legal) == set(STRATEGIES) and min(legal.values()) >= 1
    assert sum(legal.values()) < len(CASES)


def test_few_cases_hold_every_pair():
    legal = [case for case in CASES if not case.broken() and case.cp <= 2]
    chosen = covering(legal)
    assert len(chosen) <= 18 and chosen == covering(legal)
    wanted = set().union(*map(pairs_of, legal))
    assert set().union(*map(pairs_of, chosen)) == wanted
    assert {case.attention for case in chosen} == {"plain", "packed"}
