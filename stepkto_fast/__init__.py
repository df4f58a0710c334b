"""stepkto-fast: train language models on step-level binary feedback (Step-KTO).

The engine: rollouts, outcome checks, step labels, packed Step-KTO updates, weight sync, evaluation. The kernels live
in the package `stepkto_kernels`, which knows nothing of training. Start with `python -m stepkto_fast.train`.
"""

__version__ = "0.1.0"
