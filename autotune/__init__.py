"""autotune: find the fastest multi-GPU training configuration that fits, and train with it."""

__version__ = "0.1.0"
