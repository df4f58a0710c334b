"""LLaMA-Factory's KTO trainer on our LM head.

Before `run_exp()` (a script in the place of `llamafactory-cli train`), two lines:

    from stepkto_fast.integrations.llamafactory import patch
    patch()

`CustomKTOTrainer.forward` then sums log-probs straight from hidden states, of the labelled tokens alone, for policy,
reference and mismatched completions alike. Loss, metrics and options stay LLaMA-Factory's.

Its other hook, `compute_loss_func` of the SFT trainer, gets logits that exist already: there is nothing to save there.
"""

from typing import Any, Literal

import torch
from stepkto_kernels import linear_logp
from torch import Tensor, nn

from . import require
from .head_call import scoring

SUPPORTED = "==0.9.5"
IGNORED = -100
OF_PREFIX = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
OF_BATCH = ("pixel_values", "image_sizes", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")


def patch() -> None:
    """Gives `CustomKTOTrainer` our forward. Raises ImportError unless a supported llamafactory is installed."""
    require("llamafactory", SUPPORTED, "stepkto_fast.integrations.llamafactory")
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    CustomKTOTrainer.forward = forward


def forward(
    trainer: object, model: nn.Module, batch: dict[str, Any], prefix: Literal["", "kl_"] = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """`CustomKTOTrainer.forward`.

    Args:
        model: the policy or the reference, as the trainer holds it.
        batch: `{prefix}input_ids`, `{prefix}attention_mask` and `{prefix}labels` (B, L), -100 where not scored; images.

    Returns:
        (logits, logps, logps_avg): of the labels of each completion the sum of log-probs and their mean, (B,) fp32 in
        nats. In the place of logits (B, L) fp32: their sum over the vocabulary at each position, which is all the
        trainer's metrics ask for; NaN for a model with a softcap.

    Raises:
        ValueError: labels do not have the shape of input_ids, or the head cannot be used (see `head_call.scoring`).
    """
    labels, input_ids = batch[f"{prefix}labels"], batch[f"{prefix}input_ids"]
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"{prefix}labels has shape {tuple(labels.shape)}; expected {tuple(input_ids.shape)}, that of input_ids"
        )
    target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    scored = target.flatten() != IGNORED

    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
        options: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
        logp = linear_logp(hidden[scored], weight, target.flatten()[scored], **options)
        with torch.no_grad():  # products and sums that autocast leaves in fp32
            logits_sum = (hidden * weight.sum(0, dtype=torch.float32)).sum(1)
            if bias is not None:
                logits_sum += bias.sum(dtype=torch.float32)
            logits_sum *= logit_scale if softcap is None else torch.nan
        return torch.stack([logits_sum, torch.zeros_like(logits_sum).masked_scatter(scored, logp)], dim=1)

    inputs = {name: batch[prefix + name] for name in OF_PREFIX if prefix + name in batch}
    inputs |= {name: batch[name] for name in OF_BATCH if name in batch}
    with scoring(model, score) as scores:
        model(**inputs, return_dict=True, use_cache=False)
    logits_sum, logp = scores[0].unbind(-1)
    logps = logp.sum(1)
    return logits_sum.detach(), logps, logps / (target != IGNORED).sum(1)
