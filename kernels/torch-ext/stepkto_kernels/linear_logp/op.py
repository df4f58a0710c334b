"""linear_logp and linear_logp_entropy: registration with torch.library, and the public functions."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, triton_backend
from ..registration import op
from . import eager, native

for _backend, _module in (("reference", eager), ("native", native)):
    backends.register("linear_logp", _backend, _module.linear_logp_forward, _module.linear_logp_backward)
    backends.register(
        "linear_logp_entropy", _backend, _module.linear_logp_entropy_forward, _module.linear_logp_entropy_backward
    )

for _name in ("linear_logp", "linear_logp_entropy"):
    backends.register(
        _name,
        "triton",
        triton_backend.later("linear_logp.triton_forward", f"{_name}_forward"),
        triton_backend.later("linear_logp.triton_backward", f"{_name}_backward"),
    )

FILTER_EPS_16_BIT = 2.0**-9  # "auto": the gradient then moves by about what rounding to bf16 does


class LogitOptions(NamedTuple):
    """The options of every function with a head, in the order in which the ops take them."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    filter_eps: float


def check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, empty_allowed: bool = False
) -> tuple:
    """Checked (hidden, weight, bias), cast as F.linear would cast them under autocast."""
    names = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    for name, each in zip(names, (hidden, weight, bias), strict=True):
        checks.whole(name, each)
    checks.tensor(names[0], hidden, checks.FLOATS, ("N", None), ("D", None))
    checks.tensor(names[1], weight, checks.FLOATS, ("V", None), ("D", hidden.shape[1]))
    if weight.shape[0] == 0 and not empty_allowed:
        raise ValueError(f"{names[1]} has shape {tuple(weight.shape)}; expected at least one row (V >= 1)")
    if bias is not None:
        checks.tensor(names[2], bias, checks.FLOATS, ("V", weight.shape[0]))
        checks.same_device(names[2], bias, names[0], hidden)
    checks.same_device(names[1], weight, names[0], hidden)
    checks.tensor("target", target, (torch.int64,), ("N", hidden.shape[0]))
    checks.same_device(names[0], hidden, "target", target)
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        cast = torch.get_autocast_dtype(device_type)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(cast) for x in (hidden, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(cast)
    checks.tensor(names[1], weight, (hidden.dtype,), ("V", None), ("D", None))
    if bias is not None:
        checks.tensor(names[2], bias, (hidden.dtype,), ("V", None))
    return hidden, weight, bias


def check_logit_options(
    hidden: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float | Literal["auto"],
    *learned: Tensor | None,
) -> LogitOptions:
    checks.scalar("logit_scale", logit_scale)
    if softcap is not None:
        checks.scalar("softcap", softcap, low=0)
    checks.scalar("temperature", temperature, low=0)
    checks.integer("ignore_index", ignore_index)
    if isinstance(filter_eps, str):
        checks.choice("filter_eps", filter_eps, ("auto",))
        filter_eps = FILTER_EPS_16_BIT if hidden.dtype in (torch.bfloat16, torch.float16) else 0.0
    checks.scalar("filter_eps", filter_eps, low=0, low_allowed=True)
    if filter_eps >= 1:
        raise ValueError(f"filter_eps is {filter_eps!r}; expected 'auto' or a number in [0, 1)")
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, *learned))):
        filter_eps = FILTER_EPS_16_BIT  # no backward: nothing need be kept for an exact one
    return LogitOptions(
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        float(filter_eps),
    )


def reads_data(validate: bool | None, like: Tensor) -> bool:
    """Whether to run the checks that read data: on a device they would make the host wait."""
    checks.boolean_or_none("validate", validate)
    return like.device.type == "cpu" if validate is None else validate


def requested_for_backward() -> str:
    """The backend for a backward: its forward's, or "" while torch.compile traces: decided at run time."""
    return "" if torch.compiler.is_compiling() else backends.requested()


