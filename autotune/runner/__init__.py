"""What runs inside the ranks: the only folder that may import torch.

Nobody imports it; `autotune.trial.launch` starts it as ``python -m autotune.runner REQUEST.json``
once a rank, and it answers in ``rank-<n>.result.json`` beside the request.
"""
