"""step_kto: registration with torch.library, and the public function."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, triton_backend
from ..linear_logp.op import reads_data
from ..reference_points.op import check_boundaries
from ..registration import op
from . import eager, native

backends.register("step_kto", "reference", eager.step_kto_forward)
backends.register("step_kto", "native", native.step_kto_forward)
backends.register("step_kto", "triton", triton_backend.later("step_kto.triton_forward", "step_kto_forward"))


class StepKTOOutput(NamedTuple):
    """Result of the Step-KTO losses. `loss` is the only field with a gradient."""

    loss: Tensor  # 0-d: outcome_weight * outcome_loss + step_weight * step_loss
    outcome_loss: Tensor  # 0-d, unweighted mean over completions
    step_loss: Tensor  # 0-d, unweighted mean over completions with a labelled step
    log_ratios: Tensor  # (B,) sums of logp - ref_logp, in nats
    step_log_ratios: Tensor  # (S,)
    logp: Tensor  # (N,) of the policy, in nats
    kl: Tensor  # 0-d, the reference point z that was used
    step_kl: Tensor  # 0-d, z_s


def output(loss: Tensor, *others: Tensor) -> StepKTOOutput:
    outcome_loss, step_loss, log_ratios, step_log_ratios, logp, kl, step_kl = (x.detach() for x in others)
    return StepKTOOutput(loss, outcome_loss, step_loss, log_ratios, step_log_ratios, logp, kl, step_kl)


class Objective(NamedTuple):
    """The options of the objective, in the order in which the ops take them."""

    beta: float
    step_beta: float
    desirable_weight: float
    undesirable_weight: float
    step_desirable_weight: float
    step_undesirable_weight: float
    outcome_weight: float
    step_weight: float
    step_reduction: str
    after_first_error: str
    loss_type: str


def check_objective(
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
) -> Objective:
    checks.scalar("beta", beta, low=0)
    checks.scalar("step_beta", step_beta, low=0)
    weights = {
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "step_desirable_weight": step_desirable_weight,
        "step_undesirable_weight": step_undesirable_weight,
        "outcome_weight": outcome_weight,
        "step_weight": step_weight,
    }
    for name, weight in weights.items():
        checks.scalar(name, weight, low=0, low_allowed=True)
    checks.choice("step_reduction", step_reduction, ("mean", "sum"))
    checks.choice("after_first_error", after_first_error, ("keep", "mask"))
    checks.choice("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    return Objective(
        float(beta),
        float(step_beta),
        float(desirable_weight),
        float(undesirable_weight),
        float(step_desirable_weight),
        float(step_undesirable_weight),
        float(outcome_weight),
        float(step_weight),
        step_reduction,
        after_first_error,
        loss_type,
    )


def check_batch(
    name: str, values: Tensor, cu_seqlens: Tensor, cu_steps: Tensor, labels: Tensor, step_labels: Tensor
) -> None:
    """`values` (N,) or (N, D) are what the boundaries partition."""
    check_boundaries(cu_seqlens, cu_steps, name, values)
    checks.tensor("labels", labels, (torch.bool,), ("B", cu_seqlens.shape[0] - 1))
    checks.tensor("step_labels", step_labels, (torch.int8,), ("S", cu_steps.shape[0] - 1))
    checks.same_device("labels", labels, name, values)
    checks.same_device("step_labels", step_labels, name, values)


def reference_point(name: str, value: float | Tensor, loss_type: str, like: Tensor) -> Tensor:
    """A detached 0-d tensor on the device of `like`, without making the host wait."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        value = scalar_tensor(name, value, checks.FLOATS, like)
        return value.to(like.device, dtype, non_blocking=True)
    checks.scalar(name, value)
    if loss_type == "apo_zero_unpaired" and value != 0:
        raise ValueError(f"{name} is {value!r}; expected 0, which loss_type='apo_zero_unpaired' fixes it at")
    return torch.full((), float(value), dtype=dtype, device=like.device)


def global_count(name: str, value: int | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        dtypes = (torch.int64, torch.int32, *checks.FLOATS)
        return scalar_tensor(name, value, dtypes, like).to(like.device, torch.float64, non_blocking=True)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an int >= 0, a 0-d tensor or None")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r}; expected an int >= 0, a 0-d tensor or None")
    return torch.full((), value, dtype=torch.float64, device=like.device)


def scalar_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> Tensor:
    checks.tensor(name, value, dtypes)
    if value.device.type not in ("cpu", like.device.type):  # bringing it here would make the host wait
        raise ValueError(f"{name} is a 0-d tensor on {value.device}; expected {like.device} or cpu")
    return value.detach()


def batch_values(
    tokens: int,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    step_labels: Tensor,
    counts: tuple[Tensor | None, Tensor | None],
) -> None:
    checks.packing_values(tokens, cu_seqlens, cu_steps)
    checks.step_label_values(step_labels)
    present_here = len(cu_seqlens) > 1, bool((step_labels != -1).any())
    for name, count, present in zip(("num_completions", "num_supervised"), counts, present_here, strict=True):
        if count is not None and not (count > 0 or (count == 0 and not present)):
            low = "a count above 0, since this call holds some" if present else "a count of at least 0"
            raise ValueError(f"{name} is {count.item():g}; expected {low}")


def point_values(kl: Tensor, step_kl: Tensor, loss_type: str) -> None:
    for name, point in (("kl", kl), ("step_kl", step_kl)):
        if not point.isfinite():
            raise ValueError(f"{name} is {point.item()}; expected a finite number")
        if loss_type == "apo_zero_unpaired" and point != 0:
            raise ValueError(f"{name} is {point.item():g}; expected 0, which loss_type='apo_zero_unpaired' fixes it at")


