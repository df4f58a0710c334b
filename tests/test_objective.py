"""Class weights, reference points, and a gradient that does not depend on how the batch is split."""

import copy
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stepkto_kernels import linear_logp, step_kto
from torch.nn.functional import log_softmax

from stepkto_fast.objective import (
    LaggedPoints,
    accumulate_gradients,
    class_weights,
    estimate_points,
    log_probs,
    mismatch,
    seen_labels,
)
from stepkto_fast.packing import pack
from stepkto_fast.policy import head, hidden_states
from stepkto_fast.recipe import Recipe
from stepkto_fast.update import batch_order


def gradients(model, rollouts, recipe, points=(0.1, 0.05)):
    model = copy.deepcopy(model)
    result = accumulate_gradients(model, rollouts, recipe, class_weights(rollouts, recipe), points)
    return result, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_log_probs_are_the_models_own(model, rollouts):
    found = log_probs(model, rollouts, Recipe(max_tokens_per_micro_batch=100, temperature=0.7))
    model.set_attn_implementation("sdpa")
    for r, logp in zip(rollouts, found, strict=True):
        logits = model(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0, len(r.prompt_ids) - 1 : -1]
        expected = log_softmax(logits / 0.7, -1).gather(-1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_formula(model, rollouts):
    """Against a plain loop over completions and steps, with the formula written out."""
    for r in rollouts[::3]:
        r.step_labels[0] = -1
    recipe = Recipe(beta=0.3, step_beta=0.7, outcome_weight=0.8, step_weight=1.2)
    w = class_weights(rollouts, recipe)
    result, _ = gradients(model, rollouts, recipe)
    outcome, step = [], []
    for r, logp in zip(rollouts, log_probs(model, rollouts, recipe), strict=True):
        d = logp - torch.tensor(r.ref_logps)
        lam, sign = (w["desirable_weight"], 1) if r.label else (w["undesirable_weight"], -1)
        outcome.append(lam * (1 - torch.sigmoid(torch.tensor(0.3) * sign * (d.sum() - 0.1))))
        steps = []
        for begin, end, label in zip([0, *r.step_ends], r.step_ends, r.step_labels, strict=False):
            if label >= 0:
                lam, sign = (w["step_desirable_weight"], 1) if label else (w["step_undesirable_weight"], -1)
                steps.append(lam * (1 - torch.sigmoid(torch.tensor(0.7) * sign * (d[begin:end].sum() - 0.05))))
        if steps:
            step.append(torch.stack(steps).mean())
    outcome, step = torch.stack(outcome).mean(), torch.stack(step).mean()
    assert result.outcome_loss == pytest.approx(float(outcome), abs=1e-5)
    assert result.step_loss == pytest.approx(float(step), abs=1e-5)
    assert result.loss == pytest.approx(float(0.8 * outcome + 1.2 * step), abs=1e-5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(budget=st.integers(20, 2000), order=st.randoms(use_true_random=False))
def test_neither_micro_batches_nor_packing_order_change_loss_or_gradient(model, rollouts, budget, order):
    whole, expected = gradients(model, rollouts, Recipe(max_tokens_per_micro_batch=10**6))
    shuffled = order.sample(rollouts, len(rollouts))
    split, found = gradients(model, shuffled, Recipe(max_tokens_per_micro_batch=budget))
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_balanced_class_weights(rollouts):
    weights = class_weights(rollouts, Recipe())
    right = sum(r.label for r in rollouts)
    assert weights["desirable_weight"] * right == pytest.approx(weights["undesirable_weight"] * (len(rollouts) - right))
    steps = [x for r in rollouts for x in r.step_labels]
    total = weights["step_desirable_weight"] * steps.count(1) + weights["step_undesirable_weight"] * steps.count(0)
    assert total == pytest.approx(len(steps))
    assert class_weights([r for r in rollouts if r.label], Recipe())["desirable_weight"] == 1.0
    given = class_weights(rollouts, Recipe(class_weights="none", step_undesirable_weight=3.0))
    assert given == {
        "desirable_weight": 1.0, "undesirable_weight": 1.0, "step_desirable_weight": 1.0,
        "step_undesirable_weight": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (3, [3]), (1, [1])])
def test_a_short_last_batch_joins_the_one_before_it(rollouts, count, sizes):
    batches = batch_order(rollouts[:count], Recipe(train_batch_size=4), 0)
    assert [len(b) for b in batches] == sizes
    assert sorted((r.problem_id, r.sample) for b in batches for r in b) == [
        (r.problem_id, r.sample) for r in rollouts[:count]
    ]
    assert batches == batch_order(rollouts[:count], Recipe(train_batch_size=4), 0)
    if count > 4:
        assert batches != batch_order(rollouts[:count], Recipe(train_batch_size=4), 1)


def test_mask_after_first_error():
    assert seen_labels([1, 0, 1, 0], "mask") == [1, 0, -1, -1]
    assert seen_labels([1, 0, 1, 0], "keep") == [1, 0, 1, 0]
    assert seen_labels([1, -1, 1], "mask") == [1, -1, 1]


def test_zero_and_lagged_points(model, rollouts):
    lagged = LaggedPoints()
    assert estimate_points(model, None, rollouts, Recipe(reference_points="zero"), lagged, 0) == (0.0, 0.0)
    recipe = Recipe(reference_points="lagged")
    assert estimate_points(model, None, rollouts, recipe, lagged, 0) == (0.0, 0.0), "starts at 0"
    lagged.update(2.0, -1.0)
    assert estimate_points(model, None, rollouts, recipe, lagged, 0) == pytest.approx((0.2, -0.1))
    lagged.update(2.0, -1.0)
    assert (lagged.outcome, lagged.step) == pytest.approx((0.38, -0.19))


@torch.no_grad()
def test_exact_points_are_the_mean_kl_of_completions_and_steps(model, rollouts):
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.3 * torch.randn_like(reference.lm_head.weight))
    recipe = Recipe(reference_points="exact", max_tokens_per_micro_batch=150)
    found = estimate_points(model, reference, rollouts, recipe, LaggedPoints(), 0)
    model.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    sums, count = [], 0
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        p, q = (m(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1) for m in (model, reference))
        sums.append(float((p.exp() * (p - q)).sum()))
        count += len(r.step_ends)
    assert found[0] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    assert found[1] == pytest.approx(sum(sums) / count, rel=1e-4)


