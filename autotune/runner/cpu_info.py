"""What the processor can do, asked once: `ask_cpu_once`."""

from __future__ import annotations

import functools


@functools.cache
def ask_cpu_once() -> None:
    """Ask py-cpuinfo now, and let every later caller have this answer.

    DeepSpeed's builder of CPU Adam asks twice in every rank that loads it. Each time py-cpuinfo
    starts an interpreter to probe the processor, most of what such a forked rank's start took.
    """
    import cpuinfo

    asked_once = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info = asked_once
    asked_once()
