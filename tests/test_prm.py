"""The PRM head: what it reads, fitting, calibration."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from stepkto_fast import prm as prm_module
from stepkto_fast.errors import RunError
from stepkto_fast.packing import pack
from stepkto_fast.prm import fit_prm
from stepkto_fast.prm_head import HEADS, AttentionHead, LastTokenHead
from stepkto_fast.prm_metrics import audit
from stepkto_fast.recipe import Recipe


@pytest.fixture
def recipe():
    return Recipe(prm_epochs=60, prm_learning_rate=5e-3)


@pytest.fixture
def parts(rollouts):
    """Fitted on, calibrated on; both have right and wrong steps."""
    return [r for r in rollouts if r.problem_id % 5 != 3], [r for r in rollouts if r.problem_id % 5 == 3]


def dense(model, r):
    """The model's outputs over one whole rollout, without packing."""
    model.set_attn_implementation("sdpa")
    return model(torch.tensor([[*r.prompt_ids, *r.completion_ids]]), output_hidden_states=True)


def test_the_attention_head_reads_what_it_is_said_to_read(model, rollouts):
    batch = pack(rollouts[:3])
    x = AttentionHead.read(model, batch, temperature=1.0)
    hidden = model.config.hidden_size
    assert x.shape == (len(batch.target), 2 * hidden + 2)
    torch.testing.assert_close(x[:, hidden : 2 * hidden], model.get_input_embeddings()(batch.target))
    r = rollouts[0]
    mine = x[: len(r.completion_ids)]
    logp = dense(model, r).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(
        mine[:, -2], logp.gather(-1, batch.target[: len(mine), None])[:, 0], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(mine[:, -1], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-4)


def test_the_last_token_head_reads_the_state_of_each_steps_last_token(model, rollouts):
    three = rollouts[:3]
    x = LastTokenHead.read(model, pack(three), temperature=1.0)
    expected = [dense(model, r).hidden_states[-1][0, len(r.prompt_ids) + end - 1] for r in three for end in r.step_ends]
    torch.testing.assert_close(x, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_pooling_is_a_softmax_within_each_step():
    torch.manual_seed(0)
    head = AttentionHead(4)
    x = torch.randn(9, 10)
    cu_steps = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    u = head.mlp(x)
    expected = [
        head.out((head.pool(u[a:b]).softmax(0) * u[a:b]).sum(0))[0] for a, b in zip([0, 1, 6], [1, 6, 9], strict=True)
    ]
    torch.testing.assert_close(head(x, cu_steps), torch.stack(expected))


def test_a_fitted_head_finds_wrong_steps_and_leaves_the_policy_alone(model, rollouts, parts, recipe):
    """On a policy with random weights the facts can still be learnt: fitted labels are recovered."""
    before = copy.deepcopy(model.state_dict())
    prm = fit_prm(model, *parts, recipe, seed=0)
    view = audit(
        [p for row in prm.score(parts[0], recipe) for p in row], [x for r in parts[0] for x in r.step_labels], 0.5
    )
    assert view["auroc"] > 0.95
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert prm.trunk is model
    again = fit_prm(model, *parts, recipe, seed=0)
    assert again.score(rollouts, recipe) == prm.score(rollouts, recipe), "the same seed gives the same head"


@pytest.mark.parametrize("pooling", HEADS)
def test_a_trained_trunk_is_a_copy(model, parts, pooling):
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe(prm_trunk="trained", prm_epochs=2, prm_pooling=pooling)
    prm = fit_prm(model, *parts, recipe, seed=0)
    assert prm.trunk is not model
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    moved = [
        not torch.equal(before[k], v) for k, v in prm.trunk.state_dict().items() if "layers" in k and "weight" in k
    ]
    assert all(moved), "the head's gradient reaches every layer of the copy"
    own = fit_prm(model, *parts, recipe, seed=0, copy_trunk=False)
    assert own.trunk is model
    assert own.score(parts[1], recipe) == prm.score(parts[1], recipe)


def test_a_trained_trunk_teaches_the_last_tokens_state_what_is_wrong(model, parts, monkeypatch):
    """Frozen, random states of a step's last token hardly tell; a trunk that learns to look back does."""
    monkeypatch.setattr(prm_module, "TOKENS_A_STEP", 300)
    loss = {}
    for trunk in ("policy", "trained"):
        recipe = Recipe(prm_pooling="last", prm_trunk=trunk, prm_epochs=16, prm_trunk_learning_rate=3e-3)
        seen = []
        fit_prm(model, *parts, recipe, seed=0, on_step=lambda step, total, x, seen=seen: seen.append(x))
        loss[trunk] = sum(seen[-3:]) / 3
    assert loss["trained"] < 0.5 * loss["policy"], loss


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("pooling", HEADS)
def test_the_loss_is_over_labelled_steps_and_weighs_classes_as_asked(model, parts, pooling, weights, monkeypatch):
    monkeypatch.setattr(prm_module, "TOKENS_A_STEP", 10**6)  # one batch
    fitting = [replace(r, step_labels=[-1, *r.step_labels[1:]]) for r in sorted(parts[0], key=len)]
    fitting[3].step_labels = [-1] * len(fitting[3].step_labels)
    recipe = Recipe(prm_pooling=pooling, prm_class_weights=weights, prm_epochs=1)
    losses = []
    fit_prm(model, fitting, parts[1], recipe, seed=3, on_step=lambda step, total, x: losses.append(x))
    seen = [r for r in fitting if set(r.step_labels) != {-1}]
    batch = pack(seen)
    x = HEADS[pooling].read(model, batch, 1.0)
    torch.manual_seed(3)
    head = HEADS[pooling](model.config.hidden_size)
    head.mean.copy_(x.mean(0))
    head.std.copy_(x.std(0))
    labels = batch.step_labels
    each = binary_cross_entropy_with_logits(head(x, batch.cu_steps), labels.clamp_min(0).float(), reduction="none")
    right, wrong = each[labels == 1], each[labels == 0]
    assert len(right) > len(wrong) > 0
    expected = torch.cat([right, wrong]).mean() if weights == "none" else (right.mean() + wrong.mean()) / 2
    assert losses == [pytest.approx(expected.item(), rel=1e-5)]


def test_features_that_are_not_kept_are_computed_anew(model, parts, monkeypatch):
    monkeypatch.setattr(prm_module, "TOKENS_A_STEP", 300)
    read, calls = AttentionHead.read, []
    monkeypatch.setattr(AttentionHead, "read", staticmethod(lambda *a: calls.append(1) or read(*a)))
    recipe, found = Recipe(prm_epochs=8, prm_learning_rate=5e-3), []
    for budget in (2**30, 1):
        monkeypatch.setattr(prm_module, "CACHED_BYTES", budget)
        calls.clear()
        losses = []
        fit_prm(model, *parts, recipe, seed=0, on_step=lambda step, total, x, losses=losses: losses.append(x))
        found.append((len(calls), len(losses), sum(losses[-5:]) / 5))
    (kept, steps, loss), (anew, _, other) = found
    batches = steps // recipe.prm_epochs
    assert kept == batches + 1  # one call more scores what calibrates
    assert anew == 1 + (batches - 1) * recipe.prm_epochs + 1
    assert other == pytest.approx(loss, abs=0.1)  # only the standardisation differs


def test_probabilities_are_calibrated_on_the_second_part_without_its_unlabelled_steps(model, parts):
    fitting, calibrating = parts
    recipe = Recipe(prm_epochs=3)
    hidden = [replace(r, step_labels=[*r.step_labels[:-1], -1]) for r in calibrating]
    prm = fit_prm(model, fitting, hidden, recipe, seed=0)
    pairs = [
        (p, x)
        for row, r in zip(prm.score(hidden, recipe), hidden, strict=True)
        for p, x in zip(row, r.step_labels, strict=True)
        if x != -1
    ]
    p, right = np.array(pairs).T
    # Where Platt's log-loss is least, the mean probability is the share of right steps.
    assert abs(p.mean() - right.mean()) < 0.01
    everything = fit_prm(model, fitting, calibrating, recipe, seed=0)
    assert everything.head.shift != prm.head.shift


def test_scores_do_not_depend_on_the_packing(model, rollouts, parts):
    prm = fit_prm(model, *parts, Recipe(prm_epochs=1), seed=0)
    one = prm.score(rollouts, Recipe(max_tokens_per_micro_batch=10**6))
    other = prm.score(rollouts, Recipe(max_tokens_per_micro_batch=60))
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-5)


@pytest.mark.parametrize("pooling", HEADS)
def test_bf16_scores_are_close_and_the_weights_stay(model, rollouts, parts, pooling):
    recipe = Recipe(prm_epochs=2, prm_pooling=pooling, bf16=True)
    prm = fit_prm(model, *parts, recipe, seed=0)
    assert {p.dtype for p in (*model.parameters(), *prm.head.parameters())} == {torch.float32}
    half, full = (np.concatenate(prm.score(rollouts, Recipe(bf16=bf16))) for bf16 in (True, False))
    np.testing.assert_allclose(half, full, atol=0.05)
    assert not np.array_equal(half, full)


def test_labels_follow_the_threshold(model, parts):
    prm = fit_prm(model, *parts, Recipe(prm_epochs=1), seed=0)
    prm.head.threshold.fill_(0.25)
    assert prm.label([0.2, 0.25, 0.3]) == [0, 1, 1]


@pytest.mark.parametrize("only", [0, 1])
def test_a_head_with_one_class_to_calibrate_on_stays_uncalibrated(model, parts, recipe, only):
    fitting, calibrating = parts
    one_class = [replace(r, step_labels=[x if x == only else -1 for x in r.step_labels]) for r in calibrating]
    prm = fit_prm(model, fitting, one_class, recipe, seed=0)
    assert not prm.calibrated
    assert [float(x) for x in (prm.head.scale, prm.head.shift, prm.head.threshold)] == [1, 0, 0.5]
    found = [prm.label(row) for row in prm.score(fitting, recipe)]
    assert {x for row in found for x in row} == {0, 1}
    assert fit_prm(model, fitting, calibrating, recipe, seed=0).calibrated


@pytest.mark.parametrize("pooling", HEADS)
@pytest.mark.parametrize(("only", "counts"), [(0, "0 right and 1 wrong"), (1, "1 right and 0 wrong")])
def test_one_class_to_fit_on_is_refused(model, parts, pooling, only, counts):
    """One labelled step, too: its features have no standard deviation."""
    r = replace(parts[0][0], step_ends=[len(parts[0][0].completion_ids)], step_labels=[only])
    with pytest.raises(RunError, match=counts):
        fit_prm(model, [r], parts[1], Recipe(prm_epochs=1, prm_pooling=pooling), seed=0)


@pytest.mark.parametrize(
    ("trunk", "more"), [("policy", "$"), ("trained", r" or a prm_trunk_learning_rate below 0\.1$")]
)
def test_a_head_that_diverges_is_refused(model, parts, trunk, more):
    recipe = Recipe(prm_epochs=2, prm_learning_rate=1e30, prm_trunk=trunk, prm_trunk_learning_rate=0.1)
    with pytest.raises(RunError, match=rf"not finite: give a prm_learning_rate below 1e\+30{more}"):
        fit_prm(model, *parts, recipe, seed=0)


def test_parts_without_labels_are_refused(model, parts):
    fitting, calibrating = parts
    nothing = [replace(r, step_labels=[-1] * len(r.step_ends)) for r in calibrating]
    with pytest.raises(RunError, match="0 to calibrate"):
        fit_prm(model, fitting, nothing, Recipe(prm_epochs=1), seed=0)
    with pytest.raises(RunError, match="0 completions with labelled steps to fit"):
        fit_prm(model, nothing, calibrating, Recipe(prm_epochs=1), seed=0)
