"""torchtune's linear losses on our LM head, for its fine-tuning recipes.

In the recipe's YAML, in the place of `torchtune.modules.loss.LinearCrossEntropyLoss`:

    loss:
      _component_: stepkto_fast.integrations.torchtune.linear_cross_entropy_loss

The recipe calls `set_model_output(model)` once, which makes the model return hidden states, and then the loss on those.
"""

from typing import Any

from stepkto_kernels import linear_logp
from torch import Tensor, nn

from . import require
from .head_call import check_weight, computing, mean_nll, plain_linear

SUPPORTED = ">=0.7.0.dev0,<0.8"
REMEDY = "use data parallelism only (tensor_parallel_dim=1), or its full_tensor()"


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy from hidden states: what `torchtune.modules.loss.SFTLoss` asks for.

    Args:
        ignore_index: targets that do not count.
        filter_eps: of `stepkto_kernels.linear_logp`; 0 is the exact gradient.
    """

    def __init__(self, ignore_index: int = -100, filter_eps: Any = "auto"):
        super().__init__()
        self.options = {"ignore_index": ignore_index, "filter_eps": filter_eps}
        self.linear_projection: Any = None

    def set_model_output(self, model: Any) -> None:
        """Takes the model's output projection, and makes the model skip it."""
        model.skip_output_layer = True
        # not as a submodule: the loss has no parameters of its own
        vars(self)["linear_projection"] = model.output

    def apply_compile_strategy(self, *args: object, **kwargs: object) -> "LinearCrossEntropyLoss":
        """Nothing to compile: the head and the loss are one kernel."""
        return self

    @property
    def tp_requires_loss_parallel_ctx_manager(self) -> bool:
        return False

    def patch_tp_plan(self, tp_plan: dict) -> dict:
        """Raises ValueError: this loss has no tensor-parallel form."""
        raise ValueError(f"the tensor-parallel plan {sorted(tp_plan)} reaches the loss; expected none: {REMEDY}")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over counted targets of -log p(target), fp32; 0 if none counts.

        Args:
            outputs: (B, L, D), the hidden states that the model returns now.
            targets: (B, L) int64.

        Raises:
            RuntimeError: called before `set_model_output`.
            ValueError: the projection has no plain (V, D) weight, or shapes do not match.
        """
        projection = self.linear_projection
        if projection is None:
            raise RuntimeError("the loss has no output projection yet: call set_model_output(model) first")
        # torchtune's TiedLinear calls a module of its own with the embedding's weight
        tied = hasattr(projection, "tied_module")
        module = projection.linear if tied else plain_linear("model.output", projection)
        if targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; expected {tuple(outputs.shape[:-1])}, as outputs"
            )
        target = targets.flatten()

        def score(hidden: Tensor, weight: Tensor | None = None) -> Tensor:
            weight = module.weight if weight is None else weight
            check_weight(weight, hidden, REMEDY)
            bias = getattr(module, "bias", None)
            return linear_logp(hidden.flatten(0, -2), weight, target, bias=bias, **self.options)

        with computing(module, score):
            return mean_nll(projection(outputs), target, self.options["ignore_index"])


def linear_cross_entropy_loss(ignore_index: int = -100, filter_eps: Any = "auto") -> LinearCrossEntropyLoss:
    """The loss as a component of torchtune's recipes, which know it as an `SFTLoss`.

    Raises ImportError unless a supported torchtune is installed.
    """
    require("torchtune", SUPPORTED, "stepkto_fast.integrations.torchtune")
    from torchtune.modules.loss import SFTLoss

    SFTLoss.register(LinearCrossEntropyLoss)
    return LinearCrossEntropyLoss(ignore_index, filter_eps)
