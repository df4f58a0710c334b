"""The outcome check: which answer counts, who is right, and that nothing an answer holds can hurt the run."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkto_fast import answer_pool, answers
from stepkto_fast.answer_pool import WorkerPool
from stepkto_fast.answer_text import extract_answer, fixed_point, last_box, leading_number, normalised, plain_number
from stepkto_fast.answers import AnswerChecker, Verdict, decided
from stepkto_fast.errors import RunError
from stepkto_fast.rows import RowError
from stepkto_fast.tasks.gold import after_hashes, worked_solution

math_verify = pytest.importorskip("math_verify", reason="math-verify comes with the extra [train]")

from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy as Converter  # noqa: E402  only where installed

from stepkto_fast.answer_worker import differ_at_a_point, load  # noqa: E402

AS_SHIPPED = {name: getattr(Converter, name) for name in ("create_parser", "parse")}

# An answer that math-verify works on for minutes, and one for which it wants ever more memory.
ENDLESS = r"(x+1)^{99999} + (x-1)^{99999}"
DEEP = "(" * 4000 + "x" + ")" * 4000
GIANT = "9^{9^{9^9}}"


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(workers=1, timeout=20) as checker:
        yield checker


@pytest.fixture(scope="module")
def equal():
    return load()


def boxed(answer: str) -> str:
    return f"Step 1: think.\nThe answer is \\boxed{{{answer}}}."


def judge_one(checker: AnswerChecker, gold: str, answer: str) -> Verdict:
    return checker.judge([gold], [boxed(answer)], [True])[0]


# ---- which answer a completion gives ----


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"So it is \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox {7}", "7"),
        (r"\boxed{\fbox{3}}", "3"),
        (r"a { b \boxed{5} c", "5"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{5}. Put yours into \boxed{}", "5"),
        (r"\boxed{5} The answer is 6.", "5"),
        (r"\boxed{5} and then \boxed{\frac{1}{2}", "5"),
        ("2 + 40 = 42\n#### 42\n", "42"),
        ("#### 3 apples\nThe answer is 4.", "4"),
        ("The answer is 3.14.", "3.14"),
        ("the answer is: $\\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "$12$"),
        ("**Final answer:** 42", "42"),
        ("**Final answer: 42**", "42"),
        ("Answer:\n\n$x = 5$\n\nThank you.", "$x = 5$"),
        ("The answer is 4. No, wait. The answer is 5.", "5"),
        ("There are 3 bags with 4 each, that is 12", None),
        ("The answer is", None),
        ("She answered 7.", None),
        (r"It is $\boxed 3$.", "3"),
        (r"It is \boxed 3, then", "3"),
        (r"\boxed3", "3"),
        (r"\boxed{4} or \boxed -1.5", "-1.5"),
        (r"\boxed{5}, and \boxed as I was asked", "5"),
        (r"\boxed{5}, in `\boxed`. Was \boxedA 3 so?", "5"),
        (r"\boxed", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_the_answer_of_a_finished_completion(completion, answer):
    assert extract_answer(completion) == answer


def test_a_truncated_completion_has_an_answer_only_in_a_closed_box(checker):
    for text in ("First 6 * 7 = 42", "The answer is 42", "#### 42", r"so \boxed{42", r"so \boxed{\frac{84}{2}"):
        assert extract_answer(text, finished=False) is None
    assert extract_answer(r"\boxed{42} since 6", finished=False) == "42"

    stray = "First we need 6 * 7 = 42"
    assert math_verify.verify(math_verify.parse("42"), math_verify.parse(stray))  # the accident
    found = checker.judge(["42"] * 3, [stray, stray, boxed("42")], [False, True, False])
    assert [(v.right, v.verified, v.answer) for v in found] == [(False, True, None)] * 2 + [(True, True, "42")]


def test_a_box_without_braces_may_be_cut_off():
    assert extract_answer(r"It is \boxed 4", finished=False) is None
    assert extract_answer(r"It is \boxed 42 since", finished=False) == "42"
    assert extract_answer(r"It is \boxed 42") == "42"


@pytest.mark.parametrize("before", ["The answer is ", "So 18.\n#### ", "**Final answer:** "])
@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        ("18 dollars", "18"),
        ("18 a", "18 a"),
        ("$18 a day, as she said", "$18"),
        ("$18$ dollars", "$18$"),
        (r"\$1,800 (before taxes)", r"\$1,800"),
        ("**18** miles/hour", "18"),
        ("18, because the rest is the cat's", "18"),
        ("0.5 km", "0.5"),
        ("-18 degrees", "-18"),
        ("1/2 cup", "1/2"),
        ("3 1/2 cups", "3 1/2"),
        (r"$\frac{1}{2}$ of the cake", r"$\frac{1}{2}$"),
        ("20% of it", "20%"),
        ("20 percent of it", "20 percent"),
        *[
            (text, text)
            for text in (
                "18 or 20", "18 or twenty", "18 dollars and 20 cents", "18 x + 2", "18 = 2 * 9", "18 x", "18 xy",
                "18 / half", "18 / people", "18 - people", "18 (x)", "3 million", "3 dozen eggs", "2 thirds", "3 pi",
                "3 to one", "18 is not it", "18 out of twenty", "3:30 pm", r"18\text{ km}", "x dollars", "(1, 2) is it",
                "20 percent", "18 cm^2", "1,2 dollars", "5 mod p", "18 $x$",
            )
        ],
    ],
)  # fmt: skip
def test_a_statement_gives_its_number_without_the_unit(before, statement, answer):
    assert extract_answer(before + statement) == answer
    assert extract_answer(before + statement + "\n") == answer
    assert extract_answer(f"{before}\\boxed{{{statement}}}") == statement


def test_a_unit_in_a_statement_or_in_the_gold_answer_costs_nothing(checker):
    said = ["The answer is 18 dollars.", "#### 18 dollars", "The answer is 19 dollars.", "The answer is 18 or 20."]
    texts = [*said, boxed("18"), boxed("18 dollars")]
    assert [v.right for v in checker.judge(["18"] * 6, texts, [True] * 6)] == [True, True, False, False, True, False]
    found = checker.judge(["18 dollars"] * 6, texts, [True] * 6)
    assert [v.right for v in found] == [True, True, False, False, True, True]
    assert checker.complaints(["18 dollars"]) == [None]


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\"), max_size=5),
    lambda inner: st.lists(
        inner | inner.map(lambda text: f"{{{text}}}") | st.sampled_from([r"\frac", r"\{", r"\}"])
    ).map("".join),
    max_leaves=8,
)


@given(balanced, balanced, st.booleans())
def test_a_box_yields_what_it_holds(before, content, finished):
    found = extract_answer(f"{before} \\boxed{{{content}}} and so on, 17", finished)
    assert found == (content.strip() or None)


@given(st.text(st.sampled_from(list("\\{}boxedf#answer is:=.\n $*7")) | st.characters()), st.booleans())
def test_extraction_takes_any_text(text, finished):
    found = extract_answer(text, finished)
    assert found is None or (found in text and found == found.strip() != "")


@pytest.mark.parametrize(
    "piece", [r"\boxed{", "{", "}", r"\boxed ", "answer ", "answer is ", "answer*", "####", "\\", " ", "\n", "1,", "^{"]
)
def test_a_megabyte_of_anything_is_read_at_once(piece):
    text = piece * (1_000_000 // len(piece))  # what is quadratic takes hours for it
    assert answers.over_limits(text)
    normalised(text)
    found = extract_answer(text)
    assert found is None or found in text
    assert extract_answer(f"{text} \\boxed{{8}}", finished=False) == "8"


@pytest.mark.timeout(120)  # what is quadratic takes minutes for one of them
def test_no_text_makes_a_regular_expression_slow():
    starts = ["x^", "x^{", "18 ", r"\boxed", "answer", "The answer is 18 ", "#### 18", "<<"]
    fillers = [" ", "1", "1,", "^", "^1", "^{", "{", "\\", "answer is ", "*", "a", "1 ", "-", r"\boxed ", "<", ".", "$"]
    for start, filler, end in product(starts, fillers, ["y", "}"]):
        text = start + filler * (50_000 // len(filler)) + end
        for pattern in (answers.GIANT_POWER, answers.RELATION):
            pattern.search(text)
        for read in (normalised, extract_answer, leading_number, last_box, plain_number, fixed_point):
            read(text)
        worked_solution(text, "1")
        with suppress(RowError):
            after_hashes({"answer": text}, "answer")
    assert not answers.over_limits("x^" + " " * 1980 + "y")


# ---- who is right ----


def test_the_gold_answer_goes_first(checker):
    interval, inequality = r"(1, 2)", "1 < x < 2"
    gold, other = (math_verify.parse(f"${text}$") for text in (inequality, interval))
    assert math_verify.verify(gold, other)
    assert not math_verify.verify(other, gold)
    assert judge_one(checker, inequality, interval) == Verdict(True, True, interval)
    assert judge_one(checker, interval, inequality) == Verdict(False, True, inequality)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("1234", ["1,234", r"1{,}234", r"1\,234", r"\$1,234", "1234.", "1234.0"], ["1,2,3,4", "12,34", "1.234", "234"]),
        (r"\frac{1}{2}", ["0.5", "1/2", r"\dfrac12", "50\\%", "2/4", ".5"], ["1,2", "12", "-1/2"]),
        (r"\frac{7}{2}", ["3.5", r"3\frac{1}{2}", "3 1/2"], ["2", "31/2"]),
        ("18", [r"18\text{ dollars}", "18 km", r"\$18", "x = 18"], [r"\text{eighteen}", "1.8"]),
        ("1, 2", ["2, 1", r"\{1, 2\}"], ["12", "1.2", "1", "1, 2, 3"]),
        ("(1, 2)", ["(1,2)", r"\left(1, 2\right)"], ["(2, 1)", "[1, 2]"]),
        (r"2\sqrt{3}", [r"\sqrt{12}"], [r"\sqrt{13}"]),
        ("x^2 + 2x + 1", ["(x+1)^2"], ["(x-1)^2"]),
        ("1500", ["1.5e3", "1.5E+3", "1500.0"], ["1.5e4", "1.5"]),
        ("1e-5", ["0.00001", "1e-05", "1E-5", "10^{-5}", r"1 \times 10^{-5}"], ["0", "-5", "0.0001", "e-5"]),
        ("2e-5", ["2e - 5", "-5 + 2e"], ["0.00002"]),
        (r"\text{Evelyn}", [r"\text{evelyn}", "Evelyn"], [r"\text{Eve}"]),
    ],
)
def test_answers_are_compared_by_what_they_mean(checker, gold, right, wrong):
    found = checker.judge([gold] * len(right + wrong), [boxed(x) for x in right + wrong], [True] * len(right + wrong))
    assert [v.right for v in found] == [True] * len(right) + [False] * len(wrong)
    assert all(v.verified for v in found)


def test_a_box_that_does_not_parse_gets_no_credit_for_a_number_in_it(checker):
    assert math_verify.verify(math_verify.parse("42"), math_verify.parse(r"\boxed{\foo{ = 42 \bar}"))  # the accident
    assert judge_one(checker, "42", r"\frac{ = 42 \bar}") == Verdict(False, True, r"\frac{ = 42 \bar}")


def test_gold_answers_that_cannot_be_used_are_reported(checker):
    unusable = r"\frac{1}{"
    gold = math_verify.parse(unusable, [math_verify.LatexExtractionConfig()], fallback_mode="no_fallback")
    assert not math_verify.verify(gold, gold)  # whatever is compared with it, be it itself
    golds = ["42", "1,000", unusable, r"\frac{1}{2}", "", " $ ", 42, GIANT, DEEP, "1/0", "(1, 2)", unusable]
    found = checker.complaints(golds)
    assert [n for n, complaint in enumerate(found) if complaint is None] == [0, 1, 3, 10]
    assert "does not parse" in found[2]
    assert unusable in found[2].replace("\\\\", "\\")
    assert found[2] == found[11]
    assert "empty" in found[4]
    assert "empty" in found[5]
    assert "type int" in found[6]
    assert "too long, too deep or too large" in found[7]
    assert "too long, too deep or too large" in found[8]
    assert len(found[8]) < 200
    assert "does not parse" in found[9]


digits = st.integers(-2000, 2000).map(str)
decimals = st.decimals(-2000, 2000, allow_nan=False, places=3).map(str) | st.sampled_from(["0.333333", "0.3333", ".25"])
fractions = st.builds("{}/{}".format, st.integers(-60, 60), st.integers(1, 60))
commands = st.sampled_from([r"\frac", r"-\frac", r"\dfrac", r"-\tfrac"])
latex_fractions = st.builds("{}{{{}}}{{{}}}".format, commands, st.integers(0, 60), st.integers(1, 60))
thousands = st.integers(-(10**9), 10**9).map("{:,}".format)
numbers = digits | decimals | fractions | latex_fractions | thousands
# Two that may well be equal: the same value written twice, or nearly.
written = st.fractions(-50, 50, max_denominator=20).flatmap(
    lambda x: st.tuples(
        *[st.sampled_from([f"{x.numerator}/{x.denominator}", f"{float(x):.6f}", f"{float(x):.12f}"])] * 2
    )
)


@given(st.tuples(numbers, numbers) | written)
@settings(max_examples=150, deadline=None)
def test_what_is_decided_without_math_verify_is_what_it_says(equal, pair):
    gold, answer = pair
    found = decided(gold, answer)
    assert found is None or found == equal(gold, answer)


scientific = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-99, max_value=99)


@given(scientific, st.integers(-60, 60), st.sampled_from("eE"))
def test_scientific_notation_is_written_out(mantissa, exponent, e):
    text = f"{mantissa}{e}{exponent}"
    assert "e" not in fixed_point(text).lower()
    assert plain_number(fixed_point(text))[0] == Fraction(mantissa) * Fraction(10) ** exponent


@pytest.mark.parametrize("text", ["2e-5", "2e+5", "e5", "1e", "1e400", "1e5x", "2e", "x", "1.5", "1e5e5", "1" * 200])
def test_other_text_is_left_as_it_is(text):
    assert fixed_point(text) == text


@pytest.mark.parametrize(
    "text", ["1,2", "12,34", "0,5", "(1)", "50%", "5 km", "1/0", "x", "2e-5", "", ".", "٣", "1" * 200]
)
def test_what_is_no_plain_number_goes_to_math_verify(text):
    assert plain_number(text) is None


FORMS = [
    "5", "5.0", "x = 5", "y = 5", r"\frac{10}{2}", "500\\%", r"2\sqrt{3}", r"\sqrt{12}", "3.464102", "(1, 2)", "[1, 2]",
    r"\{1, 2\}", "1, 2", "1 < x < 2", "x^2 - 1", "(x-1)(x+1)", "x^2", r"\frac{\pi}{2}", r"\text{east}", "east",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"3 + 4i", r"\infty", r"|x|", r"x \in [1, 2]", "f(x)", "1 +", "50",
    r"(1, \sqrt{4}]", r"(\frac{2}{2}, 2]", r"(1, 3]", r"(1, \sqrt{3}] \cup (5, \infty)", r"(1, 2) \cup (5, 6)",
    r"(5, \infty) \cup (1, 1.732051]", r"(1, 2] \cup (5, \infty)", r"[a, 2]",
    r"[a, \frac{4}{2}]", r"[b, 2]", r"(-\infty, 2)", r"(-\infty, 3)",
]  # fmt: skip


def test_the_worker_agrees_with_math_verify_left_alone(equal, monkeypatch):
    pairs = [(a, FORMS[(n + k) % len(FORMS)]) for n, a in enumerate(FORMS) for k in (-2, -1, 0, 1, 2)]
    ours = [equal(*pair) for pair in pairs]
    for name, method in AS_SHIPPED.items():
        monkeypatch.setattr(Converter, name, method)
    for module in (math_verify.parser.parse_latex_cached, math_verify.parser.extract_latex):
        module.cache_clear()
    config = [math_verify.LatexExtractionConfig()]
    parsed = {x: math_verify.parse(rf"\boxed{{{x}}}", config, fallback_mode="no_fallback") for x in FORMS}
    theirs = [math_verify.verify(parsed[a], parsed[b]) for a, b in pairs]
    assert dict(zip(pairs, ours, strict=True)) == dict(zip(pairs, theirs, strict=True))
    assert len(FORMS) < sum(ours) < len(pairs) / 2


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("2x", "3x", True),
        (r"(1, \sqrt{2}]", r"(1, \sqrt{3}]", True),
        (r"(1, \sqrt{2}] \cup (5, 6)", r"(5, 7) \cup (1, \sqrt{2}]", True),
        (r"(1, \sqrt{2}] \cup (5, 6)", r"(5, 6) \cup (1, 1.41421356]", False),
        (r"(1, 2) \cup (5, 6)", "(1, 2)", False),  # that is for math-verify to say
        (r"(1, \infty)", r"(1, 2)", False),
        ("(1, 2, 3)", "(1, 2, 4)", False),
    ],
)
def test_clearly_different_values_need_no_algebra(one, other, differ):
    config = [math_verify.LatexExtractionConfig()]
    parsed = [math_verify.parse(rf"\boxed{{{x}}}", config, fallback_mode="no_fallback")[:1] for x in (one, other)]
    assert differ_at_a_point(*parsed) == differ


# ---- hostile input, and processes that die ----


def test_hostile_answers_cost_their_rows_only(checker):
    hostile = [DEEP, GIANT, r"\frac{1}{2} + " * 70_000, "9^9^9^9^9", "{" * 500_000 + "}" * 500_000, "9" * 1_000_000]
    completions = [boxed(text) for text in (*hostile, "42")]
    found = checker.judge(["42"] * 7, completions, [True] * 7)
    assert [(v.right, v.verified) for v in found] == [(False, False)] * 6 + [(True, True)]
    assert len(found[2].answer) > 900_000
    # The same text as the gold answer is right whatever it holds.
    assert judge_one(checker, GIANT, GIANT) == Verdict(True, True, GIANT)


def test_a_timeout_is_not_a_wrong_answer():
    gold, endless = (math_verify.parse(f"${text}$") for text in ("5", ENDLESS))
    assert not math_verify.verify(gold, endless, timeout_seconds=1)  # it could not know
    nested = "(" * 16 + "x" + ")" * 16
    with AnswerChecker(workers=1, timeout=0.5) as checker:
        found = checker.judge(["5", "5", "x"], [boxed(ENDLESS), boxed("5"), boxed("y")], [True] * 3)
        assert found == [Verdict(False, False, ENDLESS), Verdict(True, True, "5"), Verdict(False, True, "y")]
    with AnswerChecker(workers=1, timeout=0.01) as checker:
        assert "time or memory" in checker.complaints([nested])[0]


def test_memory_has_a_limit():
    pool = WorkerPool(workers=1, timeout=500, memory=256 << 20)  # so long that only memory can end it
    try:
        assert pool.run([("6", "x"), ("5", ENDLESS), (r"\frac{1}{2}", "0.50"), ("x", "x")]) == [False, None, True, True]
    finally:
        pool.close()


def test_it_works_in_any_thread(checker):
    with ThreadPoolExecutor(4) as threads:
        with pytest.raises(ValueError, match="threaded environment"):
            threads.submit(math_verify.parse, "$5$").result()
        found = threads.map(lambda n: judge_one(checker, f"x + {n}", f"{n} + x").right, range(8))
        assert list(found) == [True] * 8


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_costs_the_row_it_was_working_on(blow):
    with AnswerChecker(workers=1, timeout=3 if blow == signal.SIGSTOP else 60) as checker:
        judge_one(checker, "x", "y")  # now it is up
        (worker,) = checker._pool.workers

        def strike():
            while not worker.asked:
                time.sleep(0.001)
            time.sleep(0.2)
            os.kill(worker.process.pid, blow)

        striking = threading.Thread(target=strike)
        striking.start()
        texts = [ENDLESS, "x", "1 + x", "2x", "3x", "3x - x"]
        found = checker.judge(["2x"] * 6, [boxed(text) for text in texts], [True] * 6)
        striking.join()
        assert [v.verified for v in found] == [False] + [True] * 5
        assert [v.right for v in found] == [False, False, False, True, False, True]
        assert worker.process.returncode is not None
        assert checker._pool.workers[0].process.pid != worker.process.pid


def test_a_worker_that_dies_between_calls_costs_nothing(checker):
    judge_one(checker, "x", "y")
    process = checker._pool.workers[0].process
    process.kill()
    process.wait()
    assert judge_one(checker, "2x", "x + x") == Verdict(True, True, "x + x")


def test_a_call_that_is_broken_off_leaves_the_next_one_right(checker):
    def stop(done, total):
        raise KeyboardInterrupt

    texts = [f"{n} + y" for n in range(12)]
    with pytest.raises(KeyboardInterrupt):
        checker.judge(["y"] * 12, [boxed(text) for text in texts], [True] * 12, stop)
    steps = []
    texts = ["2z", "z + z", "3z", "z", "2z"]
    found = checker.judge(["2z"] * 5, [boxed(text) for text in texts], [True] * 5, lambda *step: steps.append(step))
    assert [v.right for v in found] == [True, True, False, False, True]
    assert steps[-1] == (4, 4)  # distinct ones
    assert steps == sorted(steps)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
@pytest.mark.parametrize("farewell", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_no_process_is_left_behind(farewell):
    program = textwrap.dedent(f"""
        import os, threading, time
        from stepkto_fast.answers import AnswerChecker
        if __name__ == "__main__":
            checker = AnswerChecker(workers=2, timeout=1)
            judge = lambda: checker.judge(["5"], [{boxed(ENDLESS)!r}], [True])
            threading.Thread(target=judge, daemon=True).start()
            while not any(worker.asked for worker in checker._pool.workers):
                time.sleep(0.01)
            print(*(worker.process.pid for worker in checker._pool.workers), flush=True)
            {farewell}
    """)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120).stdout
    pids = out.split()
    assert len(pids) == 2

    def runs(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    until = time.monotonic() + 60
    while any(map(runs, pids)):
        assert time.monotonic() < until, f"{pids} still run"
        time.sleep(0.05)


# ---- majorities ----


def test_majorities_are_of_equal_answers(checker):
    found = checker.majority(
        [
            ["3", "1/2", "4", "0.5", r"\frac12", "3"],
            ["7", "8", "8", "7"],
            [None, None],
            [],
            [None, "x + 1", "1 + x", "y"],
            ["3", "(1, 2)", "1 < x < 2"],  # equal in one direction only
            ["5", "x = 5", "6", "6", "y", "x=5.0"],
            [GIANT, "1", GIANT],
        ]
    )
    assert found == [1, 0, None, None, 1, 1, 0, 0]


def test_equality_is_closed_transitively(checker, monkeypatch):
    a, b, c, d, e = (f"{letter} = 1" for letter in "abcde")
    chain = {(a, b), (c, b), (c, d)}
    monkeypatch.setattr(checker, "_same", lambda pairs: {pair: pair in chain for pair in pairs})
    assert checker.majority([[e, e, d, a, e, b, c], [b, d, c]]) == [2, 0]
    assert checker.majority([[a, c, e, e]]) == [2]


def test_an_answer_is_compared_with_one_of_each_class(checker, monkeypatch):
    asked = []
    run = checker._pool.run
    monkeypatch.setattr(checker._pool, "run", lambda requests, report=None: asked.extend(requests) or run(requests))
    same = [f"({n}/{n}, 2)" for n in range(3, 19)]
    other = [f"({n}/{n}, 5)" for n in range(3, 18)]
    mixed = [text for pair in zip(other, same, strict=False) for text in pair]
    assert checker.majority([same, [*mixed, same[-1]]]) == [0, 1]
    assert len(asked) <= (len(same) - 1) + 2 * len(mixed) + 2  # of all pairs: 120 + 465 + 240


def test_relations_connect_what_else_is_different(checker):
    # 5 equals both, in whatever order they come.
    assert checker.majority([["6", "6", "x = 5", "y = 5", "5"], ["6", "6", "x = 5", "5", "y = 5"]]) == [2, 2]


def test_few_comparisons_are_made(checker, monkeypatch):
    asked = []
    run = checker._pool.run
    monkeypatch.setattr(checker._pool, "run", lambda requests, report=None: asked.extend(requests) or run(requests))
    samples = [boxed(text) for text in ["17", "17.0", "18", "w + 1", "w + 1", "1 + w", r"$w + 1$"]]
    checker.judge(["w + 1"] * 7, samples, [True] * 7)
    assert sorted(asked) == [("w + 1", text) for text in ("1 + w", "17", "17.0", "18")]
    checker.judge(["w + 1"] * 7, samples, [True] * 7)
    assert len(asked) == 4
    checker.majority([["17", "17.0", "18", "19", "17"]])
    assert len(asked) == 4


# ---- what is missing ----


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(RunError, match=r"math_verify.*pip install 'math-verify"):
        AnswerChecker()


def test_the_module_needs_no_math_verify_to_be_imported():
    program = "import sys; sys.modules['math_verify'] = sys.modules['sympy'] = None; import stepkto_fast.answers"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_checker_of_nobody_is_refused():
    for workers, timeout in ((0, 5.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(RunError, match="give at least 1"):
            AnswerChecker(workers, timeout)


@pytest.mark.parametrize(
    ("program", "message"),
    [("print('\"no latex2sympy\"')", "no latex2sympy.*pip install"), ("raise SystemExit(3)", "ended 3 times")],
)
def test_workers_that_do_not_start_end_the_wait(tmp_path, monkeypatch, program, message):
    (tmp_path / "feigned_worker.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(answer_pool, "MODULE", "feigned_worker")
    with AnswerChecker(workers=1) as checker, pytest.raises(RunError, match=message):
        judge_one(checker, "x", "y")


def test_a_closed_checker_says_so():
    with AnswerChecker(workers=1) as checker:
        pass
    with pytest.raises(ValueError, match="closed"):
        judge_one(checker, "x", "y")
