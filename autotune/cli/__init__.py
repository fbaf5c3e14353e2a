"""The command line: one thin module a verb, imported only when that verb runs.

Each verb module has ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code). Exit codes:
0 done, 1 nothing fits or the run failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Sequence

from autotune import __version__
from autotune.errors import AutotuneError, nearest

VERBS = {
    "search": ("autotune.cli.search", "measure configurations on the GPUs here, write best.yml"),
    "train": ("autotune.cli.train", "run the training a configuration describes"),
    "merge": ("autotune.cli.merge", "add a trained adapter to its base's weights"),
    "plan": ("autotune.cli.plan", "rank configurations by prediction; no GPU needed"),
    "estimate": ("autotune.cli.estimate", "predict memory and time of one configuration"),
    "capacity": ("autotune.cli.capacity", "which GPUs, how many, how long, at what cost"),
    "doctor": ("autotune.cli.doctor", "what this machine has, and how fast it is"),
    "migrate": ("autotune.cli.migrate", "turn a configuration from FSDP1 to FSDP2"),
    "fetch": ("autotune.cli.fetch", "copy the shipped DeepSpeed presets into a folder"),
    "explain": ("autotune.cli.explain", "what a rule's code means and what to do about it"),
    "export": ("autotune.cli.export", "write a configuration's plan in another tool's words"),
    "import": ("autotune.cli.import_", "read an accelerate, DeepSpeed or Axolotl configuration"),
    "report": ("autotune.cli.report", "write the CSV and HTML of a search again"),
}
_TRAIN_EXTRA = frozenset(
    {"torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "optuna", "scipy",
     "tokenizers", "tensorboard", "safetensors", "pynvml"}
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit; a user's mistake prints one message and no traceback."""
    sys.exit(_guarded(sys.argv[1:] if argv is None else list(argv)))


def _guarded(argv: list[str]) -> int:
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except AutotuneError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError as error:
        if not _reader_is_gone():  # another pipe: to a process that ended, say
            return _internal_error(error)
        # The reader had enough. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_EXTRA:
            return _internal_error(error)
        return _fail(f"this needs {error.name}: pip install 'autotune-llm[train]'", 2)
    except Exception as error:  # the process edge: anything else is a bug of ours
        explained = _explain_validation(error)
        return _fail(explained, 2) if explained else _internal_error(error)


def _reader_is_gone() -> bool:
    """Say whether nobody reads what is written to stdout or stderr any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it has no descriptor, as in a test
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(argv: list[str]) -> int:
    verb = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="autotune",
        description="Find the fastest LLM training configuration that fits, and train with it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"autotune {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    if verb is not None and verb not in VERBS:
        raise AutotuneError(
            f"Unknown verb {verb!r}.{nearest(verb, VERBS)} Known: {', '.join(VERBS)}."
        )
    module = importlib.import_module(VERBS[verb][0]) if verb else None
    for name, (_, summary) in VERBS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, allow_abbrev=False
        )
        if module and name == verb:
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    _log_to_stderr()
    code: int = module.run(args) if module else 0
    return code


class _ToStderr(logging.Handler):
    """Writes to what stderr is at that moment, as every other message does."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _log_to_stderr() -> None:
    logger = logging.getLogger("autotune")
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("autotune: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"autotune: {message}\n")
    return code


def _explain_validation(error: Exception) -> str | None:
    """Return one line for a pydantic error in a file or flag of the user's, else None."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    problems = (
        f"{'.'.join(map(str, p['loc'])) or error.title}: {p['msg']} (given: {p['input']!r})"
        for p in error.errors()
    )
    return f"bad {error.title}: {'; '.join(problems)}"


def _internal_error(error: BaseException) -> int:
    with tempfile.NamedTemporaryFile(
        "w", prefix="autotune-error-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    return _fail(f"internal error: {error} (traceback in {file.name})", 1)
