"""The arithmetic task: problems, parsing, solutions, and the exact checker."""

import contextlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkto_fast.errors import RunError
from stepkto_fast.tasks import arithmetic
from stepkto_fast.tasks.arithmetic import LEVELS, Problem, answer_is_right, check_steps, parse_prompt, problem

CHAIN = problem(("min", ("*", ("+", 3, 4), 2), 5), "chain")  # 3 + 4 = 7, 7 * 2 = 4, 4 min 5 = 4


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("level", "prompt"),
    [
        ("chain", "Compute left to right, modulo 10: 3 + 4 * 2 min 5\n"),
        ("nested", "Compute modulo 10: ( ( 3 + 4 ) * 2 ) min 5\n"),
        ("words", "A counter shows one digit. It starts at 3. Add 4. Multiply by 2. Keep at most 5.\n"),
    ],
)
def test_a_problem_is_written_as_its_level_says_and_reads_back(level, prompt):
    written = problem(CHAIN.expression, level)
    assert written.prompt == prompt
    assert parse_prompt(prompt) == written
    assert written.answer == 4


@given(seed=st.integers(0, 10**6), level=st.sampled_from(LEVELS), operations=st.integers(1, 9))
def test_every_problem_reads_back_and_its_solution_is_flawless(seed, level, operations):
    rng = random.Random(seed)
    asked = arithmetic.random_problem(rng, level, operations)
    assert parse_prompt(asked.prompt) == asked
    solution = arithmetic.demonstration(rng, asked)
    steps = lines(solution)
    assert len(steps) == operations + 1
    assert check_steps(asked, steps) == [True] * len(steps)
    assert answer_is_right(asked, solution)


@given(seed=st.integers(0, 10**6), level=st.sampled_from(LEVELS), wrong=st.integers(1, 9))
def test_one_wrong_result_condemns_its_own_step_and_no_other(seed, level, wrong):
    rng = random.Random(seed)
    asked = arithmetic.random_problem(rng, level, 5)
    believed = {
        (op, a, b): (f(a, b) + wrong) % 10
        for op, f in arithmetic.OPERATIONS.items()
        for a in range(10)
        for b in range(10)
    }
    first = next(arithmetic._reducible(asked.expression))[1:]
    solution = arithmetic.demonstration(
        rng, asked, arithmetic.Misconceptions({first: believed[first]}, rate=1.0, slip=0.0)
    )
    verdicts = check_steps(asked, lines(solution))
    facts = [tuple(line.split(": ")[1].split(" = ")[0].split(" ")) for line in lines(solution)[:-1]]
    expected = [(op, int(a), int(b)) != first for a, op, b in facts]
    assert verdicts == [*expected, True]


def test_the_checker_wants_arithmetic_numbering_and_what_came_before():
    right = ["Step 1: 3 + 4 = 7\n", "Step 2: 7 * 2 = 4\n", "Step 3: 4 min 5 = 4\n", "Answer: \\boxed{ 4 }"]
    assert check_steps(CHAIN, right) == [True] * 4
    assert check_steps(CHAIN, ["Step 1: 4 + 3 = 7\n", *right[1:]])[0], "addition commutes"
    assert check_steps(CHAIN, ["Step 1: 3 + 4 = 8\n", *right[1:]]) == [False, False, True, True]
    assert check_steps(CHAIN, ["Step 1: 3 + 4 = 8\n", "Step 2: 8 * 2 = 6\n"]) == [False, True]
    assert check_steps(CHAIN, ["Step 2: 3 + 4 = 7\n"]) == [False], "wrong number"
    assert check_steps(CHAIN, ["Step 1: 3 * 4 = 2\n"]) == [False], "true, but not what was asked"
    assert check_steps(CHAIN, [*right[:3], "Answer: \\boxed{ 5 }"])[-1] is False
    assert check_steps(CHAIN, [*right[:2], "Answer: \\boxed{ 4 }"])[-1] is False, "an operation is left"
    assert check_steps(CHAIN, [*right, "Step 5: 4 + 0 = 4\n"])[-1] is False, "nothing comes after the answer"
    assert check_steps(CHAIN, ["nonsense", ""]) == [False, False]
    assert check_steps(CHAIN, []) == []


def test_only_the_last_boxed_answer_counts():
    assert answer_is_right(CHAIN, "Answer: \\boxed{ 3 } no, \\boxed{4}")
    assert not answer_is_right(CHAIN, "Answer: \\boxed{ 4 } no, \\boxed{ 3 }")
    assert not answer_is_right(CHAIN, "Step 3: 4 min 5 = 4\n"), (
        "a truncated solution gets no credit for its last number"
    )
    assert not answer_is_right(CHAIN, "\\boxed{ 4 4 }")
    assert not answer_is_right(CHAIN, "")


