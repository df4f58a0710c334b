"""Rates of solutions, by hand."""

import pyarrow.parquet as pq

from stepkto_fast.collect import Asked, usable
from stepkto_fast.evaluation import (
    first_error_step,
    judge_steps,
    majority_hits,
    right_samples,
    solution_rates,
    write_solutions,
)
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.task import ArithmeticTask
from stepkto_fast.tasks.arithmetic import problem

TASK = ArithmeticTask(Recipe())
SEVEN = problem(("+", 3, 4), "chain")
FOUR = problem(("min", 4, 9), "chain")


def solution(text="", label=False, steps=(1,), answer=None, verified=True):
    return Rollout(
        0, 0, "p", [5], text, [6], [0.0], True, ["x"] * len(steps), [1], label, list(steps), answer=answer,
        verified=verified,
    )  # fmt: skip


def test_rates_by_hand():
    greedy = [
        solution(label=True, steps=(1, 1, 1)),
        solution(label=True, steps=(0, 1, 1)),  # right, for a wrong reason
        solution(label=False, steps=(1, 0)),
        solution(label=True, steps=(1,)),
    ]
    assert solution_rates(greedy) == {"pass@1": 3 / 4, "flawed_correct": 1 / 3, "step_accuracy": 7 / 9}


def test_no_right_answer_leaves_flawed_correct_undefined():
    assert solution_rates([solution(steps=(1, 0))]) == {"pass@1": 0.0, "flawed_correct": None, "step_accuracy": 0.5}


def test_steps_that_nobody_judged_are_neither_right_nor_wrong():
    unknown, partly = solution(label=True, steps=(-1, -1)), solution(label=True, steps=(-1, 0))
    assert solution_rates([unknown]) == {"pass@1": 1.0, "flawed_correct": None, "step_accuracy": None}
    assert solution_rates([unknown, partly]) == {"pass@1": 1.0, "flawed_correct": 1.0, "step_accuracy": 0.0}


def test_the_first_wrong_step_is_counted_from_one():
    assert first_error_step([solution(steps=(1, 0, 0)), solution(steps=(0, 1)), solution(steps=(1, 1))]) == 1.5
    assert first_error_step([solution(steps=(-1, -1, 0))]) == 3, "nobody said that the others are wrong"
    assert first_error_step([solution(steps=(1, -1))]) is None


def test_right_samples_are_counted_for_each_problem():
    samples = [solution(label=label) for label in (True, False, True, False, False, False)]
    assert right_samples(samples, 3) == [2, 0]
    assert right_samples(samples, 2) == [1, 1, 0]


def test_steps_are_judged_by_the_checker_where_there_is_one_else_by_the_head():
    class Head:  # stands in for a PRM, whose probabilities would not be known
        def score(self, rollouts, settings):
            return [[0.9, 0.2] for _ in rollouts]

        def label(self, probabilities):
            return [int(p > 0.5) for p in probabilities]

    class Unchecked(ArithmeticTask):
        exact_steps = False

    def judged(task, prm):
        r = solution(steps=(), label=True)
        r.checker_labels = [0, 1] if task.exact_steps else [-1, -1]
        return judge_steps([r], task, prm, Recipe()), r.step_labels, r.step_probs

    assert judged(TASK, Head()) == ("checker", [0, 1], [0.9, 0.2])
    assert judged(TASK, None) == ("checker", [0, 1], [])
    assert judged(Unchecked(Recipe()), Head()) == ("head", [1, 0], [0.9, 0.2])
    assert judged(Unchecked(Recipe()), None) == (None, [-1, -1], [])


def rate(golds, answers, k):
    """Maj@k of samples with these boxed answers, k a problem."""
    texts = ["" if a is None else f"Answer: \\boxed{{ {a} }}" for a in answers]
    problems = [p for p in golds for _ in range(k)]
    verdicts = TASK.judge(problems, texts, [True] * len(texts))
    sampled = [solution(t, v.right, answer=v.answer) for t, v in zip(texts, verdicts, strict=True)]
    return sum(majority_hits(sampled, TASK, k)) / len(golds)


def test_majority_counts_answers_not_samples():
    assert rate([SEVEN], [7, 7, 1, 2], 4) == 1.0
    assert rate([SEVEN], [1, 1, 7, 2], 4) == 0.0
    assert rate([SEVEN], [None, None, None, 7], 4) == 1.0, "no box is no vote"
    assert rate([SEVEN], [None, None], 2) == 0.0
    assert rate([SEVEN], [7, 1, 1, 7], 4) == 1.0, "a tie goes to the answer sampled first"
    assert rate([SEVEN], [1, 7, 7, 1], 4) == 0.0
    assert rate([SEVEN, FOUR], [7, 7, 4, 4], 2) == 1.0, "each problem has its own k samples"
    assert rate([SEVEN, FOUR], [4, 4, 7, 7], 2) == 0.0


def test_solutions_are_stored_with_answer_and_verdicts(tmp_path):
    r = solution("Answer: \\boxed{ 7 }", label=True, steps=(1,))
    r.step_labels, r.step_probs = [1], [0.75]
    asked = [Asked(0, SEVEN, SEVEN.prompt, [5])]
    write_solutions([r], [3], [False], TASK, asked, tmp_path / "e" / "iteration_0.parquet")
    (row,) = pq.read_table(tmp_path / "e" / "iteration_0.parquet").to_pylist()
    assert (row["answer"], row["label"], row["step_labels"], row["step_probs"]) == ("7", True, [1], [0.75])
    assert (row["samples_right"], row["majority_right"]) == (3, False)


def test_what_has_no_text_or_no_known_outcome_is_not_learnt_from():
    empty, blank, text, unknown = solution(""), solution(" \n"), solution("x"), solution("x", verified=False)
    assert usable([empty, text, blank, unknown]) == [text]
