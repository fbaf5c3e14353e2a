"""Build DeepSpeed operators: ``python -m autotune.runner.native_ops '["CPUAdamBuilder"]'``."""

from __future__ import annotations

import json
import sys

from autotune.runner.answer import die_with_parent


def main() -> None:
    """Load each named builder, which compiles it on first use."""
    die_with_parent()
    from deepspeed.accelerator import get_accelerator

    for name in json.loads(sys.argv[1]):
        get_accelerator().create_op_builder(name).load()


if __name__ == "__main__":
    main()
