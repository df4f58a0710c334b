"""stepkto-fast: train language models on step-level binary feedback (Step-KTO).

The engine: rollouts, outcome checks, step labels, packed Step-KTO updates, weight sync, evaluation. The kernels live
in the package `stepkto_kernels`, which knows nothing of training. Start with `python -m stepkto_fast.train`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: this package is to be importable with torch alone.
_LATER = {
    "patch_lm_head": ".integrations.transformers",
    "unpatch_lm_head": ".integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
