"""linear_step_kto and linear_step_kto_exact: the other ops' kernels, one after the other, as one op each.

One op, so that all inputs are checked before the head's GEMM, also in compiled code; each part keeps its own
backend.
"""

from typing import Literal

from torch import Tensor

from .. import backends, checks
from ..linear_logp.eager import stores_probs
from ..linear_logp.op import (
    check_head,
    check_logit_options,
    linear_logp_backward,
    present,
    reads_data,
    requested_for_backward,
)
from ..linear_logp.op import fake_results as fake_head_results
from ..linear_logp_kl.op import check_reference_head
from ..reference_points.op import ReferencePoints
from ..registration import op
from ..step_kto.op import (
    StepKTOOutput,
    batch_values,
    check_batch,
    check_objective,
    fake_results,
    global_count,
    output,
    point_values,
    reference_point,
)

backends.register_composed("linear_step_kto", "linear_logp", "step_kto")
backends.register_composed("linear_step_kto_exact", "linear_logp_kl", "reference_points", "step_kto")


@op
def linear_step_kto_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    kl: Tensor,
    step_kl: Tensor,
    num_completions: Tensor | None,
    num_supervised: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    beta: float,
    step_beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    step_desirable_weight: float,
    step_undesirable_weight: float,
    outcome_weight: float,
    step_weight: float,
    step_reduction: str,
    after_first_error: str,
    loss_type: str,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head, objective = (backends.choose(name, hidden) for name in ("linear_logp", "step_kto"))
    if validate:
        checks.target_values(target, len(weight), ignore_index)
        batch_values(len(target), cu_seqlens, cu_steps, step_labels, (num_completions, num_supervised))
        point_values(kl, step_kl, loss_type)
    logp_N, lse_N, tile_lse_TN, tile_probs_NV = head.forward(
        hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index,
        stores_probs(hidden, weight, softcap, filter_eps),
    )  # fmt: skip
    ref_logp_N = ref_logp.to(logp_N.dtype).masked_fill(target == ignore_index, 0)
    *results, coefficient_N = objective.forward(
        logp_N, ref_logp_N, cu_seqlens, cu_steps, labels, step_labels, kl, step_kl, num_completions,
        num_supervised, beta, step_beta, desirable_weight, undesirable_weight, step_desirable_weight,
        step_undesirable_weight, outcome_weight, step_weight, step_reduction, after_first_error,
    )  # fmt: skip
    return *results, logp_N, coefficient_N, lse_N, tile_lse_TN, tile_probs_NV


@linear_step_kto_forward.register_fake
def _(hidden, weight, target, bias, ref_logp, cu_seqlens, cu_steps, labels, step_labels, kl, *rest):
    _, _, softcap, _, _, filter_eps, *_ = rest[2:]
    stored = stores_probs(hidden, weight, softcap, filter_eps)
    logp, lse, tile_lse, tile_probs, coefficient = fake_head_results(hidden, weight, 3, stored)
    return *fake_results(kl, cu_seqlens, cu_steps), logp, coefficient, lse, tile_lse, tile_probs


def _save(ctx, inputs, output):
    hidden, weight, target, bias, *rest = inputs
    *_, logp, coefficient, lse, tile_lse, tile_probs = output
    ctx.options, ctx.rest = rest[9:14], len(rest)
    ctx.save_for_backward(coefficient, hidden, weight, target, logp, lse, tile_lse, tile_probs, bias)
    ctx.backend = requested_for_backward()


def _differentiate(ctx, grad_loss, *_):
    coefficient, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    grads = linear_logp_backward(grad_loss * coefficient, *saved, *ctx.options, *needs, ctx.backend)
    dhidden, dweight, dbias = present(*grads, needed=needs)
    return dhidden, dweight, None, dbias, *[None] * ctx.rest


linear_step_kto_forward.register_autograd(_differentiate, setup_context=_save)