@op
def step_kto_forward(
    logp: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels: Tensor,
    step_labels: Tensor,
    kl: Tensor,
    step_kl: Tensor,
    num_completions: Tensor | None,
    num_supervised: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = backends.choose("step_kto", logp)
    if validate:
        batch_values(len(logp), cu_seqlens, cu_steps, step_labels, (num_completions, num_supervised))
        point_values(kl, step_kl, loss_type)
    dtype = kl.dtype  # of the computation
    return kernel.forward(
        logp.to(dtype), ref_logp.to(dtype), cu_seqlens, cu_steps, labels, step_labels, kl, step_kl,
        num_completions, num_supervised, beta, step_beta, desirable_weight, undesirable_weight,
        step_desirable_weight, step_undesirable_weight, outcome_weight, step_weight, step_reduction,
        after_first_error,
    )  # fmt: skip


def fake_results(like: Tensor, cu_seqlens: Tensor, cu_steps: Tensor) -> tuple[Tensor, ...]:
    shapes = (), (), (), (cu_seqlens.shape[0] - 1,), (cu_steps.shape[0] - 1,)
    return tuple(like.new_empty(shape) for shape in shapes)


@step_kto_forward.register_fake
def _(logp, ref_logp, cu_seqlens, cu_steps, labels, step_labels, kl, *rest):
    return *fake_results(kl, cu_seqlens, cu_steps), kl.new_empty(logp.shape[0])


@op
def step_kto_backward(grad_loss: Tensor, coefficient: Tensor) -> Tensor:
    """An op, so that a second derivative is an error: the coefficient carries no graph."""
    return grad_loss * coefficient


@step_kto_backward.register_fake
def _(grad_loss, coefficient):
    return torch.empty_like(coefficient)


def _save(ctx, inputs, output):
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(output[-1])


def _differentiate(ctx, grad_loss, *_):
    (coefficient,) = ctx.saved_tensors
    return step_kto_backward(grad_loss, coefficient).to(ctx.dtype), *[None] * (ctx.inputs - 1)


step_kto_forward.register_autograd(_differentiate, setup_context=_save)


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
    step_reduction: Literal["mean", "sum"] = "mean",
    after_first_error: Literal["keep", "mask"] = "keep",
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    num_completions: int | Tensor | None = None,
    num_supervised: int | Tensor | None = None,
    validate: bool | None = None,
) -> StepKTOOutput:
    """The Step-KTO loss of a packed batch: a KTO value function over whole completions, and one over their
    steps.

    With d = logp - ref_logp, r_i its sum over completion i and r_h its sum over step h:

        outcome  v_i = lam_i * sigmoid(beta * (r_i - kl))           if labels[i], else with the sign flipped
        step     v_h = lam_h * sigmoid(step_beta * (r_h - step_kl)) if step_labels[h] == 1, flipped if 0
        loss = outcome_weight * mean_i(lam_i - v_i)
             + step_weight * mean over completions with a labelled step of (lam_h - v_h) reduced over those
             steps

    Args:
        logp: (N,) log-probabilities of the packed tokens under the policy, in nats; fp32, bf16, fp16 or fp64.
        ref_logp: (N,) floating, under the reference; treated as a constant.
        cu_seqlens: (B+1,) int32 and cu_steps: (S+1,) int32: boundaries over the N tokens, from 0, strictly
            ascending, to N; every sequence boundary is a step boundary.
        labels: (B,) bool, the outcome of each completion.
        step_labels: (S,) int8: 1 correct, 0 incorrect, -1 unlabelled (no step term).
        kl, step_kl: the reference points z and z_s, in nats: a float or a 0-d tensor, used as given and
        detached.
        beta, step_beta: positive, per nat.
        *_weight: >= 0; lam of desirable (correct) and undesirable completions and steps, and the weights of
        the terms.
        step_reduction: over a completion's labelled steps.
        after_first_error: "mask" treats the steps after a completion's first incorrect one as unlabelled.
        loss_type: "apo_zero_unpaired" fixes both reference points at 0 and rejects others.
        num_completions, num_supervised: what the two means divide by: the global counts of completions, and
            of completions with a labelled step (after masking), so that micro-batches and ranks add up to one
            mean. An int or a 0-d tensor; None: this call's own.
        validate: whether to check boundaries, label values, counts and reference points, which makes the host
            wait for the device. None: on CPU only.

    Returns:
        StepKTOOutput in fp32 (fp64 for an fp64 logp); `loss` is differentiable once, in logp only.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the argument.
        RuntimeError: the backend chosen by name cannot run this op.

    The formula is our reading of Step-KTO (arXiv 2501.10799) on top of KTO (arXiv 2402.01306).
    """
    checks.tensor("logp", logp, checks.FLOATS, ("N", None))
    checks.tensor("ref_logp", ref_logp, checks.FLOATS, ("N", logp.shape[0]))
    checks.same_device("ref_logp", ref_logp, "logp", logp)
    check_batch("logp", logp, cu_seqlens, cu_steps, labels, step_labels)
    objective = check_objective(
        beta, step_beta, desirable_weight, undesirable_weight, step_desirable_weight, step_undesirable_weight,
        outcome_weight, step_weight, step_reduction, after_first_error, loss_type,
    )  # fmt: skip
    kl, step_kl = (reference_point(name, x, loss_type, logp) for name, x in (("kl", kl), ("step_kl", step_kl)))
    counts = (
        global_count("num_completions", num_completions, logp),
        global_count("num_supervised", num_supervised, logp),
    )
    loss, *others, _ = step_kto_forward(
        logp, ref_logp.detach(), cu_seqlens, cu_steps, labels, step_labels, kl, step_kl, *counts, *objective,
        reads_data(validate, logp),
    )  # fmt: skip
    return output(loss, *others, logp, kl, step_kl)
