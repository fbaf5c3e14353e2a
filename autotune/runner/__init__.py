"""What runs inside the ranks: the only folder that may import torch.

Nobody imports it; a rank is ``python -m autotune.runner REQUEST.json``, started by
`autotune.trial.launch`, or a fork of ``python -m autotune.runner.server``, which
`autotune.trial.forkserver` starts. It answers in ``rank-<n>.result.json`` beside the request.
"""