def test_mismatched_points_pair_prompts_with_other_prompts(model, rollouts):
    pairs = mismatch(rollouts, seed=3)
    by_prompt = {
        tuple(r.prompt_ids): {tuple(o.completion_ids) for o in rollouts if o.problem_id == r.problem_id}
        for r in rollouts
    }
    assert [p.prompt_ids for p in pairs] == [r.prompt_ids for r in rollouts]
    assert not any(tuple(p.completion_ids) in by_prompt[tuple(p.prompt_ids)] for p in pairs)
    assert pairs == mismatch(rollouts, seed=3)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.3 * torch.randn_like(reference.lm_head.weight))
    recipe = Recipe(reference_points="mismatched")
    found = estimate_points(model, reference, rollouts, recipe, LaggedPoints(), 3)
    ratios = [p - q for p, q in zip(log_probs(model, pairs, recipe), log_probs(reference, pairs, recipe), strict=True)]
    assert found[0] == pytest.approx(float(torch.stack([x.sum() for x in ratios]).mean()), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="at least two prompts"):
        mismatch([r for r in rollouts if r.problem_id == 0], seed=0)


def test_only_the_given_negative_points_are_clamped(model, rollouts):
    """An unclamped estimate below zero acts as zero."""
    zero, _ = gradients(model, rollouts, Recipe(), points=(0.0, 0.0))
    below, _ = gradients(model, rollouts, Recipe(), points=(-5.0, -5.0))
    above, _ = gradients(model, rollouts, Recipe(), points=(5.0, 5.0))
    assert zero.loss == below.loss != above.loss


def test_unlabelled_steps_and_single_class_batches_train(model, rollouts):
    rng = random.Random(0)
    for r in rollouts:
        r.step_labels = [-1] * len(r.step_labels)
    result, found = gradients(model, rng.sample(rollouts, 3), Recipe())
    assert result.step_loss == 0.0
    assert found.isfinite().all()


def test_importance_scales_the_gradient_of_each_token_and_nothing_else(model, rollouts):
    """Against d loss / d logp of every token, from the loss without weights, times the weight."""
    recipe, rng = Recipe(max_tokens_per_micro_batch=150), random.Random(5)
    plain, _ = gradients(model, rollouts, recipe)
    weighted = copy.deepcopy(rollouts)
    for r in weighted[1:]:  # the first has none: 1 for each of its tokens
        r.importance = [rng.uniform(0.0, 2.0) for _ in r.completion_ids]
    result, found = gradients(model, weighted, recipe)
    for name in ("loss", "outcome_loss", "step_loss"):
        assert getattr(result, name) == pytest.approx(getattr(plain, name), abs=1e-6)
    torch.testing.assert_close(result.sequence_logps, plain.sequence_logps, atol=1e-4, rtol=1e-6)

    batch, twin = pack(weighted), copy.deepcopy(model)
    logp = linear_logp(hidden_states(twin, batch), target=batch.target, **head(twin))
    output = step_kto(
        logp, batch.ref_logp, batch.cu_seqlens, batch.cu_steps, batch.labels, batch.step_labels, kl=0.1, step_kl=0.05,
        beta=recipe.beta, step_beta=recipe.step_beta, **class_weights(rollouts, recipe),
    )  # fmt: skip
    (of_tokens,) = torch.autograd.grad(output.loss, logp, retain_graph=True)
    logp.backward(of_tokens * batch.importance)
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert (found - gradients(model, rollouts, recipe)[1]).norm() > 0.1 * found.norm(), "the weights matter"
