"""verl's fused LM head on our kernels.

`linear_cross_entropy` has the signature, shapes and conventions of `verl.utils.kernel.linear_cross_entropy`; `patch()`
puts it there. verl calls it with

    actor_rollout_ref:
      model:
        use_fused_kernels: True
        fused_kernel_options: {impl_backend: triton}

from the forwards of the FSDP engines (`verl/models/transformers/`) and of Megatron (`verl/models/mcore/`). Its workers
are processes of their own: put the two lines

    from stepkto_fast.integrations.verl import patch
    patch()

into a module on their path, say `use_stepkto.py`, and name it in `actor_rollout_ref.model.external_lib` or in the
environment variable VERL_USE_EXTERNAL_MODULES.

Unlike verl's, it runs on CPU too, takes every D and V, and gives rows labelled -100 0 and no gradient.
"""

import sys
from typing import Any, Literal

import torch
import torch.distributed as dist
from stepkto_kernels import linear_logp_entropy, linear_logp_entropy_parallel
from torch import Tensor

from . import require
from .head_call import check_weight

SUPPORTED = "==0.9.*"


class _Share(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies, under the logits `hidden @ weight.T / temperature`.

    Args:
        hidden: (1, T, D), (B, L, D) or (T, D), fp32, bf16 or fp16.
        weight: (V, D) of hidden's dtype; with a process group this rank's rows, in the order of the ranks.
        labels: integers of hidden's shape without D, over the whole vocabulary; -100 is ignored.
        temperature: positive.
        reduction: of the log-probabilities, in any case of letters: "mean" divides by the number of all labels.
        dist_process_group: the tensor-parallel group over which the vocabulary is sharded. All its ranks call this
            with the same hidden and labels.

    Returns:
        (logprobs, entropy): logprobs (T,) fp32 in nats, never above 0, or 0-d if reduced; entropy (T,) fp32 in nats,
        never reduced. The batch is flattened, as verl does.
        With a process group each rank's gradient of hidden is a share: the caller sums it over the group, as verl's
        callers do.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the argument.
    """
    reductions: dict[str, Any] = {"none": torch.clone, "sum": torch.sum, "mean": torch.mean}
    if reduction.lower() not in reductions:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, reductions))}")
    check_weight(weight, hidden, "pass its full_tensor(), or this rank's rows and their dist_process_group")
    if labels.shape.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected that of hidden {tuple(hidden.shape)} less D"
        )
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if dist_process_group is None:
        logp, entropy = linear_logp_entropy(hidden, weight, target, temperature=temperature)
    else:
        hidden = _Share.apply(hidden, dist.get_world_size(dist_process_group))
        logp, entropy = linear_logp_entropy_parallel(
            hidden, weight, target, group=dist_process_group, temperature=temperature
        )
    return reductions[reduction.lower()](logp), entropy


def patch() -> None:
    """Puts `linear_cross_entropy` in the place of verl's, also in modules that imported the name already.

    Raises ImportError unless a supported verl is installed.
    """
    require("verl", SUPPORTED, "stepkto_fast.integrations.verl")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as theirs

    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get("linear_cross_entropy") is theirs:
            vars(module)["linear_cross_entropy"] = linear_cross_entropy