def test_errors_can_be_absorbed():
    """min swallows the wrong 9: the answer is right although a step is wrong. This is what the task is for."""
    asked = problem(("min", ("+", 3, 4), 2), "chain")
    solution = "Step 1: 3 + 4 = 9\nStep 2: 9 min 2 = 2\nAnswer: \\boxed{ 2 }"
    assert answer_is_right(asked, solution)
    assert check_steps(asked, lines(solution)) == [False, True, True]


def test_problems_are_different_reproducible_and_disjoint():
    test = arithmetic.problems(200, "test", "chain", range(4, 7))
    again = arithmetic.problems(200, "test", "chain", range(4, 7))
    held_out = frozenset(p.prompt for p in test)
    train = arithmetic.problems(300, "train", "chain", range(4, 7), exclude=held_out)
    assert test == again
    assert len(held_out) == 200
    assert len({p.prompt for p in train}) == 300
    assert not held_out & {p.prompt for p in train}
    few = frozenset(p.prompt for p in arithmetic.problems(200, "few", "chain", range(1, 2)))
    stream = arithmetic.random_problems("demonstrations", "chain", range(1, 2), exclude=few)
    drawn = {next(stream).prompt for _ in range(2000)}
    assert len(drawn) > 150
    assert not drawn & few
    with pytest.raises(RunError, match="raise max_operations or ask for fewer"):
        arithmetic.problems(500, "few", "chain", range(1, 2))


def test_misconceptions_are_fixed_and_as_many_as_asked():
    teacher = arithmetic.Misconceptions.draw("0", share=0.3, rate=1.0, slip=0.0)
    assert len(teacher.facts) == 120
    assert teacher == arithmetic.Misconceptions.draw("0", share=0.3, rate=1.0, slip=0.0)
    rng = random.Random(0)
    for (operator, a, b), wrong in teacher.facts.items():
        assert wrong != arithmetic.OPERATIONS[operator](a, b)
        assert teacher.write(rng, operator, a, b) == wrong


def test_a_prompt_reads_back_in_one_form():
    """Spacing must not make the same problem look like another: held-out problems are told apart by their prompt."""
    for text in ("Compute left to right, modulo 10:   3 +  4", " Compute left to right, modulo 10: 3 + 4 \n\n"):
        assert parse_prompt(text).prompt == "Compute left to right, modulo 10: 3 + 4\n"


def test_random_problems_stop_where_everything_is_held_out():
    every = frozenset(p.prompt for p in arithmetic.problems(400, "all", "chain", range(1, 2)))
    assert len(every) == 400
    with pytest.raises(RunError, match="is held out: raise max_operations"):
        next(arithmetic.random_problems("x", "chain", range(1, 2), exclude=every))


def test_problem_files_name_bad_rows_and_go_on(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        json.dumps({"prompt": CHAIN.prompt, "answer": 4}),
        json.dumps({"prompt": CHAIN.prompt, "answer": "5"}),
        "{broken",
        json.dumps(["a list"]),
        json.dumps({"question": "3 + 4"}),
        json.dumps({"prompt": "Compute modulo 10: ( 3 + 4"}),
        json.dumps({"prompt": "Compute left to right, modulo 10: 3 - 4"}),
        json.dumps({"prompt": "A counter shows one digit. It starts at 3. Dance 4."}),
        "",
        json.dumps({"prompt": arithmetic.CHAIN_TEXT + "1" + " + 1" * 3000}),
        json.dumps({"prompt": "Compute modulo 10: 1 + 2"}),
    ]
    path.write_bytes("\n".join(rows).encode() + b"\n\xff\xfe\n")
    found, complaints = arithmetic.read_problems(str(path))
    assert [p.answer for p in found] == [4, 3]
    numbers = [int(c.removeprefix(str(path) + ":").split(":")[0]) for c in complaints]
    assert numbers == [2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert "answer '5' is not the prompt's value 4" in complaints[0]


@given(st.text(max_size=200))
def test_no_text_breaks_the_checker_or_the_parser(text):
    assert isinstance(answer_is_right(CHAIN, text), bool)
    assert len(check_steps(CHAIN, lines(text))) == len(lines(text))
    for start in ("", arithmetic.CHAIN_TEXT, arithmetic.NESTED_TEXT, arithmetic.WORDS_TEXT):
        with contextlib.suppress(ValueError):
            assert isinstance(parse_prompt(start + text), Problem)


def test_a_problem_file_must_exist_and_hold_something(tmp_path):
    with pytest.raises(RunError, match=r"none\.jsonl' does not exist"):
        arithmetic.read_problems(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RunError, match="no usable problem"):
        arithmetic.read_problems(str(tmp_path / "empty.jsonl"))