def present(*grads: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def filled(
    like: Tensor, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ops return tensors only: an empty one stands for a gradient that nobody needs."""
    none = like.new_empty
    return (
        none(0) if dhidden is None else dhidden,
        none(0) if dweight is None else dweight,
        none(0) if dbias is None else dbias,
    )


@op
def linear_logp_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, tile_probs): lse (N,) over the vocabulary; tile_lse (T, N) over each tile of VOCAB_TILE
    entries, the target's left out; tile_probs (N, T * VOCAB_TILE) the softmax within each tile, the target's entry
    0, in hidden's dtype, or (0, 0) unless `stores_probs`. What belongs to ignored rows is of no use."""
    kernel = backends.choose("linear_logp", hidden)
    if validate:
        checks.target_values(target, len(weight), ignore_index)
    store = eager.stores_probs(hidden, weight, softcap, filter_eps)
    return kernel.forward(hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index, store)


@linear_logp_forward.register_fake
def _(hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index, filter_eps, validate):
    return fake_results(hidden, weight, 2, eager.stores_probs(hidden, weight, softcap, filter_eps))


def fake_results(hidden, weight, per_token, stored=False):
    """logp, lse, tile_lse, tile_probs, and what comes after them."""
    shape = hidden.new_empty(hidden.shape[0], dtype=eager.compute_dtype(hidden))
    logp, lse, *others = (torch.empty_like(shape) for _ in range(per_token))
    tile_lse = shape.new_empty(eager.vocab_tiles(weight.shape[0]), hidden.shape[0])
    return logp, lse, tile_lse, hidden.new_empty(eager.probs_shape(stored, hidden.shape[0], weight.shape[0])), *others


@op
def linear_logp_backward(
    grad_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logp: Tensor,
    lse: Tensor,
    tile_lse: Tensor,
    tile_probs: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = backends.choose("linear_logp", hidden, backend).backward(
        grad_logp, hidden, weight, target, logp, lse, tile_lse, tile_probs, bias, logit_scale, softcap,
        temperature, ignore_index, filter_eps, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return filled(hidden, *grads)


@linear_logp_backward.register_fake
def _(grad_logp, hidden, weight, target, logp, lse, tile_lse, tile_probs, bias, *options_needs_backend):
    return fake_gradients(hidden, weight, bias, options_needs_backend[-4:-1])


def fake_gradients(hidden, weight, bias, needs):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _save(ctx, inputs, output):
    hidden, weight, target, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, target, *output, bias)
    ctx.backend = requested_for_backward()
    ctx.set_materialize_grads(False)


def _gradients_of_inputs(ctx, backward, *arguments):
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    grads = backward(*arguments, *ctx.options[:-1], *needs, ctx.backend)
    dhidden, dweight, dbias = present(*grads, needed=needs)
    return dhidden, dweight, None, dbias, *[None] * len(ctx.options)


def _differentiate_logp(ctx, grad_logp, *_):
    if grad_logp is None:
        return None, None, None, None, *[None] * len(ctx.options)
    return _gradients_of_inputs(ctx, linear_logp_backward, grad_logp, *ctx.saved_tensors)


linear_logp_forward.register_autograd(_differentiate_logp, setup_context=_save)


@op
def linear_logp_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, tile_probs, entropy)."""
    kernel = backends.choose("linear_logp_entropy", hidden)
    if validate:
        checks.target_values(target, len(weight), ignore_index)
    store = eager.stores_probs(hidden, weight, softcap, filter_eps)
    return kernel.forward(hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index, store)


@linear_logp_entropy_forward.register_fake
def _(hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index, filter_eps, validate):
    return fake_results(hidden, weight, 3, eager.stores_probs(hidden, weight, softcap, filter_eps))


@op
def linear_logp_entropy_backward(
    grad_logp: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logp: Tensor,
    lse: Tensor,
    tile_lse: Tensor,
    tile_probs: Tensor,
    entropy: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = backends.choose("linear_logp_entropy", hidden, backend).backward(
        grad_logp, grad_entropy, hidden, weight, target, logp, lse, tile_lse, tile_probs, entropy, bias,
        logit_scale, softcap, temperature, ignore_index, filter_eps, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return filled(hidden, *grads)


@linear_logp_entropy_backward.register_fake
def _(
    grad_logp, grad_entropy, hidden, weight, target, logp, lse, tile_lse, probs, entropy, bias, *options_needs_backend
):
    return fake_gradients(hidden, weight, bias, options_needs_backend[-4:-1])


def differentiate_logp_entropy(ctx, grad_logp, grad_entropy):
    """The gradients of a forward that saved what `linear_logp_entropy_forward` saves."""
    if grad_entropy is None:  # of an entropy that was only looked at: routing need not heed its gradient
        *saved, _entropy, bias = ctx.saved_tensors
        if grad_logp is None:
            return None, None, None, None, *[None] * len(ctx.options)
        return _gradients_of_inputs(ctx, linear_logp_backward, grad_logp, *saved, bias)
    if grad_logp is None:
        grad_logp = torch.zeros_like(grad_entropy)
    return _gradients_of_inputs(ctx, linear_logp_entropy_backward, grad_logp, grad_entropy, *ctx.saved_tensors)


def _differentiate_logp_entropy(ctx, grad_logp, _lse, _tile_lse, _tile_probs, grad_entropy):
    return differentiate_logp_entropy(ctx, grad_logp, grad_entropy)


linear_logp_entropy_forward.register_autograd(_differentiate_logp_entropy, setup_context=_save)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Natural-log probability of each target token under a linear head; the (N, V) logits are never stored.

    The logits are `z = logit_scale * (hidden @ weight.T + bias)`, then `z = softcap * tanh(z / softcap)` if a
    softcap is given, then `z / temperature`; the result is `z[target] - logsumexp(z)`, never above 0.

    Args:
        hidden: (N, D) fp32, bf16, fp16 or fp64; the hidden state that predicts each token.
        weight: (V, D), the LM head, of hidden's dtype. Under autocast both are cast as F.linear would.
        target: (N,) int64 in [0, V), or `ignore_index`.
        bias: (V,) of hidden's dtype, or None.
        logit_scale, softcap, temperature: see above; softcap and temperature are positive.
        ignore_index: rows with this target give 0, and no gradient.
        filter_eps: the share of a token's non-target probability mass whose gradient the backward may drop,
            in [0, 1). 0 is exact; "auto" is 0 for fp32 and fp64 and 2^-9 for 16-bit inputs. The reference
            backend drops nothing; `stepkto_kernels.watch()` tells what was dropped.
        validate: whether to check the values of `target`, which makes the host wait for the device. None: on
            CPU only.

    Returns:
        (N,) fp32 (fp64 for fp64 inputs), in nats. Differentiable once, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the argument.
        RuntimeError: the backend chosen by name cannot run this op.
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    return linear_logp_forward(hidden, weight, target, bias, *options, reads_data(validate, hidden))[0]


def linear_logp_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logp` together with the entropy of each token's distribution over the vocabulary.

    Arguments and errors are those of `linear_logp`; `filter_eps` then bounds the entropy's gradient too.

    Returns:
        (logp, entropy), each (N,) fp32 (fp64 for fp64 inputs), in nats, both differentiable once. Ignored
        rows give 0.
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    logp, _, _, _, entropy = linear_logp_entropy_forward(
        hidden, weight, target, bias, *options, reads_data(validate, hidden)
    )
    return logp, entropy
