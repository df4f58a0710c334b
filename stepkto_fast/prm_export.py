"""A PRM as a token-classification model: what TRL trains, and what transformers and vLLM's pooling load.

The model's `score` layer gives two logits a token, those of "wrong" and "right"; at the last token of each step their
softmax is the PRM's probability. The head's standardisation and calibration are folded into its weights:

    logit = scale (w . (h - mean) / std + b) + shift = w' . h + b',   scores = (-logit / 2, logit / 2)
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from .errors import RunError
from .prm import PRM
from .prm_head import LastTokenHead

ID2LABEL = {0: "wrong", 1: "right"}


def require_exportable(pooling: str) -> None:
    """RunError for a `prm_pooling` that is not linear in one token's state."""
    if pooling != LastTokenHead.pooling:
        raise RunError(
            f"a PRM head with prm_pooling {pooling} reads all tokens of a step and cannot be exported as a "
            "token-classification model: fit one with prm_pooling last (and prm_trunk trained)"
        )


@torch.no_grad()
def export_token_classifier(prm: PRM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `*ForTokenClassification` of the trunk's family, with its tokenizer, into `folder` (safetensors, fp32).

    config.json also gets `prm_threshold`, the calibrated probability from which a step is right. Raises RunError for a
    head that is not linear and for a family that has no such model.
    """
    head = prm.head
    require_exportable(head.pooling)
    assert isinstance(head, LastTokenHead)
    config = type(prm.trunk.config).from_dict(
        {**prm.trunk.config.to_dict(), "id2label": ID2LABEL, "label2id": {v: k for k, v in ID2LABEL.items()}}
    )
    config.prm_threshold = float(head.threshold)
    try:
        with torch.device("meta"):  # its weights are the trunk's own
            model = AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise RunError(
            f"transformers has no token-classification model of the family {config.model_type!r}: {error}"
        ) from error
    trunk = prm.trunk.get_decoder()
    if not isinstance(model.base_model, type(trunk)) or not isinstance(getattr(model, "score", None), nn.Linear):
        raise RunError(
            f"{type(model).__name__} has no linear layer `score` on a {type(trunk).__name__}: this family cannot be "
            "exported"
        )
    weight = head.scale * head.out.weight[0] / head.std
    bias = head.scale * (head.out.bias[0] - (head.out.weight[0] * head.mean / head.std).sum()) + head.shift
    score = nn.Linear(len(weight), 2, device=weight.device)
    score.weight.copy_(torch.stack([-weight / 2, weight / 2]))
    score.bias.copy_(torch.stack([-bias / 2, bias / 2]))
    setattr(model, model.base_model_prefix, trunk)
    model.score = score
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
