"""Wrong step labels on purpose: how many, which ones, and what they leave alone."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from stepkto_fast.errors import RunError
from stepkto_fast.labelling import flip_labels
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout, read_rollouts

SMOKE = str(Path(__file__).parent.parent / "recipes" / "smoke.yaml")


def labelled(count):
    found = []
    for n in range(count):
        r = Rollout(n // 4, n % 4, "", [1], "", [2] * 5, [], True, step_ends=[1, 2, 3, 4, 5])
        r.step_labels = [1, 0, -1, 1, 0]
        r.checker_labels = [1, 0, -1, 1, 0]
        found.append(r)
    return found


def flipped(noise, iteration=0, seed=0, count=400):
    rollouts = labelled(count)
    flip_labels(rollouts, Recipe(step_label_noise=noise, seed=seed), iteration)
    assert all(r.step_labels[2] == -1 for r in rollouts), "a step without a label stays so"
    assert all(set(r.step_labels) <= {1, 0, -1} for r in rollouts)
    assert all(r.checker_labels == [1, 0, -1, 1, 0] for r in rollouts)
    return {(n, k) for n, r in enumerate(rollouts) for k in (0, 1, 3, 4) if r.step_labels[k] != r.checker_labels[k]}


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0])
def test_so_many_labels_are_flipped(noise):
    found = flipped(noise)
    deviation = (noise * (1 - noise) / 1600) ** 0.5
    assert abs(len(found) / 1600 - noise) <= 4 * deviation
    for k in (0, 1, 3, 4):  # right and wrong ones alike, wherever they are
        assert abs(sum(place == k for _, place in found) / 400 - noise) <= 8 * deviation


def test_which_ones_depends_on_seed_iteration_problem_sample_and_step():
    found = flipped(0.3)
    assert found == flipped(0.3)
    assert found != flipped(0.3, iteration=1)
    assert found != flipped(0.3, seed=1)
    assert found < flipped(0.5), "more noise flips these and more"
    one, whole = labelled(400)[37:38], labelled(400)
    for rollouts in (one, whole):
        flip_labels(rollouts, Recipe(step_label_noise=0.3), 0)
    assert one == whole[37:38], "whatever else is in the list"
    rows = [tuple(k for n, k in found if n == row) for row in range(400)]
    assert len(set(rows[:4])) > 1, "samples of a problem differ"
    assert len(set(rows[::4])) > 1, "problems differ"


@pytest.mark.parametrize("noise", [-0.1, 1.1, float("nan")])
def test_noise_is_a_share(noise):
    with pytest.raises(RunError, match=r"step_label_noise is .*: give a share from 0 to 1"):
        Recipe(step_label_noise=noise)


@pytest.mark.loop
def test_a_run_trains_on_flipped_labels_and_is_measured_by_true_ones(tmp_path):
    from stepkto_fast.train import main

    noisy = ["--engine", "transformers", "--report_to", "none", "--num_prompts", "16", "--num_test_problems", "10",
             "--prm_seed_problems", "10", "--iterations", "1", "--label_source", "checker"]  # fmt: skip
    for name, noise in (("clean", "0"), ("noisy", "0.4")):
        folder = tmp_path / name
        assert main([SMOKE, *noisy, "--step_label_noise", noise, "--output_dir", str(folder)]) == 0
    clean, found = (read_rollouts(tmp_path / name / "rollouts" / "iteration_0.parquet") for name in ("clean", "noisy"))
    assert [r.checker_labels for r in found] == [r.checker_labels for r in clean]
    assert all(r.step_labels == r.checker_labels for r in clean)
    expected = [replace(copy.deepcopy(r), step_labels=list(r.checker_labels)) for r in found]
    flip_labels(expected, Recipe(step_label_noise=0.4), 0)
    assert [r.step_labels for r in found] == [r.step_labels for r in expected]
    assert found != clean
    seeds = [read_rollouts(tmp_path / name / "rollouts" / "seed.parquet") for name in ("clean", "noisy")]
    assert seeds[0] == seeds[1], "the head is fitted on true labels"
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("clean", "noisy")]
    assert weights[0] != weights[1]
