"""Write a corpus of signature and docstring pairs from the running Python's standard library.

    python benchmarks/build_corpus.py --out corpus.jsonl [--format completion|alpaca|chat]

A real text that every machine with Python has, under the PSF licence, without a download. The same
Python gives the same file, byte for byte. CPython 3.11.7 has 10,549 different pairs; 2,525 of them
are in test packages, which not every distribution ships.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_QUESTION = "Write the docstring of this Python {kind}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    kind: str
    signature: str
    """Such as ``def textwrap.dedent(text):``."""
    docstring: str

    def row(self, style: str) -> dict[str, object]:
        question = _QUESTION.format(kind=self.kind)
        if style == "completion":
            return {"text": f'{self.signature}\n    """{self.docstring}"""\n'}
        if style == "alpaca":
            return {"instruction": question, "input": self.signature, "output": self.docstring}
        return {
            "messages": [
                {"role": "user", "content": f"{question}\n\n{self.signature}"},
                {"role": "assistant", "content": self.docstring},
            ]
        }


def library_pairs(root: Path) -> list[Pair]:
    """Return the different pairs below `root`, in the order of file name and line."""
    pairs: dict[Pair, None] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_THE_LIBRARY.isdisjoint(relative.parts):
            pairs.update(dict.fromkeys(_file_pairs(path, relative)))
    return list(pairs)


def _file_pairs(path: Path, relative: Path) -> Iterator[Pair]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Old escape sequences in the library's own strings.
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # The library keeps broken files on purpose, to test its tools on.
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    yield from _definitions(tree, module)


def _definitions(node: ast.AST, owner: str) -> Iterator[Pair]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _Definition):
            yield from _definitions(child, owner)
            continue
        name = f"{owner}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring and docstring.strip():
            yield Pair(
                kind="class" if isinstance(child, ast.ClassDef) else "function",
                signature=_signature(child, name),
                docstring=docstring.strip(),
            )
        yield from _definitions(child, name)


def _signature(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {name}({bases}):" if bases else f"class {name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){returns}:"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--format", choices=["completion", "alpaca", "chat"], default="completion", dest="style"
    )
    parser.add_argument("--min-pairs", type=int, default=0, help="fail when there are fewer")
    options = parser.parse_args(arguments)
    pairs = library_pairs(Path(sysconfig.get_path("stdlib")))
    if len(pairs) < options.min_pairs:
        print(
            f"This Python's library has {len(pairs)} pairs, fewer than {options.min_pairs}.",
            file=sys.stderr,
        )
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for pair in pairs:
            print(json.dumps(pair.row(options.style), ensure_ascii=False), file=file)
    print(f"{options.out}: {len(pairs)} pairs, {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
