"""The signs of CUDA in a process's mappings, and the environment it shows to others."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from autotune.runner.mappings import resident_file_pages, touched_cuda  # noqa: E402
from autotune.trial.processes import tagged_processes  # noqa: E402


def mapped(path: Path) -> mmap.mmap:
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize(
    ("names", "touched"),
    [
        (["libcuda.so.550.1", "nvidia-uvm"], True),
        (["libcuda.so.1", "nvidia0"], True),
        (["libcuda.so.1"], False),  # a dependency, not yet used
        (["libnvidia-ml.so.1", "nvidiactl"], False),  # GPUs are counted
        (["libcudart.so.12", "nvidia0"], False),
    ],
)
def test_cuda_is_seen_in_what_is_mapped(names: list[str], touched: bool, tmp_path: Path) -> None:
    assert not touched_cuda()
    kept = [mapped(tmp_path / name) for name in names]
    assert touched_cuda() is touched
    for one in kept:
        one.close()
    assert not touched_cuda()


def test_resident_pages_of_files_are_found(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(b"x" * 64 * mmap.PAGESIZE)

    def pages() -> int:
        return sum(end - first for first, end in resident_file_pages()) // mmap.PAGESIZE

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view.madvise(mmap.MADV_RANDOM)
        before = pages()
        assert sum(view[place * mmap.PAGESIZE] for place in range(64))
        assert pages() >= before + 64


def test_a_process_shows_the_environment_it_is_told_to(tmp_path: Path) -> None:
    """Longer than the room there is: what was named first is kept."""
    script = (
        "import os, sys\n"
        "from autotune.runner.mappings import show_environment\n"
        "told = {f'X{n}': 'y' * 100 for n in range(200)} | {'AUTOTUNE_TRIAL_ID': sys.argv[1]}\n"
        "os.environ.clear(); os.environ.update(told)\n"
        "show_environment(told, ['AUTOTUNE_TRIAL_ID'])\n"
        "assert os.environ['X7'] == 'y' * 100\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    tag = f"shown-{tmp_path}"
    with subprocess.Popen(
        [sys.executable, "-c", script, tag], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        assert tagged_processes("AUTOTUNE_TRIAL_ID", tag) == [process.pid]
        process.stdin.close()