@op
def linear_step_kto_exact_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    num_completions: Tensor | None,
    num_supervised: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    beta: float,
    step_beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    step_desirable_weight: float,
    step_undesirable_weight: float,
    outcome_weight: float,
    step_weight: float,
    step_reduction: str,
    after_first_error: str,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pair, points, objective = (
        backends.choose(name, hidden) for name in ("linear_logp_kl", "reference_points", "step_kto")
    )
    if validate:
        checks.target_values(target, len(weight), ignore_index)
        batch_values(len(target), cu_seqlens, cu_steps, step_labels, (num_completions, num_supervised))
    logp_N, ref_logp_N, kl_N, lse_N, tile_lse_TN = pair.forward(
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
    kl, step_kl = ReferencePoints(*points.forward(kl_N, cu_seqlens, cu_steps)).points()
    *results, coefficient_N = objective.forward(
        logp_N, ref_logp_N, cu_seqlens, cu_steps, labels, step_labels, kl, step_kl, num_completions,
        num_supervised, beta, step_beta, desirable_weight, undesirable_weight, step_desirable_weight,
        step_undesirable_weight, outcome_weight, step_weight, step_reduction, after_first_error,
    )  # fmt: skip
    return *results, logp_N, kl, step_kl, coefficient_N, lse_N, tile_lse_TN


@linear_step_kto_exact_forward.register_fake
def _(hidden, weight, target, bias, ref_hidden, ref_weight, ref_bias, cu_seqlens, cu_steps, *rest):
    logp, lse, tile_lse, _, coefficient = fake_head_results(hidden, weight, per_token=3)
    results = fake_results(logp, cu_seqlens, cu_steps)
    return *results, logp, logp.new_empty(()), logp.new_empty(()), coefficient, lse, tile_lse


def _save_exact(ctx, inputs, output):
    hidden, weight, target, bias, *rest = inputs
    *_, logp, _, _, coefficient, lse, tile_lse = output
    ctx.options, ctx.rest = rest[9:14], len(rest)
    ctx.save_for_backward(coefficient, hidden, weight, target, logp, lse, tile_lse, hidden.new_empty(0, 0), bias)
    ctx.backend = requested_for_backward()


linear_step_kto_exact_forward.register_autograd(_differentiate, setup_context=_save_exact)


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
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
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
    step_reduction: Literal["mean", "sum"] = "mean",
    after_first_error: Literal["keep", "mask"] = "keep",
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    num_completions: int | Tensor | None = None,
    num_supervised: int | Tensor | None = None,
    validate: bool | None = None,
) -> StepKTOOutput:
    """The Step-KTO loss straight from hidden states: `step_kto(linear_logp(...), ref_logp, ...)` as one op.

    Args:
        hidden: (N, D), weight: (V, D), target: (N,), bias: (V,) and the options of the head: as for
        `linear_logp`.
        ref_logp: (N,) floating, under the reference, in nats; a constant. Ignored rows count as 0 here too.
        cu_seqlens: (B+1,) int32, cu_steps: (S+1,) int32, labels: (B,) bool, step_labels: (S,) int8, and the
            options of
            the objective: as for `step_kto`.

    Returns:
        StepKTOOutput in fp32 (fp64 for fp64 inputs); `loss` is differentiable once, in hidden, weight and
        bias.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value, before any computation; names the
        argument.
        RuntimeError: the backend chosen by name lacks linear_logp or step_kto.

    The formula is our reading of Step-KTO (arXiv 2501.10799) on top of KTO (arXiv 2402.01306).
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    checks.tensor("ref_logp", ref_logp, checks.FLOATS, ("N", hidden.shape[0]))
    checks.same_device("ref_logp", ref_logp, "hidden", hidden)
    check_batch("hidden", hidden, cu_seqlens, cu_steps, labels, step_labels)
    objective = check_objective(
        beta, step_beta, desirable_weight, undesirable_weight, step_desirable_weight, step_undesirable_weight,
        outcome_weight, step_weight, step_reduction, after_first_error, loss_type,
    )  # fmt: skip
    kl, step_kl = (reference_point(name, x, loss_type, hidden) for name, x in (("kl", kl), ("step_kl", step_kl)))
    counts = (
        global_count("num_completions", num_completions, hidden),
        global_count("num_supervised", num_supervised, hidden),
    )
    loss, *others, _, _, _, _ = linear_step_kto_forward(
        hidden, weight, target, bias, ref_logp.detach(), cu_seqlens, cu_steps, labels, step_labels, kl,
        step_kl, *counts, *options, *objective, reads_data(validate, hidden),
    )  # fmt: skip
    return output(loss, *others, kl, step_kl)


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
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    beta: float = 0.1,
    step_beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    step_desirable_weight: float = 1.0,
    step_undesirable_weight: float = 1.0,
    outcome_weight: float = 1.0,
    step_weight: float = 1.0,
    step_reduction: Literal["mean", "sum"] = "mean",
    after_first_error: Literal["keep", "mask"] = "keep",
    loss_type: Literal["kto"] = "kto",
    num_completions: int | Tensor | None = None,
    num_supervised: int | Tensor | None = None,
    validate: bool | None = None,
) -> StepKTOOutput:
    """The Step-KTO loss of a whole batch with exact reference points, in one pass over policy and reference.

    The same as `linear_logp_kl`, then `reference_points(kl, ...).points()`, then `step_kto` with those two
    points. They are this call's own: for a batch spread over micro-batches or ranks, make the three calls and
    all-reduce between.

    Args:
        hidden: (N, D), weight: (V, D), ref_hidden: (N, D'), ref_weight: (V, D'), target: (N,), bias,
            ref_bias: (V,) and
            the options of the head: as for `linear_logp_kl`.
        cu_seqlens, cu_steps, labels, step_labels and the options of the objective: as for `step_kto`;
            loss_type is "kto", since "apo_zero_unpaired" has no reference points to estimate.

    Returns:
        StepKTOOutput in fp32 (fp64 for an fp64 policy); `kl` and `step_kl` are the points found. `loss` is
        differentiable once, in hidden, weight and bias; the reference points are constants.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value, before any computation; names the
        argument.
        RuntimeError: the backend chosen by name lacks one of the three ops.

    The formula is our reading of Step-KTO (arXiv 2501.10799) on top of KTO (arXiv 2402.01306).
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    ref_hidden, ref_weight, ref_bias = check_reference_head(weight, ref_hidden, ref_weight, ref_bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    check_batch("hidden", hidden, cu_seqlens, cu_steps, labels, step_labels)
    checks.choice("loss_type", loss_type, ("kto",))
    objective = check_objective(
        beta, step_beta, desirable_weight, undesirable_weight, step_desirable_weight, step_undesirable_weight,
        outcome_weight, step_weight, step_reduction, after_first_error, loss_type,
    )  # fmt: skip
    counts = (
        global_count("num_completions", num_completions, hidden),
        global_count("num_supervised", num_supervised, hidden),
    )
    loss, *others, _, _, _ = linear_step_kto_exact_forward(
        hidden, weight, target, bias, ref_hidden, ref_weight, ref_bias, cu_seqlens, cu_steps, labels,
        step_labels, *counts, *options, *objective[:-1], reads_data(validate, hidden),
    )  # fmt: skip
    return output(loss, *others)
