"""One rank that runs trials as they are and writes down what the tests ask of them.

`python -m tests.integration.trial_worker REQUEST.json...` runs each request in a child that shares
the imports. Beside each request it leaves the rank's result file, and in `seen.json` the gradient
norms of every step before clipping, by micro batch and accumulation: ``{"4x1": [...]}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

from autotune.runner import trial
from autotune.runner.answer import Answer
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.training import TrainSettings
from autotune.trial.protocol import Request, read_message

SEEN_FILE = "seen.json"


def watch_gradient_norms() -> dict[str, list[float]]:
    """Return a dictionary that fills as the trainer's steps go by."""
    norms: dict[str, list[float]] = defaultdict(list)
    read_norm = AutotuneTrainer._get_grad_norm

    def watched(self: AutotuneTrainer, *args: Any, **kwargs: Any) -> Any:
        norm = read_norm(self, *args, **kwargs)
        batch, steps = self.loader._loader.batch_size, self.args.gradient_accumulation_steps
        norms[f"{batch}x{steps}"].append(float(norm))
        return norm

    AutotuneTrainer._get_grad_norm = watched  # type: ignore[method-assign]
    return norms


def run_one(request_file: Path) -> None:
    folder = request_file.parent
    os.environ["AUTOTUNE_LAUNCH_DIR"] = str(folder)
    request = read_message(Request, request_file)
    # The weights stay where they are, so that every step's gradient can be compared with another's.
    trial._SETTINGS = TrainSettings(learning_rate=1e-30, lr_scheduler="constant")
    norms = watch_gradient_norms()
    answer = Answer(request)
    trial.run_trial(request, answer)
    answer.finish()
    (folder / SEEN_FILE).write_text(json.dumps({"gradient_norms": norms}))


def main() -> None:
    import deepspeed  # noqa: F401  (once, before the children)

    for name in sys.argv[1:]:
        child = os.fork()
        if not child:
            try:
                run_one(Path(name))
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)  # whether it went well is read from what it wrote
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
