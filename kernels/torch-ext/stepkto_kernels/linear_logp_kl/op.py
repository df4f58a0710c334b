"""linear_logp_kl: registration with torch.library, and the public function. Its backward is linear_logp's."""

from typing import Literal, NamedTuple

from torch import Tensor

from .. import backends, checks, triton_backend
from ..linear_logp.op import (
    check_head,
    check_logit_options,
    fake_results,
    linear_logp_backward,
    present,
    reads_data,
    requested_for_backward,
)
from ..registration import op
from . import eager, native

backends.register("linear_logp_kl", "reference", eager.linear_logp_kl_forward)
backends.register("linear_logp_kl", "native", native.linear_logp_kl_forward)
backends.register(
    "linear_logp_kl", "triton", triton_backend.later("linear_logp_kl.triton_forward", "linear_logp_kl_forward")
)


class LogpKL(NamedTuple):
    """Per token, in nats, each (N,): only `logp` carries a gradient."""

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor


@op
def linear_logp_kl_forward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl, lse, tile_lse), the last two of the policy and as in linear_logp_forward."""
    kernel = backends.choose("linear_logp_kl", hidden)
    if validate:
        checks.target_values(target, len(weight), ignore_index)
    return kernel.forward(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        target,
        bias,
        ref_bias,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
    )


@linear_logp_kl_forward.register_fake
def _(hidden, weight, *rest):
    logp, lse, tile_lse, _, ref_logp, kl = fake_results(hidden, weight, per_token=4)
    return logp, ref_logp, kl, lse, tile_lse


def _save(ctx, inputs, output):
    hidden, weight, _, _, target, bias, _, *ctx.options = inputs
    logp, _, _, lse, tile_lse = output
    ctx.save_for_backward(hidden, weight, target, logp, lse, tile_lse, hidden.new_empty(0, 0), bias)
    ctx.backend = requested_for_backward()


def _differentiate(ctx, grad_logp, *_):
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    grads = linear_logp_backward(grad_logp, *ctx.saved_tensors, *ctx.options[:-1], *needs, ctx.backend)
    dhidden, dweight, dbias = present(*grads, needed=needs)
    return dhidden, dweight, None, None, None, dbias, None, *[None] * len(ctx.options)


linear_logp_kl_forward.register_autograd(_differentiate, setup_context=_save)


def check_reference_head(
    weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, target: Tensor
) -> tuple:
    """Checked and detached; hidden size and dtype may differ from the policy's."""
    ref_hidden, ref_weight, ref_bias = check_head("ref_", ref_hidden, ref_weight, ref_bias, target)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has shape {tuple(ref_weight.shape)}; expected (V={weight.shape[0]}, D'), "
            "the vocabulary of weight"
        )
    return ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach()


def linear_logp_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> LogpKL:
    """Log-probabilities of the targets under policy and reference, and the exact KL between the two.

    `kl[n] = sum over the vocabulary of p * (log p - log q)`, with p the policy and q the reference after the
    same scale, softcap and temperature; rounding below 0 is clamped.

    Args:
        hidden, weight, bias, target and the options: as for `linear_logp`.
        ref_hidden: (N, D') and ref_weight: (V, D'), the reference model's, of one dtype; D' may differ
            from D.
        ref_bias: (V,) or None.

    Returns:
        LogpKL(logp, ref_logp, kl), each (N,) fp32 (fp64 for an fp64 policy), in nats; ignored rows give 0 in
        all three. Only `logp` is differentiable, in hidden, weight and bias: nothing flows into the
        reference.

    Raises:
        ValueError, TypeError, RuntimeError: as for `linear_logp`.
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    ref_hidden, ref_weight, ref_bias = check_reference_head(weight, ref_hidden, ref_weight, ref_bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    logp, ref_logp, kl, _, _ = linear_logp_kl_forward(
        hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias, *options, reads_data(validate, hidden)
    )
    return LogpKL(logp, ref_logp.detach(), kl.detach())
