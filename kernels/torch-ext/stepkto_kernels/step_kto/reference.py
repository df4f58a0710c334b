"""The slow truth of step_kto: one completion and one step at a time, ordinary autograd, any floating
dtype."""

import torch
from torch import Tensor


def step_kto(
    logp: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    *,
    kl: float | Tensor = 0.0,
    step_kl: float | Tensor = 0.0,
    beta: float = 0.1,
    step_beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    step_desirable_weight: float = 1.0,
    step_undesirable_weight: float = 1.0,
    outcome_weight: float = 1.0,
    step_weight: float = 1.0,
    step_reduction: str = "mean",
    after_first_error: str = "keep",
    num_completions: float | None = None,
    num_supervised: float | None = None,
) -> dict[str, Tensor]:
    d_N = logp - ref_logp.detach()
    outcome_losses, step_losses, r_B, r_S = [], [], [], []
    steps = list(zip(cu_steps.tolist(), cu_steps.tolist()[1:], step_labels.tolist(), strict=False))
    for start, stop, desirable in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], labels.tolist(), strict=False):
        r = d_N[start:stop].sum()
        r_B.append(r)
        lam = desirable_weight if desirable else undesirable_weight
        v = lam * torch.sigmoid(beta * (r - kl) if desirable else beta * (kl - r))
        outcome_losses.append(lam - v)

        labelled, wrong_before = [], False
        for step_start, step_stop, label in steps:
            if not start <= step_start < stop:
                continue
            r = d_N[step_start:step_stop].sum()
            r_S.append(r)
            if label == -1 or (wrong_before and after_first_error == "mask"):
                continue
            wrong_before |= label == 0
            lam = step_desirable_weight if label == 1 else step_undesirable_weight
            v = lam * torch.sigmoid(step_beta * (r - step_kl) if label == 1 else step_beta * (step_kl - r))
            labelled.append(lam - v)
        if labelled:
            step_losses.append(sum(labelled) / (len(labelled) if step_reduction == "mean" else 1))

    nothing = d_N.sum() * 0  # the graph of an empty batch
    outcome_loss = nothing + sum(outcome_losses) / max(1, num_completions or len(outcome_losses))
    step_loss = nothing + sum(step_losses) / max(1, num_supervised or len(step_losses))
    return {
        "loss": outcome_weight * outcome_loss + step_weight * step_loss,
        "outcome_loss": outcome_loss,
        "step_loss": step_loss,
        "log_ratios": torch.stack(r_B) if r_B else d_N,
        "step_log_ratios": torch.stack(r_S) if r_S else d_N,
    }
