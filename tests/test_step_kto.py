"""step_kto on every backend against the truth, the anchors of the objective, and an independent KTO
formula."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_backends import INTERPRETING, device_of, needs, where_it_runs
from stepkto_kernels import StepKTOOutput, backend, backends, step_kto
from stepkto_kernels.step_kto import reference as truth
from stepkto_kernels.step_kto.op import step_kto_backward, step_kto_forward
from torch.nn.functional import sigmoid
from torch.utils._python_dispatch import TorchDispatchMode

needs_native = needs("step_kto", "native")
BACKENDS = [where_it_runs("step_kto", name) for name in ("reference", "native", "triton")]
# the widest type a backend takes, and a bound on the relative error of its results
FINEST = {
    "reference": (torch.float64, 1e-13),
    "native": (torch.float64, 1e-13),
    "triton": (torch.float32, 3e-7),
}


def on_device(batch):
    """The batch where the chosen backend takes it."""
    device = device_of(backends.requested())
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def affordable(name, *shape, most=400):
    """A shape of at most this many tokens for a backend in the interpreter: its blocks are small, too."""
    shape = list(shape)
    while name == "triton" and INTERPRETING and math.prod(shape) > most:
        largest = shape.index(max(shape))
        shape[largest] //= 2
    return shape


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with backend(request.param):
        yield request.param


def random_batch(seed=0, completions=7, steps=6, tokens=9, dtype=torch.float32):
    """Completions of 1 to `steps` steps of 1 to `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, size):
        return torch.randint(1, high + 1, (size,), generator=generator)

    def cumulative(lengths):
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    cu_seqsteps = cumulative(draw(steps, completions))
    cu_steps = cumulative(draw(tokens, int(cu_seqsteps[-1])))
    n, s = int(cu_steps[-1]), len(cu_steps) - 1
    ref_logp = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    logp = (ref_logp + 0.7 * torch.randn(n, generator=generator, dtype=torch.float64)).clamp(max=0)
    return {
        "logp": logp.to(dtype),
        "ref_logp": ref_logp.to(dtype),
        "cu_seqlens": cu_steps[cu_seqsteps].int(),
        "cu_steps": cu_steps.int(),
        "labels": torch.rand(completions, generator=generator) < 0.5,
        "step_labels": torch.randint(-1, 2, (s,), generator=generator).to(torch.int8),
    }


def select(batch, chosen):
    """The packed batch of the chosen completions, in that order, and the token numbers they came from."""
    cu_seqlens, cu_steps = batch["cu_seqlens"].tolist(), batch["cu_steps"].tolist()
    tokens, step_labels, sequences, steps = [], [], [0], [0]
    for i in chosen:
        tokens += range(cu_seqlens[i], cu_seqlens[i + 1])
        for h in range(len(cu_steps) - 1):
            if cu_seqlens[i] <= cu_steps[h] < cu_seqlens[i + 1]:
                steps.append(steps[-1] + cu_steps[h + 1] - cu_steps[h])
                step_labels.append(int(batch["step_labels"][h]))
        sequences.append(len(tokens))
    part = {
        "logp": batch["logp"][tokens],
        "ref_logp": batch["ref_logp"][tokens],
        "cu_seqlens": torch.tensor(sequences, dtype=torch.int32),
        "cu_steps": torch.tensor(steps, dtype=torch.int32),
        "labels": batch["labels"][list(chosen)],
        "step_labels": torch.tensor(step_labels, dtype=torch.int8),
    }
    return part, tokens


def with_gradient(batch, **options):
    batch = on_device(batch)
    logp = batch["logp"].detach().clone().requires_grad_()
    result = step_kto(**batch | {"logp": logp}, **options)
    (gradient,) = torch.autograd.grad(result.loss, logp)
    return StepKTOOutput(*(x.cpu() for x in result)), gradient.cpu()


OPTIONS = {
    "defaults": {},
    "points": {"kl": 0.8, "step_kl": 0.3},
    "negative point": {"kl": -0.4},
    "betas": {"beta": 0.5, "step_beta": 1.7},
    "class weights": {
        "desirable_weight": 1.3,
        "undesirable_weight": 0.4,
        "step_desirable_weight": 0.7,
        "step_undesirable_weight": 2.1,
    },
    "term weights": {"outcome_weight": 0.3, "step_weight": 1.9},
    "steps only": {"outcome_weight": 0.0},
    "sum": {"step_reduction": "sum"},
    "mask": {"after_first_error": "mask"},
    "everything": {
        "kl": 0.8,
        "step_kl": 0.3,
        "beta": 0.5,
        "step_beta": 1.7,
        "step_reduction": "sum",
        "after_first_error": "mask",
        "step_desirable_weight": 0.7,
        "undesirable_weight": 0.4,
        "num_completions": 19,
        "num_supervised": 11,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_matches_the_truth(seed, options, on_backend):
    for dtype, tolerance in {FINEST[on_backend], (torch.float32, 3e-7)}:
        # fp32: differences are rounded to fp32 once per token, sums are fp64: a few ulp of the sum of |d|
        batch = random_batch(seed, dtype=dtype)
        result, gradient = with_gradient(batch, **options)
        logp = batch["logp"].double().requires_grad_()
        exact = truth.step_kto(**batch | {"logp": logp, "ref_logp": batch["ref_logp"].double()}, **options)
        (exact_gradient,) = torch.autograd.grad(exact["loss"], logp)
        assert gradient.dtype == result.loss.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=30 * tolerance, atol=tolerance)
        for name, value in exact.items():
            found = getattr(result, name)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), value, rtol=10 * tolerance, atol=20 * tolerance)


def test_by_hand(on_backend):
    # two completions: tokens 0-2 (steps [0], [1, 2]), correct; token 3 (step [3]), incorrect
    batch = {
        "logp": torch.tensor([-1.0, -2.0, -1.0, -3.0]),
        "ref_logp": torch.tensor([-2.0, -2.0, -3.0, -1.0]),  # d = 1, 0, 2, -2
        "cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32),
        "cu_steps": torch.tensor([0, 1, 3, 4], dtype=torch.int32),
        "labels": torch.tensor([True, False]),
        "step_labels": torch.tensor([1, 0, -1], dtype=torch.int8),
    }
    result, gradient = with_gradient(batch, kl=0.5, step_kl=0.25, beta=1.0, step_beta=2.0)
    s = lambda x: sigmoid(torch.tensor(x)).item()  # noqa: E731
    outcome = ((1 - s(3 - 0.5)) + (1 - s(0.5 + 2))) / 2
    step = ((1 - s(2 * (1 - 0.25))) + (1 - s(2 * (0.25 - 2)))) / 2 / 1
    assert result.log_ratios.tolist() == [3.0, -2.0]
    assert result.step_log_ratios.tolist() == [1.0, 2.0, -2.0]
    assert result.outcome_loss.item() == pytest.approx(outcome)
    assert result.step_loss.item() == pytest.approx(step)
    assert result.loss.item() == pytest.approx(outcome + step)
    assert (result.kl.item(), result.step_kl.item()) == (0.5, 0.25)
    p = lambda x: s(x) * s(-x)  # noqa: E731
    first = -p(2.5) / 2 - 2 * p(1.5) / 2
    second = -p(2.5) / 2 + 2 * p(3.5) / 2
    assert gradient.tolist() == pytest.approx([first, second, second, p(2.5) / 2])


def test_steps_after_the_first_error_are_unlabelled_when_masked(on_backend):
    batch, _ = select(random_batch(completions=2, steps=1), [0, 1])
    n = 12
    batch = {
        "logp": -torch.rand(n),
        "ref_logp": -torch.rand(n),
        "cu_seqlens": torch.tensor([0, 6, 12], dtype=torch.int32),
        "cu_steps": torch.arange(0, n + 1, 2, dtype=torch.int32),
        "labels": batch["labels"],
        "step_labels": torch.tensor([1, 0, 1, -1, 0, 0], dtype=torch.int8),
    }
    masked, gradient = with_gradient(batch, after_first_error="mask")
    by_hand = torch.tensor([1, 0, -1, -1, 0, -1], dtype=torch.int8)
    expected, expected_gradient = with_gradient(batch | {"step_labels": by_hand})
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(masked.step_loss, expected.step_loss)
    kept, _ = with_gradient(batch)
    assert not torch.equal(masked.step_loss, kept.step_loss)


@pytest.mark.parametrize("label", [True, False])
def test_policy_equal_to_reference(label, on_backend):
    batch = random_batch(completions=5)
    batch["logp"] = batch["ref_logp"].clone()
    batch["labels"] = torch.full((5,), label)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.6, "outcome_weight": 0.8}
    result, gradient = with_gradient(batch, beta=0.3, step_weight=0.0, **weights)
    lam = 1.2 if label else 0.6
    assert result.outcome_loss.item() == pytest.approx(0.5 * lam)
    assert result.log_ratios.eq(0).all()
    size = 0.8 * lam * 0.3 / (4 * 5)
    assert gradient.tolist() == pytest.approx([-size if label else size] * len(gradient))


def plain_kto(policy_logps, reference_logps, labels, beta, z, desirable_weight, undesirable_weight):
    """The KTO loss over sequence log-probs, as preference trainers compute it: by class, then one mean."""
    chosen = [i for i, label in enumerate(labels) if label]
    rejected = [i for i, label in enumerate(labels) if not label]
    ratios = policy_logps - reference_logps
    chosen_losses = 1 - torch.sigmoid(beta * (ratios[chosen] - z))
    rejected_losses = 1 - torch.sigmoid(beta * (z - ratios[rejected]))
    return torch.cat([desirable_weight * chosen_losses, undesirable_weight * rejected_losses]).mean()


@pytest.mark.parametrize("z", [0.0, 1.4])
def test_without_the_step_term_it_is_kto(z, on_backend):
    dtype, _ = FINEST[on_backend]
    batch = random_batch(seed=2, completions=12, dtype=dtype)
    cu = batch["cu_seqlens"].tolist()
    logp = batch["logp"].requires_grad_()
    sums = [torch.stack([x[a:b].sum() for a, b in itertools.pairwise(cu)]) for x in (logp, batch["ref_logp"])]
    expected = plain_kto(*sums, batch["labels"].tolist(), 0.2, z, 1.5, 0.5)
    (expected_gradient,) = torch.autograd.grad(expected, logp)
    result, gradient = with_gradient(
        batch, beta=0.2, kl=z, desirable_weight=1.5, undesirable_weight=0.5, step_weight=0.0
    )
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def sums_of_parts(batch, parts, **options):
    """loss, outcome_loss, step_loss and the gradient from micro-batches with the counts of the whole."""
    completions = sum(len(chosen) for chosen in parts)
    labels = (select(batch, [i])[0]["step_labels"] for chosen in parts for i in chosen)
    supervised = sum(bool((x != -1).any()) for x in labels)
    losses, gradient = torch.zeros(3, dtype=batch["logp"].dtype), torch.zeros_like(batch["logp"])
    for i, chosen in enumerate(parts):
        part, tokens = select(batch, chosen)
        counts = (completions, supervised) if i else (torch.tensor(completions), torch.tensor(float(supervised)))
        result, part_gradient = with_gradient(part, num_completions=counts[0], num_supervised=counts[1], **options)
        losses += torch.stack(result[:3]).detach()
        gradient[tokens] = part_gradient
    return *losses, gradient


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masking", ["keep", "mask"])
def test_micro_batches_with_global_counts_add_up(reduction, masking, on_backend):
    dtype, tolerance = FINEST[on_backend]
    batch = random_batch(seed=4, completions=9, dtype=dtype)
    options = {"kl": 0.2, "step_kl": 0.1, "step_reduction": reduction, "after_first_error": masking}
    whole, whole_gradient = with_gradient(batch, **options)
    parts = [0, 1, 2, 3], [4], [5, 6, 7, 8]
    for found, expected in zip(sums_of_parts(batch, parts, **options), (*whole[:3], whole_gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=3 if INTERPRETING else 40, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(6)), cut=st.integers(1, 5))
def test_neither_packing_order_nor_micro_batches_matter(name, seed, order, cut):
    dtype, tolerance = FINEST[name]
    batch = random_batch(seed, completions=6, dtype=dtype)
    permuted, tokens = select(batch, order)
    options = {"kl": 0.2, "after_first_error": "mask"}
    with backend(name):
        result, gradient = with_gradient(batch, **options)
        other, other_gradient = with_gradient(permuted, **options)
        loss, _, _, split_gradient = sums_of_parts(batch, (order[:cut], order[cut:]), **options)
    torch.testing.assert_close(result.loss, other.loss, rtol=tolerance, atol=tolerance / 100)
    torch.testing.assert_close(result.loss.detach(), loss, rtol=tolerance, atol=tolerance / 100)
    torch.testing.assert_close(gradient[tokens], other_gradient, rtol=tolerance, atol=tolerance / 1e4)
    torch.testing.assert_close(gradient, split_gradient, rtol=tolerance, atol=tolerance / 1e4)
    torch.testing.assert_close(result.log_ratios[list(order)], other.log_ratios, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("name", BACKENDS[1:])
@settings(max_examples=6 if INTERPRETING else 60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    completions=st.integers(1, 30),
    steps=st.integers(1, 12),
    tokens=st.sampled_from([1, 2, 30]),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_equals_the_reference_backend(name, seed, completions, steps, tokens, options):
    batch = random_batch(seed, *affordable(name, completions, steps, tokens))
    with backend(name):
        found = with_gradient(batch, **options)
    with backend("reference"):
        expected = with_gradient(batch, **options)
    # both sum fp32 differences in fp64 and round the results once, so they agree to about one fp32 ulp
    torch.testing.assert_close(tuple(found[0]), tuple(expected[0]), rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS[1:])
@pytest.mark.parametrize("masking", ["keep", "mask"])
@pytest.mark.parametrize("long", [True, False], ids=["long steps", "short steps"])
@pytest.mark.parametrize(
    "marks", [{}, {0: 0}, {1: 1, 5: 0}, {6: 1, 7: 0}, {3: -1, 4: 0, 5: 0}], ids=lambda marks: str(marks)
)
def test_completions_that_span_many_blocks(name, marks, long, masking):
    """Two, one unlabelled but for the marked steps, one correct but for them, between short ones."""
    length = (24 if long else 3) * (1 if INTERPRETING else 220)
    step_lengths = [1, 2, *[length] * 8, 3, *[length] * 8, 1]
    seq_steps = [1, 1, 8, 1, 8, 1]
    step_labels = torch.tensor([1, 0, *[-1] * 8, -1, *[1] * 8, 0], dtype=torch.int8)
    for step, label in marks.items():
        step_labels[2 + step] = step_labels[11 + step] = label
    cu_steps = torch.tensor([0, *step_lengths]).cumsum(0)
    n = int(cu_steps[-1])
    generator = torch.Generator().manual_seed(0)
    batch = {
        "logp": -torch.rand(n, generator=generator) * 0.1,
        "ref_logp": -torch.rand(n, generator=generator) * 0.1,
        "cu_seqlens": cu_steps[torch.tensor([0, *seq_steps]).cumsum(0)].int(),
        "cu_steps": cu_steps.int(),
        "labels": torch.tensor([True, False] * 3),
        "step_labels": step_labels,
    }
    with backend(name):
        found = with_gradient(batch, after_first_error=masking)
    with backend("reference"):
        expected = with_gradient(batch, after_first_error=masking)
    torch.testing.assert_close(tuple(found[0]), tuple(expected[0]), rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("completions", "steps", "tokens"),
    [(1, 1, 100_000), (1, 5000, 1), (5000, 1, 1), (40, 200, 3), (3, 1, 50_000)],
    ids=["one long step", "short steps", "short completions", "many steps", "long steps"],
)
def test_extreme_shapes_match_the_truth(completions, steps, tokens, on_backend):
    completions, steps, tokens = affordable(on_backend, completions, steps, tokens)
    n = completions * steps * tokens
    ref_logp = -torch.rand(n, generator=torch.Generator().manual_seed(0))
    batch = {
        "logp": ref_logp + 0.01 * torch.randn(n, generator=torch.Generator().manual_seed(1)),
        "ref_logp": ref_logp,
        "cu_seqlens": torch.arange(0, n + 1, steps * tokens, dtype=torch.int32),
        "cu_steps": torch.arange(0, n + 1, tokens, dtype=torch.int32),
        "labels": torch.arange(completions) % 2 == 0,
        "step_labels": (torch.arange(completions * steps) % 3 - 1).to(torch.int8),
    }
    result, gradient = with_gradient(batch)
    d = batch["logp"].double() - ref_logp.double()
    r_B, r_S = d.view(completions, -1).sum(1), d.view(-1, tokens).sum(1)
    # each difference is rounded to fp32 (half an ulp of 1 at most), the sums are not
    torch.testing.assert_close(result.log_ratios.double(), r_B, rtol=1e-6, atol=6e-8 * (n / completions) ** 0.5)
    torch.testing.assert_close(result.step_log_ratios.double(), r_S, rtol=1e-6, atol=6e-8 * tokens**0.5 + 1e-7)
    assert torch.isfinite(gradient).all()
    if completions * steps <= 200:
        exact = truth.step_kto(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        torch.testing.assert_close(result.loss.double(), exact["loss"], rtol=1e-6, atol=1e-6)


def test_bitwise_reproducible_and_independent_of_the_thread_count(on_backend):
    batch = random_batch(1, *affordable(on_backend, 3000, 10, 20))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            result, gradient = with_gradient(batch, kl=0.1)
            results.append((*result, gradient))
    finally:
        torch.set_num_threads(threads)
    if on_backend == "reference":  # torch's own reductions: reproducible at one thread count
        results = results[1:3]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def empty():
    zero = torch.zeros(1, dtype=torch.int32)
    return {
        "logp": torch.zeros(0),
        "ref_logp": torch.zeros(0),
        "cu_seqlens": zero,
        "cu_steps": zero,
        "labels": torch.zeros(0, dtype=torch.bool),
        "step_labels": torch.zeros(0, dtype=torch.int8),
    }


@pytest.mark.parametrize("counts", [{}, {"num_completions": 4, "num_supervised": 0}], ids=["own", "global"])
def test_empty_batch_is_zero_with_a_graph(counts, on_backend):
    result, gradient = with_gradient(empty(), **counts)
    assert [x.item() for x in result[:3]] == [0.0, 0.0, 0.0]
    assert result.loss.requires_grad
    assert gradient.shape == (0,)


@pytest.mark.parametrize("value", [-1, 0, 1], ids=["no labelled step", "only incorrect", "only correct"])
@pytest.mark.parametrize("label", [True, False], ids=["only desirable", "only undesirable"])
@pytest.mark.parametrize("completions", [1, 4])
def test_one_sided_batches(completions, label, value, on_backend):
    dtype, _ = FINEST[on_backend]
    batch = random_batch(completions=completions, dtype=dtype)
    batch["labels"][:] = label
    batch["step_labels"][:] = value
    result, gradient = with_gradient(batch)
    exact = truth.step_kto(**batch)
    torch.testing.assert_close(result.loss, exact["loss"])
    assert torch.isfinite(gradient).all()
    if value == -1:
        assert result.step_loss.item() == 0


def test_saturated_values_stay_finite(on_backend):
    batch = random_batch(completions=2, steps=1, tokens=1)
    batch["logp"], batch["ref_logp"] = torch.tensor([-1e6, 0.0]), torch.tensor([0.0, -1e6])
    result, gradient = with_gradient(batch, beta=5.0)
    assert torch.isfinite(result.loss)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_log_probs_are_subtracted_in_fp32(dtype, on_backend):
    batch = random_batch(seed=6, dtype=dtype)
    result, gradient = with_gradient(batch)
    upcast = batch | {"logp": batch["logp"].float(), "ref_logp": batch["ref_logp"].float()}
    expected, expected_gradient = with_gradient(upcast)
    assert torch.equal(result.loss, expected.loss)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_only_the_loss_has_a_gradient(on_backend):
    batch = on_device(random_batch())
    points = {"kl": torch.tensor(0.3, requires_grad=True), "step_kl": torch.tensor(0.1, requires_grad=True)}
    logp, ref_logp = batch["logp"].requires_grad_(), batch["ref_logp"].requires_grad_()
    result = step_kto(**batch, **points)
    assert isinstance(result, StepKTOOutput)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in result[1:])
    result.loss.backward()
    assert ref_logp.grad is points["kl"].grad is points["step_kl"].grad is None
    assert torch.equal(result.logp, logp)
    as_floats, _ = with_gradient(batch, kl=0.3, step_kl=0.1)
    assert torch.equal(as_floats.loss, result.loss.cpu())


def test_non_contiguous_inputs(on_backend):
    batch = on_device(random_batch(seed=8))
    strided = {name: torch.stack([x, x], 1)[:, 0] for name, x in batch.items()}
    assert not strided["logp"].is_contiguous()
    (a, gradient), (b, strided_gradient) = with_gradient(batch), with_gradient(strided)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(gradient, strided_gradient)


def test_no_uninitialised_memory_is_read(on_backend):
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        result, gradient = with_gradient(random_batch())
        nothing, _ = with_gradient(empty())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in (*result, gradient, *nothing))


@pytest.mark.parametrize("options", [OPTIONS["defaults"], OPTIONS["everything"]], ids=["defaults", "everything"])
def test_gradcheck(options, on_backend):
    if FINEST[on_backend][0] != torch.float64:
        pytest.skip("finite differences need float64")
    batch = random_batch(completions=3, steps=3, tokens=3, dtype=torch.float64)
    logp = batch.pop("logp").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: step_kto(x, **batch, **options).loss, logp)


def test_opcheck(on_backend):
    batch = on_device(random_batch(completions=3))
    device = batch["logp"].device
    batch["logp"].requires_grad_()
    numbers = (0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, "mean", "keep", "kto")
    points = torch.tensor(0.1, device=device), torch.tensor(0.2, device=device)
    torch.library.opcheck(step_kto_forward, (*batch.values(), *points, None, None, *numbers, True))
    counts = torch.tensor(5.0, device=device).double(), torch.tensor(4.0, device=device).double()
    torch.library.opcheck(step_kto_forward, (*batch.values(), *points, *counts, *numbers, False))
    torch.library.opcheck(step_kto_backward, (torch.tensor(2.0), torch.rand(5)))


def test_compiles_without_graph_breaks_and_checks_values_when_it_runs(on_backend):
    def function(batch, kl, beta):
        result = step_kto(**batch, kl=kl, step_kl=0.1, beta=beta, num_completions=8, validate=True)
        return result.loss, result.log_ratios, result.kl

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed, beta in ((0, 0.1), (1, 0.2), (2, 0.7)):
        batch = on_device(random_batch(seed, completions=3 + seed))
        batch["logp"].requires_grad_()
        expected, found = (f(batch, torch.tensor(0.4), beta) for f in (function, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        gradients = [torch.autograd.grad(x[0], batch["logp"])[0] for x in (expected, found)]
        assert torch.equal(*gradients)
    batch["step_labels"][1] = 2
    with pytest.raises(ValueError, match=r"step_labels of shape .* holds 2 at position 1"):
        compiled(batch, torch.tensor(0.4), 0.7)


def test_second_derivatives_are_refused():
    batch = random_batch()
    logp = batch["logp"].requires_grad_()
    (gradient,) = torch.autograd.grad(step_kto(**batch).loss * logp.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_apo_zero_unpaired_fixes_the_reference_points_at_zero(on_backend):
    batch = random_batch()
    apo, gradient = with_gradient(batch, loss_type="apo_zero_unpaired", kl=torch.tensor(0.0), step_kl=0.0)
    kto, kto_gradient = with_gradient(batch)
    assert torch.equal(apo.loss, kto.loss)
    assert torch.equal(gradient, kto_gradient)


GOOD = random_batch(seed=0, completions=2, steps=2, tokens=2)
N, B, S = len(GOOD["logp"]), len(GOOD["labels"]), len(GOOD["step_labels"])
BAD = {
    "logp rank": (ValueError, rf"logp has shape \({N}, 1\)", {"logp": GOOD["logp"][:, None]}),
    "logp dtype": (TypeError, "logp has dtype torch.int64", {"logp": GOOD["logp"].long()}),
    "ref_logp N": (ValueError, rf"ref_logp has shape .*N={N}", {"ref_logp": GOOD["ref_logp"][1:]}),
    "ref_logp None": (TypeError, "ref_logp is a NoneType", {"ref_logp": None}),
    "ref_logp device": (ValueError, "ref_logp .* is on meta", {"ref_logp": GOOD["ref_logp"].to("meta")}),
    "labels int": (TypeError, "labels has dtype torch.int64.*bool", {"labels": GOOD["labels"].long()}),
    "labels B": (ValueError, rf"labels has shape \(1,\).*B={B}", {"labels": GOOD["labels"][:1]}),
    "step_labels dtype": (
        TypeError,
        "step_labels has dtype torch.bool",
        {"step_labels": GOOD["step_labels"] > 0},
    ),
    "step_labels S": (
        ValueError,
        rf"step_labels has shape .*S={S}",
        {"step_labels": GOOD["step_labels"][1:]},
    ),
    "step_labels value": (
        ValueError,
        "step_labels .* holds -2 at position 0",
        {"step_labels": torch.full((S,), -2, dtype=torch.int8)},
    ),
    "cu_seqlens dtype": (
        TypeError,
        "cu_seqlens has dtype torch.int64",
        {"cu_seqlens": GOOD["cu_seqlens"].long()},
    ),
    "cu_steps start": (ValueError, "cu_steps .* starts at 1", {"cu_steps": GOOD["cu_steps"] + 1}),
    "N mismatch": (ValueError, "ends at", {"logp": torch.zeros(N + 1), "ref_logp": torch.zeros(N + 1)}),
    "beta": (ValueError, "beta is 0", {"beta": 0.0}),
    "step_beta": (TypeError, "step_beta is '0.1'", {"step_beta": "0.1"}),
    "weight": (ValueError, "step_undesirable_weight is -1", {"step_undesirable_weight": -1.0}),
    "weight nan": (ValueError, "outcome_weight is nan", {"outcome_weight": float("nan")}),
    "step_reduction": (ValueError, "step_reduction is 'max'.*'mean', 'sum'", {"step_reduction": "max"}),
    "after_first_error": (ValueError, "after_first_error is None", {"after_first_error": None}),
    "loss_type": (ValueError, "loss_type is 'dpo'", {"loss_type": "dpo"}),
    "kl": (ValueError, "kl is inf", {"kl": float("inf")}),
    "kl tensor nan": (ValueError, "kl is nan", {"kl": torch.tensor(float("nan"))}),
    "kl 1-d": (ValueError, r"step_kl has shape \(1,\)", {"step_kl": torch.zeros(1)}),
    "kl int tensor": (TypeError, "kl has dtype torch.int64", {"kl": torch.tensor(1)}),
    "kl None": (TypeError, "kl is None", {"kl": None}),
    "apo float": (
        ValueError,
        "step_kl is 0.5.*apo_zero_unpaired",
        {"step_kl": 0.5, "loss_type": "apo_zero_unpaired"},
    ),
    "apo tensor": (
        ValueError,
        "kl is 0.5.*apo_zero_unpaired",
        {"kl": torch.tensor(0.5), "loss_type": "apo_zero_unpaired"},
    ),
    "num_completions": (ValueError, "num_completions is -1", {"num_completions": -1}),
    "num_completions 0": (ValueError, "num_completions is 0.*above 0", {"num_completions": 0}),
    "num_completions float": (TypeError, "num_completions is 2.0", {"num_completions": 2.0}),
    "num_supervised": (ValueError, "num_supervised is 0.*above 0", {"num_supervised": torch.tensor(0)}),
    "num_supervised rank": (
        ValueError,
        r"num_supervised has shape \(2,\)",
        {"num_supervised": torch.ones(2)},
    ),
    "validate": (TypeError, "validate is 'yes'", {"validate": "yes"}),
}


@pytest.mark.parametrize("on_backend", BACKENDS[:2], indirect=True)  # input is checked before a kernel sees it
@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(error, message, change, on_backend):
    assert (GOOD["step_labels"] != -1).any()
    with pytest.raises(error, match=message):
        step_kto(**GOOD | change)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket._qualified_op_name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", BACKENDS[2:])
@pytest.mark.parametrize("counts", [None, 5.0], ids=["own counts", "global counts"])
def test_triton_makes_the_host_wait_for_nothing(name, counts, monkeypatch):
    from stepkto_kernels.step_kto import triton_forward

    monkeypatch.setattr(triton_forward, "COUNTS_READ_BY_ALL", 2)
    with backend(name):
        batch = on_device(random_batch())
    device = batch["logp"].device
    point = torch.zeros((), device=device)
    count = None if counts is None else torch.full((), counts, dtype=torch.float64, device=device)
    numbers = (0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, "mean", "keep")
    with Recorder() as recorder:
        triton_forward.step_kto_forward(*batch.values(), point, point, count, count, *numbers)
    harmless = {"new_empty", "empty", "empty_like", "split_with_sizes", "view", "detach", "sum"}
    interpreter = {"set_", "copy_"} if INTERPRETING else set()
    assert recorder.names <= {f"aten::{name}" for name in harmless | interpreter}


@pytest.mark.parametrize("name", BACKENDS[2:])
def test_triton_counts_are_the_same_however_they_are_added(name, monkeypatch):
    from stepkto_kernels.step_kto import triton_forward

    batch = random_batch(5, *affordable(name, 300, 10, 20, most=400))
    with backend(name):
        expected = with_gradient(batch)
        monkeypatch.setattr(triton_forward, "COUNTS_READ_BY_ALL", 1)
        found = with_gradient(batch)
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("name", BACKENDS[2:])
@pytest.mark.skipif(INTERPRETING, reason="a CUDA graph needs a GPU")
def test_triton_runs_in_a_cuda_graph(name):
    with backend(name):
        batch, other = on_device(random_batch(seed=0)), on_device(random_batch(seed=0))
        other["logp"] = other["logp"] * 0.5
        expected = step_kto(**other)  # compiles the kernels, too
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step_kto(**batch)
        batch["logp"].copy_(other["logp"])
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
