"""Boundary arrays, labels, targets, shapes, dtypes, strides and options into the kernels, on every CPU backend.

A call either raises a ValueError or TypeError whose first word is an argument, the same on both backends, or gives
what the slow truth gives.
"""

import sys
import warnings

import fuzzing
import numpy as np
import torch
from hypothesis import strategies as st
from stepkto_kernels import backend, linear_step_kto, reference_points, step_kto
from stepkto_kernels.linear_step_kto import reference as linear_truth
from stepkto_kernels.reference_points import reference as points_truth
from stepkto_kernels.step_kto import reference as step_truth

BACKENDS = ("reference", "native")
HEAD = ("logit_scale", "softcap", "temperature", "bias")
OWN = ("ignore_index", "filter_eps", "loss_type")
OPTIONS = (
    "kl", "step_kl", "beta", "step_beta", "desirable_weight", "undesirable_weight", "step_desirable_weight",
    "step_undesirable_weight", "outcome_weight", "step_weight", "step_reduction", "after_first_error",
    "num_completions", "num_supervised",
)  # fmt: skip
NAMES = {
    "logp", "ref_logp", "values", "hidden", "weight", "target", "cu_seqlens", "cu_steps", "labels", "step_labels",
    *HEAD, *OWN, *OPTIONS,
}  # fmt: skip
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip
INTEGERS = st.sampled_from(
    [-(2**63), -(2**31), -129, -101, -100, -2, -1, 0, 1, 2, 3, 7, 127, 128, 2**31 - 1, 2**63 - 1]
)
NUMBERS = st.sampled_from(
    [0, 1, -1, True, None, "mean", float("nan"), float("inf"), -float("inf"), 0.0, -0.5, 1e-6, 0.3, 1e6, 2**70, 10**400]
)
ODD = st.sampled_from(["strided", "transposed", "expanded", "offset", "flat", "deep", "empty", "longer", "shorter"])


@st.composite
def batches(draw, kind):
    """A batch as it should be, for one of the three functions."""
    lengths = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), max_size=4))
    steps = [n for completion in lengths for n in completion]
    tokens = sum(steps)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES[:3] if kind == "linear" else DTYPES[:4]))
    scale = draw(st.sampled_from([1.0, 0.0, 30.0, 1e-4]))

    def noise(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = {
        "cu_seqlens": torch.tensor([0, *np.cumsum([sum(c) for c in lengths]).tolist()], dtype=torch.int32),
        "cu_steps": torch.tensor([0, *np.cumsum(steps).tolist()], dtype=torch.int32),
    }
    if kind == "points":
        return batch | {"values": noise(tokens).to(dtype)}
    batch |= {
        "labels": torch.rand(len(lengths), generator=generator) < 0.5,
        "step_labels": torch.randint(-1, 2, (len(steps),), generator=generator, dtype=torch.int8),
        "ref_logp": -noise(tokens).abs().to(dtype),
    }
    if kind == "step":
        return batch | {"logp": -noise(tokens).abs().to(dtype)}
    width, vocabulary = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 5, 127, 128, 129, 300]))
    batch |= {
        "hidden": noise(tokens, width).to(dtype),
        "weight": torch.randn(vocabulary, width, generator=generator).to(dtype),
        "target": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "filter_eps": 0.0,
    }
    if draw(st.booleans()):
        batch["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    return batch


@st.composite
def cases(draw, kind):
    """A batch with a few things wrong with it, or merely unusual."""
    batch = draw(batches(kind))
    tensors = sorted(name for name, value in batch.items() if isinstance(value, torch.Tensor))
    allowed = {"points": (), "step": OPTIONS, "linear": (*OPTIONS, "logit_scale", "softcap", "temperature", *OWN)}[kind]
    for _ in range(draw(st.integers(0, 3))):
        what = draw(st.sampled_from(["entry", "entry", "entry", "odd", "dtype", "option", "type"]))
        if what == "option" and allowed:
            batch[draw(st.sampled_from(allowed))] = draw(NUMBERS | INTEGERS | NUMBERS.filter(number).map(torch.tensor))
            continue
        name = draw(st.sampled_from(tensors))
        if what == "type":
            batch[name] = draw(st.sampled_from([None, 3, "text", [0, 1], np.zeros(2), torch.tensor(1.0)]))
        if not isinstance(batch[name], torch.Tensor):
            continue
        if what == "entry":
            batch[name] = with_entry(draw, name, batch[name])
        elif what == "odd":
            batch[name] = reshaped(batch[name], draw(ODD))
        elif what == "dtype":
            batch[name] = batch[name].to(draw(st.sampled_from(DTYPES)))
    return batch


def number(value):
    return isinstance(value, int | float) and abs(value) < 2**60


def with_entry(draw, name, tensor):
    """One entry changed, put in, taken out, or two exchanged."""
    items = tensor.reshape(-1).tolist()
    where = draw(st.integers(0, max(0, len(items) - 1)))
    how = draw(st.sampled_from(["set", "near", "insert", "remove", "swap"]))
    limits = None if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool else tensor.dtype
    value = draw(INTEGERS)
    if limits:
        value = max(torch.iinfo(limits).min, min(torch.iinfo(limits).max, value))
    elif tensor.dtype == torch.bool:
        value = value > 0
    else:
        value = draw(st.sampled_from([0.0, -1.0, 1e4, -1e4, 1e-30]))
    if how == "insert":
        items.insert(where, value)
    elif items and how == "set":
        items[where] = value
    elif items and how == "near" and limits:
        items[where] += draw(st.sampled_from([-1, 1])) if abs(items[where]) < 100 else 0
    elif items and how == "remove":
        del items[where]
    elif items and how == "swap":
        items[where], items[0] = items[0], items[where]
    made = torch.tensor(items, dtype=tensor.dtype)
    return made.reshape(tensor.shape) if made.numel() == tensor.numel() else made


def reshaped(tensor, how):
    """The same numbers otherwise laid out, or another shape."""
    if how == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if how == "transposed":
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    if how == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.dim() and len(tensor) else tensor
    if how == "offset":  # a view with another offset
        return (
            torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].view(tensor.shape) if tensor.numel() else tensor
        )
    if how == "flat":
        return tensor.reshape(-1)
    if how == "deep":
        return tensor[None]
    if how == "empty":
        return tensor[:0] if tensor.dim() else tensor
    if how == "longer":
        return torch.cat([tensor, tensor[-1:]]) if tensor.dim() else tensor
    return tensor[:-1] if tensor.dim() else tensor


