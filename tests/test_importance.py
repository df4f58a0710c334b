"""Importance weights against a computation in exact steps of fp64, and what they do to a gradient."""

import math

import pytest
import torch

from stepkto_fast.errors import RunError
from stepkto_fast.importance import importance_weights
from stepkto_fast.objective import accumulate_gradients, class_weights, log_probs
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout


def drawn(logps):
    """A rollout whose tokens the engine gave these log-probs."""
    return Rollout(3, 1, "", [1], "", list(range(len(logps))), logps, True)


ENGINE = [[-1.0, -2.0, -0.5], [-3.0], [-0.25, -0.75]]
TRAINER = [[-0.5, -2.25, -0.5], [-1.0], [-0.75, -1.0]]


def of(correction, cap=2.0):
    recomputed = [torch.tensor(x) for x in TRAINER]
    return importance_weights(
        recomputed, [drawn(x) for x in ENGINE], Recipe(importance_correction=correction, importance_cap=cap)
    )


def test_weights_of_tokens_and_of_sequences():
    exact = [[p - q for p, q in zip(*pair, strict=True)] for pair in zip(TRAINER, ENGINE, strict=True)]
    tokens, _ = of("token")
    assert tokens == [[pytest.approx(min(math.exp(d), 2.0), rel=1e-15) for d in row] for row in exact]
    sequences, _ = of("sequence")
    assert sequences == [[pytest.approx(min(math.exp(sum(row)), 2.0), rel=1e-15)] * len(row) for row in exact]
    assert tokens[1] == sequences[1] == [2.0], "exp(2) is cut at the cap"
    assert of("none")[0] == [[], [], []]


def test_metrics_are_the_same_whether_weights_are_asked_for_or_not():
    found = {correction: of(correction)[1] for correction in ("none", "token", "sequence")}
    assert found["none"] == found["token"] == found["sequence"]
    metrics, ratios = found["none"], [math.exp(d) for d in (0.5, -0.25, 0, 2, -0.5, -0.25)]
    assert metrics["importance/sampling_logp_difference/mean"] == pytest.approx(3.5 / 6)
    assert metrics["importance/sampling_logp_difference/max"] == 2
    assert metrics["importance/token_ratio/min"] == pytest.approx(math.exp(-0.5))
    assert metrics["importance/token_ratio/mean"] == pytest.approx(sum(ratios) / 6)
    assert metrics["importance/token_ratio/max"] == pytest.approx(math.exp(2))
    assert metrics["importance/token_ratio/capped"] == pytest.approx(1 / 6)
    weights = [min(x, 2.0) for x in ratios]
    expected = sum(weights) ** 2 / (6 * sum(w * w for w in weights))
    assert metrics["importance/token_ratio/effective_sample_size"] == pytest.approx(expected)
    weights = [math.exp(0.25), 2.0, math.exp(-0.75)]
    assert metrics["importance/sequence_ratio/capped"] == pytest.approx(1 / 3)
    assert metrics["importance/sequence_ratio/mean"] == pytest.approx((math.exp(0.25) + math.exp(2) + weights[2]) / 3)
    expected = sum(weights) ** 2 / (3 * sum(w * w for w in weights))
    assert metrics["importance/sequence_ratio/effective_sample_size"] == pytest.approx(expected)
    assert len(metrics) == 12


def test_without_a_mismatch_everything_is_one():
    recomputed = [torch.tensor(x) for x in ENGINE]
    weights, metrics = importance_weights(
        recomputed, [drawn(x) for x in ENGINE], Recipe(importance_correction="sequence")
    )
    assert weights == [[1.0] * len(x) for x in ENGINE]
    for level in ("token", "sequence"):
        assert metrics[f"importance/{level}_ratio/effective_sample_size"] == 1
        assert metrics[f"importance/{level}_ratio/capped"] == 0


@pytest.mark.parametrize(("engine", "trainer"), [([-1.0, math.nan], [-1.0, -1.0]), ([-1.0, -1.0], [-math.inf, -1.0])])
def test_log_probs_that_are_not_finite_are_named(engine, trainer):
    with pytest.raises(RunError, match=r"problem 3 sample 1: a log-prob .* is not finite"):
        importance_weights([torch.tensor(trainer)], [drawn(engine)], Recipe())


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="problem 3 sample 1: 1 recomputed log-probs for 2"):
        importance_weights([torch.tensor([-1.0])], [drawn([-1.0, -1.0])], Recipe())


def test_one_weight_for_all_tokens_scales_the_gradient(model, rollouts):
    """A sequence weight w makes the gradient of one completion w times as large, and leaves its loss."""
    recipe = Recipe(importance_correction="sequence", importance_cap=3.0, beta=0.5, step_beta=0.5)
    r = rollouts[0]
    own = log_probs(model, [r], recipe)
    r.logps = [x - math.log(1.5) / len(own[0]) for x in own[0].tolist()]
    ((w, *_),), _ = importance_weights(own, [r], recipe)
    assert w == pytest.approx(1.5, rel=1e-5)
    found = []
    for weights in ([], [w] * len(r.logps)):
        r.importance = weights
        model.zero_grad()
        result = accumulate_gradients(model, [r], recipe, class_weights([r], recipe), (0.0, 0.0))
        found.append((result.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (plain, g), (corrected, weighted) = found
    assert corrected == plain
    assert torch.allclose(weighted, w * g, rtol=1e-4, atol=1e-7)
    assert g.norm() > 1e-3
