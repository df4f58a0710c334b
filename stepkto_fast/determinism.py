"""The same bits in every run: what `deterministic: true` asks of torch.

Seeds are not set here: everything random in a run draws from a seed of its own, derived from the recipe's.
"""

import os

import torch

# The two sizes with which cuBLAS promises the same result in every run (the manual's section on reproducibility).
WORKSPACES = (":4096:8", ":16:8")


def make_deterministic() -> None:
    """Only algorithms that give the same bits on the same machine; where an operation has none, torch raises.

    Call it before the first CUDA operation, since cuBLAS reads its setting when it starts. Memory that an operation
    leaves unfilled holds NaN from then on instead of what was there before. May be called again.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # set on its class
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