def outcome(function, batch, name, differentiated=()):
    """What the call gives on one backend, with gradients; or what it raises."""
    batch = {
        key: value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if key in differentiated and isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in batch.items()
    }
    leaves = [
        batch[key] for key in differentiated if isinstance(batch.get(key), torch.Tensor) and batch[key].requires_grad
    ]
    try:
        with backend(name):
            found = function(**batch)
            if leaves and found.loss.requires_grad:
                return found, torch.autograd.grad(found.loss, leaves, allow_unused=True)
            return found, ()
    except (ValueError, TypeError) as error:
        if str(error).split()[0] not in NAMES:
            raise AssertionError("names no argument") from error
        return type(error), str(error)


def agree(function, batch, differentiated, truth):
    fuzzing.diary.note(batch)
    found = [outcome(function, batch, name, differentiated) for name in BACKENDS]
    if isinstance(found[0][0], type):
        assert found[0] == found[1], f"the backends raise differently: {found}"
        return
    assert not isinstance(found[1][0], type), f"only the native backend raises: {found[1]}"
    expected = truth(batch)
    for (result, gradients), name in zip(found, BACKENDS, strict=True):
        for key, value in expected.items():
            near(getattr(result, key), value, batch, f"{name}: {key}")
        for mine, other in zip(gradients, found[0][1], strict=True):
            near(mine, other, batch, f"{name}: gradient", loose=True)


def near(found, expected, batch, what, loose=False):
    found, expected = found.detach().double(), torch.as_tensor(expected).detach().double()
    coarse = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in batch.values())
    tolerance = 3e-2 if coarse and loose else 2e-3 if coarse else 2e-4
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(1 + scale), equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def doubled(batch):
    """For the truth: contiguous, and floats in fp64."""
    return {
        key: (value.double() if value.is_floating_point() else value).contiguous()
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for key, value in batch.items()
    }


def scalars(options):
    """Scalars as Python floats, texts as they are."""
    return {key: value if value is None or isinstance(value, str) else float(value) for key, value in options.items()}


def fractional(batch):
    """Whether a mean is over less than one completion, as where a count is divided by ranks: the truth takes 1 then."""
    return any(0 < float(batch.get(key) or 0) < 1 for key in ("num_completions", "num_supervised"))


def step_expected(batch):
    if fractional(batch):
        return {}
    batch = doubled(batch)
    return step_truth.step_kto(
        **scalars({k: v for k, v in batch.items() if k in OPTIONS})
        | {k: v for k, v in batch.items() if k not in OPTIONS and k not in OWN}
    )


def linear_expected(batch):
    if batch["filter_eps"] != 0 or fractional(
        batch
    ):  # what may be dropped, the truth does not say; that nothing raises is all there is
        return {}
    given = doubled(batch)
    head = scalars({key: given[key] for key in HEAD[:-1] if key in given}) | {"bias": given.get("bias")}
    options = scalars({key: given[key] for key in OPTIONS if key in given})
    rest = {key: value for key, value in given.items() if key not in (*HEAD, *OPTIONS, "filter_eps", "loss_type")}
    return linear_truth.linear_step_kto(**rest, head=head, objective=options)


def points_expected(batch):
    given = doubled(batch)
    found = points_truth.reference_points(given["values"], given["cu_seqlens"], given["cu_steps"])
    return dict(zip(("outcome_sum", "outcome_count", "step_sum", "step_count"), found, strict=True))


def check_step_kto(batch):
    agree(step_kto, batch, ("logp",), step_expected)


def check_linear_step_kto(batch):
    agree(linear_step_kto, batch, ("hidden", "weight", "bias"), linear_expected)


def check_reference_points(batch):
    agree(reference_points, batch, (), points_expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of casts that are tried on purpose
    sys.exit(
        fuzzing.main(
            __file__,
            {
                check_step_kto: {"batch": cases("step")},
                check_linear_step_kto: {"batch": cases("linear")},
                check_reference_points: {"batch": cases("points")},
            },
        )
    )
