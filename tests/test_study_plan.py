"""The study's plan: which runs there are, in which order, with which settings; and its result files."""

import json
import math
import random
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.study import plan
from stepkto_fast.study.plan import (
    ABLATIONS,
    ARMS,
    FAMILIES,
    TIMES,
    Spec,
    climb,
    is_current,
    left,
    more_prompts,
    ready,
    recorded,
    run_settings,
    tuned,
)
from stepkto_fast.study.results import counting, digit, first_error, greedy_record, samples_record, write_result
from stepkto_fast.study.run import prepare_problems, problem_files
from stepkto_fast.task import open_task
from stepkto_fast.tasks.arithmetic import read_problems

CPU = FAMILIES["cpu"]


def result(spec: Spec, rate: float = 0.5, **more) -> dict:
    return {
        "stage": spec.stage, "difficulty": spec.difficulty, "name": spec.name, "arm": spec.arm, "seed": spec.seed,
        "overrides": spec.overrides, "iterations": [{"pass@1": 0.3}, {"pass@1": rate}],
    } | more  # fmt: skip


def searched(family=CPU, best=lambda spec: spec.overrides["learning_rate"] == 1e-4) -> list[dict]:
    """All results of a search whose best runs are those that `best` names."""
    found: list[dict] = []
    while specs := ready(family, found, ("search",)):
        found += [result(s, 0.9 if best(s) else 0.5) for s in specs]
    return found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_run_is_a_valid_recipe(family):
    for difficulty in family.difficulties:
        assert Recipe(**family.initial(difficulty)).max_operations == family.difficulties[difficulty].shifted[1]
    found = searched(family)
    specs = ready(family, found)
    assert {s.name for s in specs if s.stage == "main"} == set(family.arms)
    assert {s.name for s in specs if s.stage == "ablations"} == set(family.ablations)
    assert len({s.place for s in specs}) == len(specs)
    for spec in [*specs, *ready(family, [])]:
        settings = family.base(spec.difficulty) | spec.overrides
        recipe = Recipe(**settings, seed=spec.seed)
        assert recipe.num_eval_generations == 1
        d = family.difficulties[spec.difficulty]
        assert (recipe.min_operations, recipe.max_operations) == d.trained
        assert d.shifted[0] > d.trained[1]


def test_arms_see_the_labels_that_they_are_said_to_see():
    seen = {arm: Recipe(**CPU.base("easy") | overrides) for arm, overrides in ARMS.items()}
    assert {arm for arm, r in seen.items() if r.objective == "step_kto" and r.step_weight} == {
        "step_only", "step_kto", "step_kto_prm",
    }  # fmt: skip
    assert [arm for arm, r in seen.items() if not r.outcome_weight] == ["step_only"]
    assert [arm for arm, r in seen.items() if r.label_source != "checker"] == ["step_kto_prm"]
    assert not any(r.prm_audit for r in seen.values())


def test_main_waits_for_the_search_of_its_arm_and_takes_what_that_chose():
    assert {s.stage for s in ready(CPU, [])} == {"search"}
    easy = [r for r in searched() if r["difficulty"] == "easy" and r["arm"] != "dpo"]
    specs = [s for s in ready(CPU, easy) if s.stage == "main"]
    assert {s.difficulty for s in specs} == {"easy"}
    assert {s.name for s in specs} == set(ARMS) - {"dpo"}
    assert all(s.overrides["learning_rate"] == 1e-4 for s in specs)
    assert all(("beta" in s.overrides) == (s.name != "rft") for s in specs)
    assert [s.seed for s in specs] == sorted(s.seed for s in specs), "seed by seed: the arms of a seed share M_0"


def test_ablations_change_one_thing_of_the_tuned_arm():
    found = searched()
    specs = [s for s in ready(CPU, found) if s.stage == "ablations"]
    assert {s.seed for s in specs} == set(CPU.ablation_seeds)
    assert {s.difficulty for s in specs} == {CPU.ablation_difficulty}
    for spec in specs:
        arm, _ = ABLATIONS[spec.name]
        base = CPU.base(spec.difficulty) | ARMS[arm] | (tuned(CPU, spec.difficulty, arm, found) or {})
        if spec.name in (
            "outcome_right",
            "outcome_wrong",
            "unweighted_outcome_none",
        ):  # variants of classes_unweighted, as the page says
            base |= ABLATIONS["classes_unweighted"][1]
        changed = {k for k, v in (CPU.base(spec.difficulty) | spec.overrides).items() if base.get(k) != v}
        assert len(changed) == 1, (spec.name, changed)
        if spec.name in TIMES:
            key, factor = TIMES[spec.name]
            assert spec.overrides[key] == pytest.approx(base[key] * factor)


