"""Rates of solutions, by hand."""

import pyarrow.parquet as pq

from stepkto_fast.collect import Asked, usable
from stepkto_fast.evaluation import majority_rate, solution_rates, write_solutions
from stepkto_fast.rollout import Rollout
from stepkto_fast.tasks.arithmetic import problem

SEVEN = Asked(0, problem(("+", 3, 4), "chain"), [5])
FOUR = Asked(1, problem(("min", 4, 9), "chain"), [5])


def solution(text="", label=False, steps=(1,)):
    return Rollout(0, 0, "p", [5], text, [6], [0.0], True, ["x"] * len(steps), [1], label, checker_labels=list(steps))


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


def boxed(*answers):
    return [solution("" if a is None else f"Answer: \\boxed{{ {a} }}") for a in answers]


def test_majority_counts_answers_not_samples():
    assert majority_rate(boxed(7, 7, 1, 2), [SEVEN], 4) == 1.0
    assert majority_rate(boxed(1, 1, 7, 2), [SEVEN], 4) == 0.0
    assert majority_rate(boxed(None, None, None, 7), [SEVEN], 4) == 1.0, "no box is no vote"
    assert majority_rate(boxed(None, None), [SEVEN], 2) == 0.0
    assert majority_rate(boxed(7, 1, 1, 7), [SEVEN], 4) == 1.0, "a tie goes to the answer sampled first"
    assert majority_rate(boxed(1, 7, 7, 1), [SEVEN], 4) == 0.0
    assert majority_rate(boxed(7, 7, 4, 4), [SEVEN, FOUR], 2) == 1.0, "each problem has its own k samples"
    assert majority_rate(boxed(4, 4, 7, 7), [SEVEN, FOUR], 2) == 0.0


def test_solutions_are_stored_with_answer_and_verdicts(tmp_path):
    r = solution("Answer: \\boxed{ 7 }", label=True, steps=(1,))
    r.step_probs = [0.75]
    write_solutions([r], [SEVEN], tmp_path / "e" / "iteration_0.parquet")
    (row,) = pq.read_table(tmp_path / "e" / "iteration_0.parquet").to_pylist()
    assert (row["answer"], row["label"], row["step_labels"], row["step_probs"]) == ("7", True, [1], [0.75])


def test_a_completion_without_text_is_not_learnt_from():
    empty, blank, text = solution(""), solution(" \n"), solution("x")
    assert usable([empty, text, blank]) == [text]
