"""Exports given to the tools themselves; `make conformance` installs them first."""