def test_what_has_a_result_is_not_run_again():
    found = searched()
    first = ready(CPU, found)[0]
    assert first in ready(CPU, found)
    assert first not in ready(CPU, [*found, result(first)])
    counts = left(CPU, found)
    assert counts == {"search": 0, "main": 2 * 7 * 5, "ablations": 21 * 3}
    assert left(CPU, [*found, result(first)]) == counts | {"main": 69}
    recipe = recorded(Recipe(**run_settings(CPU, first)))
    assert is_current(CPU, result(first) | {"recipe": recipe})
    others = replace(CPU, settings=CPU.settings | {"num_prompts": 7})
    assert not is_current(others, result(first) | {"recipe": recipe})
    assert not is_current(FAMILIES["large"], result(first) | {"recipe": recipe})
    assert not is_current(CPU, result(first) | {"recipe": recipe | {"a_setting_of_old": 1}})
    later = {k: v for k, v in recipe.items() if k not in ("bf16", "num_prompts")}  # settings that came after the run
    assert not is_current(CPU, result(first) | {"recipe": later}), "the family sets num_prompts"
    assert is_current(CPU, result(first) | {"recipe": later | {"num_prompts": recipe["num_prompts"]}})


def test_another_beta_of_the_package_does_not_make_results_stale(monkeypatch):
    @dataclass
    class Later(Recipe):
        beta: float = 0.75
        step_beta: float = 0.75

    for spec in ready(CPU, searched())[: len(CPU.arms)]:
        kept = result(spec) | {"recipe": recorded(Recipe(**run_settings(CPU, spec)))}
        with monkeypatch.context() as patch:
            patch.setattr(plan, "Recipe", Later)
            assert is_current(CPU, kept), spec


@given(st.integers(0, 10**9), st.sampled_from(["kto", "rft"]))
def test_the_search_ends_where_no_neighbour_is_better_whatever_the_order_of_runs(seed, arm):
    rng = random.Random(seed)
    start = CPU.rft_start if arm == "rft" else CPU.start
    values: dict = {}
    ways = []
    for _ in range(2):
        tried: dict = {}
        while todo := climb(CPU, start, tried)[1]:
            assert not set(todo) & set(tried)
            pair = rng.choice(todo)  # one after the other, in any order
            tried[pair] = values.setdefault(pair, rng.randrange(20))
        ways.append((climb(CPU, start, tried)[0], set(tried)))
    (here, tried_pairs), other = ways
    assert (here, tried_pairs) == other
    rate, beta = here
    around = [(rate * factor, beta) for factor in (0.5, 2)]
    around += [(rate, beta * factor) for factor in (0.2, 5)] if beta is not None else []
    for r, b in around:
        found = [p for p in tried_pairs if (p[0], p[1] or 0) == pytest.approx((r, b or 0), rel=1e-2)]
        inside = CPU.rate_limits[0] <= r <= CPU.rate_limits[1]
        inside &= b is None or CPU.beta_limits[0] <= b <= CPU.beta_limits[1]
        assert found or not inside
        assert all(values[p] <= values[here] for p in found)


def test_the_second_difficulty_starts_from_what_was_chosen_at_the_first():
    assert {s.difficulty for s in ready(CPU, [])} == {"easy"}
    good = {
        "kto": (2e-4, 2.5),
        "dpo": (5e-5, 0.5),
        "rft": (5e-5, None),
        "step_kto": (1e-4, 12.5),
        "step_only": CPU.start,
    }
    easy: list[dict] = []
    while specs := [s for s in ready(CPU, easy, ("search",)) if s.difficulty == "easy"]:
        for s in specs:
            rate, beta = s.overrides["learning_rate"], s.overrides.get("beta")
            far = abs(math.log(rate / good[s.arm][0])) + abs(math.log((beta or 1) / (good[s.arm][1] or 1)))
            easy.append(result(s, 0.9 - 0.05 * far))
    specs = ready(CPU, easy, ("search",))
    hard = {s.arm: (s.overrides["learning_rate"], s.overrides.get("beta")) for s in reversed(specs)}
    assert hard == good, "its own pair first, then the neighbours of it"


