"""What of a machine will stop or slow a training run, each finding with what to do about it."""

from autotune.doctor.finding import Finding, Level, Machine

__all__ = ["Finding", "Level", "Machine"]
