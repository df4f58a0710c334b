"""torchtitan's loss on our LM head.

In a model's config registry, in the place of `loss=ChunkedLossWrapper.Config(...)`:

    loss=stepkto_fast.integrations.torchtitan.loss_config(),

The trainer sees a chunked loss: it makes the model return hidden states and hands us its `lm_head`. Nothing is cut
into chunks, so the number of tokens need not be a multiple of anything.
"""

from dataclasses import dataclass
from typing import Any

from stepkto_kernels import linear_logp
from torch import Tensor, nn

from . import require
from .head_call import check_weight, computing, plain_linear

SUPPORTED = "==0.3.*"
REMEDY = "use data parallelism only (tensor_parallel_degree=1), or its full_tensor()"


class LinearCrossEntropyLoss:
    """Cross-entropy from hidden states, with the calls of `torchtitan.components.loss.ChunkedLossWrapper`."""

    def __init__(self) -> None:
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The model's head, which the trainer hands over once."""
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over tokens of -log p(label), fp32, divided by `global_valid_tokens` if given; and no metrics.

        Args:
            pred: (T, D) or (B, L, D) hidden states, of a model that skips its head.
            labels: (T,) or (B, L) int64; -100 does not count.
            global_valid_tokens: 0-d, the number of tokens of the whole batch that count.
            loss_inputs: per-token inputs of other losses; not used, as in torchtitan's cross-entropy.

        Raises:
            RuntimeError: called before `set_lm_head`.
            ValueError: the head is no nn.Linear with a plain (V, D) weight, or shapes do not match.
        """
        if self.lm_head is None:
            raise RuntimeError("the loss has no head yet: call set_lm_head(model.lm_head) first")
        head = plain_linear("lm_head", self.lm_head)
        if labels.shape != pred.shape[:-1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(pred.shape[:-1])}, as pred")

        def score(hidden: Tensor) -> Tensor:
            check_weight(head.weight, hidden, REMEDY)
            return linear_logp(hidden.flatten(0, -2), head.weight, labels.flatten(), bias=head.bias)

        with computing(head, score):  # called as a module, so that FSDP gathers its weight
            loss = -head(pred).sum()
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


def loss_config() -> Any:
    """The config that builds the loss, for `Trainer.Config(loss=...)`.

    Raises ImportError unless a supported torchtitan is installed.
    """
    require("torchtitan", SUPPORTED, "stepkto_fast.integrations.torchtitan")
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

    ChunkedLossWrapper.register(LinearCrossEntropyLoss)

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        def build(self, *, compile_config: object = None) -> LinearCrossEntropyLoss:
            return LinearCrossEntropyLoss()

    return Config()