def test_the_search_chooses_the_best_mean_over_its_seeds_and_counts_failures_as_nothing():
    family = replace(CPU, search_seeds=(100, 101), rft_rate_limits=(5e-5, 2e-4))
    by_rate = {1e-4: (0.6, 0.6), 5e-5: (0.9, 0.1), 2e-4: (0.95, 0.95)}
    found: list[dict] = []
    while specs := [s for s in ready(family, found, ("search",)) if s.arm == "rft" and s.difficulty == "easy"]:
        found += [result(s, by_rate[s.overrides["learning_rate"]][s.seed - 100]) for s in specs]
    assert tuned(family, "easy", "rft", found) == {"learning_rate": 2e-4}
    broken = [r | {"failed": "no text"} if r["overrides"]["learning_rate"] == 2e-4 else r for r in found]
    assert tuned(family, "easy", "rft", broken) == {"learning_rate": 1e-4}
    assert tuned(family, "easy", "rft", found[:-1]) is None
    assert tuned(family, "easy", "kto_more", found) is None


def test_kto_more_has_the_prompts_of_the_seed_set_on_top():
    recipe = Recipe(**CPU.base("hard"))
    extra = (more_prompts(CPU, "hard") - recipe.num_prompts) * recipe.num_generations * recipe.iterations
    assert extra == recipe.prm_seed_problems * recipe.prm_seed_generations
    assert tuned(CPU, "easy", "kto_more", searched()) == tuned(CPU, "easy", "kto", searched())


def test_arms_with_the_same_loss_have_the_same_settings():
    assert not any(s.arm in plan.TUNED_AS for s in ready(CPU, []))
    found = searched(best=lambda s: s.overrides.get("beta") == 0.1)
    assert tuned(CPU, "hard", "step_kto_prm", found) == tuned(CPU, "hard", "step_kto", found) is not None


def test_no_problem_that_is_measured_on_is_trained_on(tmp_path):
    prepare_problems(CPU, tmp_path)
    for difficulty in CPU.difficulties:
        files = problem_files(tmp_path, difficulty)
        held_out: list[set[str]] = [{p.prompt for p in read_problems(str(path))[0]} for path in files.values()]
        assert list(map(len, held_out)) == [1000, 500, 500]
        assert len(set().union(*held_out)) == 2000
        for seed in (*CPU.seeds, *CPU.search_seeds):
            more = {"num_prompts": more_prompts(CPU, difficulty)}
            recipe = Recipe(**CPU.base(difficulty) | more | {"seed": seed, "test_dataset": str(files["test"])})
            with closing(open_task(recipe)) as task:
                problems = task.problems()
            asked = {p.prompt for p in [*problems.seed, *(p for train in problems.train for p in train)]}
            assert not asked & set().union(*held_out)


def test_an_unknown_family_is_refused():
    with pytest.raises(RunError, match=r"family is 'tiny': give one of cpu, large, smoke"):
        plan.family_of("tiny")


# ---- result files ----


def solution(labels: list[int], right: bool, tokens: int = 3) -> Rollout:
    return Rollout(0, 0, "", [], "", [0] * tokens, [], True, label=right, step_labels=labels)


def test_solutions_are_kept_a_character_a_problem():
    solutions = [
        solution([1, 1], True, 4),
        solution([1, 0, 0], True, 6),
        solution([0] * 40, False, 2),
        solution([], False),
    ]
    record = greedy_record(solutions)
    assert record == {"right": "1100", "first_error": "0210", "steps": "23z0", "tokens": 15 / 4}
    assert first_error([1] * 39 + [0]) == 40
    assert digit(40) == "z"
    assert [int(digit(n), 36) for n in range(36)] == list(range(36))
    assert samples_record([0, 8, 3], [False, True, True], 8) == {
        "k": 8, "samples_right": "083", "majority_right": "011",
    }  # fmt: skip


def test_a_result_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "seed_0.json"
    write_result({"a": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"version": 1, "a": 1}


def test_results_of_another_initial_model_do_not_count():
    run = {"stage": "main", "difficulty": "easy", "seed": 0, "initial_weights": "old"}
    m_0 = {"stage": "initial", "difficulty": "easy", "seed": 0, "weights": "new"}
    assert counting([run]) == ([], [run])
    assert counting([m_0, run]) == ([m_0], [run])
    assert counting([m_0 | {"seed": 1, "weights": "old"}, run])[1] == [run]
    assert counting([m_0 | {"weights": "old"}, run]) == ([m_0 | {"weights": "old"}, run], [])
