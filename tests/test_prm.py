"""The PRM head: pooling, fitting, calibration, audit."""

import copy

import numpy as np
import pytest
import torch

from stepkto_fast.packing import pack
from stepkto_fast.prm import PRMHead, audit, features, fit_prm
from stepkto_fast.recipe import Recipe


@pytest.fixture
def recipe():
    return Recipe(prm_epochs=60, prm_learning_rate=5e-3)


def test_features_are_what_the_head_is_said_to_read(model, rollouts):
    batch = pack(rollouts[:3])
    x = features(model, batch, temperature=1.0)
    hidden = model.config.hidden_size
    assert x.shape == (len(batch.target), 2 * hidden + 2)
    torch.testing.assert_close(x[:, hidden : 2 * hidden], model.get_input_embeddings()(batch.target))
    model.set_attn_implementation("sdpa")
    r = rollouts[0]
    logp = (
        model(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
    )
    mine = x[: len(r.completion_ids)]
    torch.testing.assert_close(
        mine[:, -2], logp.gather(-1, batch.target[: len(mine), None])[:, 0], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(mine[:, -1], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-4)


def test_pooling_is_a_softmax_within_each_step():
    torch.manual_seed(0)
    head = PRMHead(4)
    x = torch.randn(9, 10)
    cu_steps = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    u = head.mlp(x)
    expected = [
        head.out((head.pool(u[a:b]).softmax(0) * u[a:b]).sum(0))[0] for a, b in zip([0, 1, 6], [1, 6, 9], strict=True)
    ]
    torch.testing.assert_close(head(x, cu_steps), torch.stack(expected))


def test_a_fitted_head_finds_wrong_steps_and_leaves_the_policy_alone(model, rollouts, recipe):
    """On a policy with random weights the facts can still be learnt: fitted labels are recovered."""
    before = copy.deepcopy(model.state_dict())
    prm = fit_prm(model, rollouts, recipe, seed=0)
    fitted = [r for r in rollouts if r.problem_id % 5]
    view = audit(
        [p for row in prm.score(fitted, recipe) for p in row],
        [x for r in fitted for x in r.checker_labels],
        0.5,
    )
    assert view["auroc"] > 0.95
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert prm.trunk is model
    again = fit_prm(model, rollouts, recipe, seed=0)
    assert again.score(rollouts, recipe) == prm.score(rollouts, recipe), "the same seed gives the same head"


def test_a_trained_trunk_is_a_copy(model, rollouts):
    before = copy.deepcopy(model.state_dict())
    prm = fit_prm(model, rollouts, Recipe(prm_trunk="trained", prm_epochs=2), seed=0)
    assert prm.trunk is not model
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    moved = [
        not torch.equal(before[k], v) for k, v in prm.trunk.state_dict().items() if "layers" in k and "weight" in k
    ]
    assert all(moved), "the head's gradient reaches every layer of the copy"


def test_scores_do_not_depend_on_the_packing(model, rollouts, recipe):
    prm = fit_prm(model, rollouts, Recipe(prm_epochs=1), seed=0)
    one = prm.score(rollouts, Recipe(max_tokens_per_micro_batch=10**6))
    other = prm.score(rollouts, Recipe(max_tokens_per_micro_batch=60))
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-5)


def test_labels_follow_the_threshold(model, rollouts):
    prm = fit_prm(model, rollouts, Recipe(prm_epochs=1), seed=0)
    prm.head.threshold.fill_(0.25)
    assert prm.label([0.2, 0.25, 0.3]) == [0, 1, 1]


def test_audit_by_hand():
    view = audit([0.9, 0.8, 0.4, 0.3, 0.85], [1, 1, 1, 0, 0], threshold=0.5)
    assert view["precision"] == 0.5  # 0.4 and 0.3 are called wrong, 0.3 is
    assert view["recall"] == 0.5  # of 0.3 and 0.85
    assert view["f1"] == 0.5
    assert view["auroc"] == pytest.approx((2 + 1 + 1) / 6)  # right 0.9, 0.8, 0.4 against wrong 0.3, 0.85
    assert sum(b["count"] for b in view["bins"]) == 5
    ece = (1 * abs(0.9 - 1) + 2 * abs(0.825 - 0.5) + 1 * abs(0.4 - 1) + 1 * abs(0.3 - 0)) / 5
    assert view["ece"] == pytest.approx(ece)


def test_audit_counts_ties_half_and_leaves_undefined_figures_out():
    assert audit([0.5, 0.5], [1, 0], 0.1)["auroc"] == 0.5
    only_right = audit([0.9, 0.1], [1, 1], 0.5)
    assert (only_right["f1"], only_right["recall"], only_right["auroc"]) == (None, None, None)
    assert audit([0.9], [0], 0.5)["precision"] is None
    nothing = audit([], [], 0.5)
    assert (nothing["ece"], nothing["bins"]) == (None, [])
