"""The two heads that read a trunk's states and give one calibrated logit a step.

`AttentionHead` (prm_pooling attention): every token of a step enters as (the hidden state that predicted it, the
embedding of the token that was written, its log-prob, the entropy of its prediction); a two-layer MLP mixes these, a
learned softmax pools the step's tokens, one logit comes out. The state that predicted a result knows what should have
been written, the embedding what was: together they tell.

`LastTokenHead` (prm_pooling last): a linear layer on the hidden state of the step's last token, as in a
token-classification model. Small trunks do not look back at what they wrote unless they are trained to, so on them it
needs prm_trunk trained; it is the head that can be exported.
"""

import math
from typing import ClassVar

import torch
from stepkto_kernels import linear_logp_entropy
from torch import Tensor, nn
from transformers import PreTrainedModel

from .packing import PackedBatch
from .policy import decoder_states, head, hidden_states


class PRMHead(nn.Module):
    """What both heads share: standardised features in, and the calibration of the logits that come out.

    mean, std (F,) standardise the F features; scale and shift () are Platt's; threshold () is the probability from
    which a step counts as right.
    """

    pooling: ClassVar[str]
    mean: Tensor
    std: Tensor
    scale: Tensor
    shift: Tensor
    threshold: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("threshold", torch.tensor(0.5))

    @staticmethod
    def read(trunk: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
        """The features (rows, F) fp32 that the head takes of a batch; differentiable in the trunk's states."""
        raise NotImplementedError

    def raw(self, x: Tensor, cu_steps: Tensor) -> Tensor:
        """Standardised features -> uncalibrated logits (S,)."""
        raise NotImplementedError

    def forward(self, features: Tensor, cu_steps: Tensor) -> Tensor:
        """What `read` gave of a batch, and its cu_steps (S + 1,) int32 -> logits (S,) of "this step is right"."""
        return self.scale * self.raw((features - self.mean) / self.std, cu_steps) + self.shift


class AttentionHead(PRMHead):
    """Features (N, 2 D + 2) of the N scored tokens; see the module's text."""

    pooling = "attention"

    def __init__(self, hidden_size: int, width: int = 128):
        features = 2 * hidden_size + 2
        super().__init__(features)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.pool = nn.Linear(width, 1)
        self.out = nn.Linear(width, 1)

    @staticmethod
    def read(trunk: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
        """(N, 2 D + 2). Log-prob and entropy, at `temperature`, carry no gradient."""
        hidden = hidden_states(trunk, batch)
        with torch.no_grad():
            logp, entropy = linear_logp_entropy(hidden, target=batch.target, temperature=temperature, **head(trunk))
        written = trunk.get_input_embeddings()(batch.target)
        return torch.cat([hidden.float(), written.float(), logp[:, None], entropy[:, None]], dim=1)

    def raw(self, x: Tensor, cu_steps: Tensor) -> Tensor:
        u_NW = self.mlp(x)
        lengths_S = cu_steps.diff().long()
        step_N = torch.repeat_interleave(torch.arange(len(lengths_S), device=x.device), lengths_S)
        score_N = self.pool(u_NW)[:, 0]
        top_S = score_N.new_full((len(lengths_S),), -math.inf).scatter_reduce(0, step_N, score_N.detach(), "amax")
        e_N = (score_N - top_S[step_N]).exp()
        share_N = e_N / e_N.new_zeros(len(lengths_S)).index_add(0, step_N, e_N)[step_N]
        pooled_SW = u_NW.new_zeros(len(lengths_S), u_NW.shape[1]).index_add(0, step_N, share_N[:, None] * u_NW)
        return self.out(pooled_SW)[:, 0]


class LastTokenHead(PRMHead):
    """Features (S, D): the state of each step's last token, which has read that token."""

    pooling = "last"

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    @staticmethod
    def read(trunk: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
        """(S, D). `temperature` plays no part."""
        # Row n predicts scored token n; the token itself stands one further.
        last_S = batch.rows[batch.cu_steps[1:].long() - 1] + 1
        return decoder_states(trunk, batch).index_select(0, last_S).float()

    def raw(self, x: Tensor, cu_steps: Tensor) -> Tensor:
        """`cu_steps` plays no part: each row is a step."""
        return self.out(x)[:, 0]


HEADS: dict[str, type[AttentionHead] | type[LastTokenHead]] = {h.pooling: h for h in (AttentionHead, LastTokenHead)}
