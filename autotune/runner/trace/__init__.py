"""Trace what a model's own code allocates: the real code, with tensors that hold no values.

`python -m autotune.runner.trace` reads a config and trace keys and answers with
`autotune.memory.profile.ActivationProfile`s.
"""
