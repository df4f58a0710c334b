"""Kernels for Step-KTO: log-probabilities under an LM head without stored logits, and the objective.

Everything is packed: N scored tokens of B completions and S steps, no padding; D is the hidden size, V the
vocabulary.
Tensors in, tensors out: this package needs torch and knows nothing of training.
"""

from .backends import backend
from .linear_logp.op import linear_logp, linear_logp_entropy
from .linear_logp_kl.op import LogpKL, linear_logp_kl
from .linear_logp_parallel.op import linear_logp_entropy_parallel, linear_logp_parallel
from .linear_logp_stats.op import LogpStats, linear_logp_stats
from .linear_step_kto.op import linear_step_kto, linear_step_kto_exact
from .reference_points.op import ReferencePoints, reference_points
from .routing import Routing, watch
from .step_kto.op import StepKTOOutput, step_kto

__version__ = "0.1.0"

__all__ = [
    "LogpKL",
    "LogpStats",
    "ReferencePoints",
    "Routing",
    "StepKTOOutput",
    "backend",
    "linear_logp",
    "linear_logp_entropy",
    "linear_logp_entropy_parallel",
    "linear_logp_kl",
    "linear_logp_parallel",
    "linear_logp_stats",
    "linear_step_kto",
    "linear_step_kto_exact",
    "reference_points",
    "step_kto",
    "watch",
]
