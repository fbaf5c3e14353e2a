"""Measuring a machine's speed, keeping what was measured, and learning from finished trials."""
