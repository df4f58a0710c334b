"""Watchdogs: each fires on what it is for, stays silent on a good run, and warn, stop and off do what they say."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from stepkto_fast import watch
from stepkto_fast.errors import RunError
from stepkto_fast.objective import BatchResult, accumulate_gradients, class_weights
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts
from stepkto_fast.run_directory import Progress, RunDirectory


def result(log_ratios):
    ratios = torch.tensor(log_ratios)
    return BatchResult(0.5, 0.25, 0.25, ratios, torch.zeros(1), torch.zeros(len(log_ratios)))


def record(kl):
    return {"iteration": 2, "kl_from_initial": kl}


def test_good_data_raises_no_warning(rollouts):
    recipe = Recipe()
    assert watch.watch_rollouts(rollouts, recipe) == []
    assert watch.watch_step(result([50.0, -50.0]), rollouts[:2], recipe) == []
    assert watch.watch_evaluation(record(20.0), recipe) == []
    assert watch.watch_evaluation(record(-0.1), recipe) == [], "an estimate of the KL may be below 0"


@pytest.mark.parametrize("right", [True, False])
def test_outcomes_that_are_all_the_same(rollouts, right):
    for r in rollouts:
        r.label = right
    (warning,) = watch.watch_rollouts(rollouts, Recipe())
    assert f"all {len(rollouts)} completions are {'right' if right else 'wrong'}" in warning
    assert f"too {'easy' if right else 'hard'}" in warning
    rollouts[0].label = not right
    assert watch.watch_rollouts(rollouts, Recipe()) == []


@pytest.mark.parametrize("label", [1, 0, -1])
def test_step_labels_of_one_class(rollouts, label):
    for r in rollouts:
        r.step_labels = [label] * len(r.step_ends)
    (warning,) = watch.watch_rollouts(rollouts, Recipe())
    steps = sum(len(r.step_ends) for r in rollouts)
    expected = {1: f"all {steps} step labels are right", 0: f"all {steps} step labels are wrong", -1: "no step has a"}
    assert expected[label] in warning
    assert "label_source" in warning
    assert ("PRM head" in warning) == (label >= 0)
    (other,) = watch.watch_rollouts(rollouts, Recipe(label_source="checker"))
    assert "PRM head" not in other
    assert watch.watch_rollouts(rollouts, Recipe(step_weight=0)) == [], "then nobody uses them"
    rollouts[0].step_labels = [1, 0]
    assert watch.watch_rollouts(rollouts, Recipe()) == []


@pytest.mark.parametrize("logp", [0.25, math.nan, math.inf])
def test_log_probs_above_zero(rollouts, logp):
    rollouts[5].logps[2] = logp
    (warning,) = watch.watch_rollouts(rollouts, Recipe())
    r = rollouts[5]
    assert f"1 log-probs of the engine are above 0 or no number, up to {logp:.3g} nats" in warning
    assert f"problem {r.problem_id} sample {r.sample}" in warning
    rollouts[5].logps[2] = 1e-6  # rounding
    assert watch.watch_rollouts(rollouts, Recipe()) == []


def test_log_ratios_that_explode_are_named_the_worst_first(rollouts):
    batch, ratios = rollouts[:4], [1.0, 51.0, -300.0, math.nan]
    (warning,) = watch.watch_step(result(ratios), batch, Recipe())
    assert "log-ratios of 3 of 4 completions are beyond 50 nats (watch_log_ratio)" in warning
    places = [warning.index(f"on problem {r.problem_id} sample {r.sample}") for r in (batch[3], batch[2], batch[1])]
    assert places == sorted(places)
    assert "-300 on" in warning
    assert len(watch.watch_step(result(ratios), batch, Recipe(watch_log_ratio=1000))) == 1, "nan is beyond every limit"
    assert watch.watch_step(result(ratios[:3]), batch[:3], Recipe(watch_log_ratio=1000)) == []


@pytest.mark.parametrize("kl", [20.5, math.nan])
def test_kl_that_drifts(kl):
    (warning,) = watch.watch_evaluation(record(kl), Recipe())
    assert f"M_2 is {kl:.3g} nats a completion away from M_0 (KL; limit 20, watch_kl)" in warning


def test_the_share_of_prompts_that_teach_nothing(rollouts):
    by_problem = [rollouts[n : n + 2] for n in range(0, len(rollouts), 2)]
    for n, (first, second) in enumerate(by_problem):
        first.label, second.label = True, n % 3 > 0
    assert watch.same_outcomes(rollouts) == {"frac_reward_zero_std": pytest.approx(8 / 12)}
    assert watch.same_outcomes(rollouts[::2]) == {}, "one completion a prompt says nothing"


def test_warn_stop_and_off():
    said = []
    watch.act(["one", "two"], Recipe(watch="warn"), said.append)
    assert said == ["warning: one", "warning: two"]
    watch.act(["one"], Recipe(watch="off"), said.append)
    watch.act([], Recipe(watch="stop"), said.append)
    assert len(said) == 2
    with pytest.raises(RunError, match=r"^one\. two\. Stopped, as watch is stop.*--resume true"):
        watch.act(["one", "two"], Recipe(watch="stop"), said.append)


def test_other_objectives_are_watched_for_what_they_learn_from(rollouts):
    for r in rollouts:
        r.step_labels = [-1] * len(r.step_ends)
    baselines = [Recipe(objective="rft"), Recipe(objective="dpo")]
    assert [watch.watch_rollouts(rollouts, recipe) for recipe in baselines] == [[], []]
    for r in rollouts:
        r.step_labels, r.label = [1] * len(r.step_ends), True
    rft, dpo = (watch.watch_rollouts(rollouts, recipe) for recipe in baselines)
    assert rft == [], "right completions are all it needs"
    assert "completions are right" in dpo[0]
    for r in rollouts:
        r.label = False
    assert all("completions are wrong" in watch.watch_rollouts(rollouts, recipe)[0] for recipe in baselines)
    far = [watch.watch_step(result([51.0, 0.0]), rollouts[:2], recipe)[0] for recipe in baselines]
    assert ["raise beta" in warning for warning in far] == [False, True]


# ---- what is not finite ----


def stopped(model, batch, tmp_path, recipe=None, **changes):
    """The message of a stop on `batch`, and what was saved."""
    recipe = recipe or Recipe(output_dir=str(tmp_path / "run"))
    run, weights, points = RunDirectory(recipe), class_weights(batch, recipe), (0.0, 0.0)
    model.zero_grad()
    found = replace(accumulate_gradients(model, batch, recipe, weights, points), **changes)
    with pytest.raises(RunError) as caught:
        watch.stop_on_nonfinite(model, found, math.nan, batch, recipe, weights, points, run, Progress(1, 4))
    assert "iteration 1, step 4: stopped before the optimizer moved" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value), read_rollouts(run.path / "nonfinite_iteration_1_step_4.parquet")


def test_sequences_without_a_finite_log_ratio_are_named_and_the_batch_is_kept(model, rollouts, tmp_path):
    batch = rollouts[:8]
    batch[3].ref_logps[0] = math.inf
    message, saved = stopped(model, batch, tmp_path)
    r = batch[3]
    assert f"Log-ratios that are not finite: problem {r.problem_id} sample {r.sample}. The batch is in" in message
    assert [(s.problem_id, s.sample) for s in saved] == [(r.problem_id, r.sample) for r in batch]


def test_weights_that_diverged_are_not_blamed_on_a_sequence(model, rollouts, tmp_path):
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    message, _ = stopped(model, rollouts[:8], tmp_path)
    assert "all 8, so the weights have diverged rather than a sequence" in message


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, grad):
        return grad * math.inf


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_gradient_that_is_not_finite_is_traced_to_its_sequence(model, rollouts, tmp_path, monkeypatch, poisoned):
    batch = rollouts[:6]
    culprit = batch[4]
    embed = model.get_input_embeddings()
    real = embed.forward

    def forward(ids):
        # With `poisoned`, whatever is packed with the culprit has gradients that are not finite; log-ratios are.
        here = torch.tensor(culprit.prompt_ids + culprit.completion_ids)
        hit = any(torch.equal(ids[0, n : n + len(here)], here) for n in range(ids.shape[1] - len(here) + 1))
        return Poison.apply(real(ids)) if poisoned and hit else real(ids)

    monkeypatch.setattr(embed, "forward", forward)
    message, _ = stopped(model, batch, tmp_path)
    names = f"problem {culprit.problem_id} sample {culprit.sample}" if poisoned else "none alone, only their sum"
    assert f"Log-ratios are finite. Gradients that are not, of each alone: {names}. The batch" in message


def test_of_dpo_the_pair_is_blamed(model, rollouts, tmp_path, monkeypatch):
    """Alone, a completion would have no loss."""
    batch = rollouts[:6]
    for n, r in enumerate(batch):
        r.label = n % 2 == 0
    embed = model.get_input_embeddings()
    real, culprit = embed.forward, torch.tensor(batch[3].prompt_ids + batch[3].completion_ids)

    def forward(ids):
        n = len(culprit)
        hit = any(torch.equal(ids[0, k : k + n], culprit) for k in range(ids.shape[1] - n + 1))
        return Poison.apply(real(ids)) if hit else real(ids)

    monkeypatch.setattr(embed, "forward", forward)
    recipe = Recipe(objective="dpo", output_dir=str(tmp_path / "run"))
    message, _ = stopped(model, batch, tmp_path, recipe)
    names = ", ".join(f"problem {r.problem_id} sample {r.sample}" for r in batch[2:4])
    assert f"Gradients that are not, of each pair alone: {names}. The batch" in message
    monkeypatch.setattr(watch, "SINGLES", 1)
    shutil.rmtree(tmp_path / "run")
    assert "of the first 1 of 3 pairs alone: none alone" in stopped(model, batch, tmp_path, recipe)[0]


def test_the_search_for_a_gradient_is_bounded(model, rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SINGLES", 2)
    calls = []
    monkeypatch.setattr(watch, "accumulate_gradients", lambda *a: calls.append(a) or accumulate_gradients(*a))
    message, _ = stopped(model, rollouts[:6], tmp_path)
    assert "of the first 2 of 6 alone: none alone" in message
    assert len(calls) == 2
