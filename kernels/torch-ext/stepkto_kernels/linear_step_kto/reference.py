"""The slow truth of linear_step_kto and linear_step_kto_exact: the other truths, one after the other."""

from typing import Any

import torch
from torch import Tensor

from ..linear_logp.reference import linear_logp
from ..linear_logp_kl.reference import linear_logp_kl
from ..reference_points.reference import reference_points
from ..step_kto.reference import step_kto


def linear_step_kto(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    *,
    ignore_index: int = -100,
    head: dict[str, Any],
    objective: dict[str, Any],
) -> dict[str, Tensor]:
    logp_N = linear_logp(hidden, weight, target, ignore_index=ignore_index, **head)
    ref_logp_N = torch.where(target == ignore_index, 0, ref_logp)
    return step_kto(logp_N, ref_logp_N, cu_seqlens, cu_steps, labels, step_labels, **objective) | {"logp": logp_N}


def linear_step_kto_exact(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    *,
    head: dict[str, Any],
    objective: dict[str, Any],
) -> dict[str, Tensor]:
    logp_N, ref_logp_N, kl_N = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target, **head)
    outcome_sum, completions, step_sum, steps = reference_points(kl_N, cu_seqlens, cu_steps)
    kl, step_kl = outcome_sum.clamp(min=0) / max(1, completions), step_sum.clamp(min=0) / max(1, steps)
    points = {"kl": kl, "step_kl": step_kl}
    options = points | objective
    results = step_kto(logp_N, ref_logp_N, cu_seqlens, cu_steps, labels, step_labels, **options)
    return results | points | {"logp": logp_N}
