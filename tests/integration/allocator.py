"""What PyTorch's CPU allocator hands out while something runs, by the profiler's account."""

import pytest

torch = pytest.importorskip("torch")


def allocator_peak(run):
    """Return the largest sum of live CPU allocations while `run` runs, above what was there."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
