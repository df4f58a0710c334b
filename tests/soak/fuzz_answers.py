"""Completions and gold answers: always a verdict, within the limits of time, whatever is written.

The text functions are tried in this process, for their time is to be linear in the length; the comparison in the
checker's own processes.
"""

import sys
import time
from functools import cache

import fuzzing
from hypothesis import strategies as st

from stepkto_fast.answer_text import (
    extract_answer,
    fixed_point,
    last_box,
    leading_number,
    normalised,
    plain_number,
)
from stepkto_fast.answers import AnswerChecker, decided, over_limits

TIMEOUT = 2.0
SLACK = 20.0  # seconds for starting processes on a busy machine
LINEAR = 5.0  # seconds for a text of a hundred thousand characters, which takes milliseconds

PIECES = [
    "\\boxed{", "\\fbox{", "\\boxed 3", "\\boxed", "{", "}", "\\{", "\\}", "\\frac{1}{2}", "\\frac12", "\\sqrt{", "x",
    "y^2", "^{", "^", "_", "9", "10", "1e5", "1.5e-3", "0.1", "-", "+", "/", "%", "\\%", ",", "1,000", "\\,", "{,}",
    " ", "\n", "$", "$$", "\\(", "\\)", "\\[", "\\]", "(", ")", "[", "]", "|", "=", "<", ">", "\\le", "\\ne", "\\in",
    "\\cup", "\\infty", "\\pi", "i", "e", "\\text{ cm}", "\\mathbb{R}", "\\begin{pmatrix}", "\\end{pmatrix}", "&",
    "\\\\", "\\int", "\\sum_{n=1}^{9}", "!", "answer is ", "Answer: ", "**", "#### ", ".", "dollars", "per cent",
    "half", "and", "\\overline{3}", "°", "½", "²", "\u2212", "∞", "\0", "\u202e", "٣", "os.system('true')",
    "__import__('os')", "lambda", "9" * 120, "10^{10^{10}}", "!" * 9, "\\log_",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=14).map("".join)
ANSWERS = TEXTS | st.integers().map(str) | st.fractions().map(str) | st.floats().map(repr) | st.decimals().map(str)


@cache
def checker():
    return AnswerChecker(workers=1, timeout=TIMEOUT)


def check_extraction(text, times):
    """Answers as text: found or not, never an error; a text repeated takes as many times as long, not its square."""
    fuzzing.diary.note((text, times))
    long = text * times
    start = time.process_time()
    for finished in (True, False):
        found = extract_answer(long, finished)
        assert found is None or (isinstance(found, str) and found.strip())
        if found is not None:
            normalised(found), plain_number(normalised(found)), over_limits(found)
    last_box(long)
    assert time.process_time() - start < LINEAR * max(1, len(long) / 1e5)


def check_texts(text):
    fuzzing.diary.note(text)
    once = normalised(text)
    assert isinstance(leading_number(text), str)
    assert isinstance(fixed_point(text), str)
    number = plain_number(once)
    assert number is None or decided(once, once) is True
    assert decided(once, normalised(text)) is True


def check_verdicts(gold, answers):
    """Every completion has a verdict; the gold itself in a box is right or unverified, unless it parses as nothing."""
    fuzzing.diary.note((gold, answers))
    completions = [*(f"so \\boxed{{{answer}}}." for answer in answers), *answers]
    start = time.monotonic()
    verdicts = checker().judge([gold] * len(completions), completions, [True] * len(completions))
    assert len(verdicts) == len(completions)
    for verdict in verdicts:
        assert isinstance(verdict.right, bool)
        assert isinstance(verdict.verified, bool)
        assert verdict.verified or not verdict.right
        assert verdict.answer is not None or not verdict.right
    assert time.monotonic() - start < len(completions) * (TIMEOUT + 1) + SLACK


def check_golds(golds):
    """Gold answers are usable or complained of; a usable one equals itself, or is left unverified."""
    fuzzing.diary.note(golds)
    start = time.monotonic()
    complaints = checker().complaints(golds)
    usable = [gold for gold, complaint in zip(golds, complaints, strict=True) if complaint is None]
    for complaint in complaints:
        assert complaint is None or len(complaint) < 500
    boxed = [f"\\boxed{{{gold}}}" for gold in usable]
    for gold, verdict in zip(usable, checker().judge(usable, boxed, [True] * len(usable)), strict=True):
        if verdict.answer == gold.strip():
            assert verdict.right or not verdict.verified, gold
    assert time.monotonic() - start < 2 * len(golds) * (TIMEOUT + 1) + SLACK


def check_majority(answers):
    fuzzing.diary.note(answers)
    start = time.monotonic()
    (winner,) = checker().majority([answers])
    assert winner is None if all(answer is None for answer in answers) else answers[winner] is not None
    assert time.monotonic() - start < 2 * len(answers) ** 2 * (TIMEOUT + 1) + SLACK


def one_input(data):
    """Bytes as a completion, for the text functions alone."""
    text = data.decode("utf-8", "replace")
    check_extraction(text, 1 + len(data) % 7)
    check_texts(text)


CORPUS = [
    piece.encode() for piece in ("so \\boxed{\\frac{1}{2}}", "The answer is 1,000 dollars.", "#### 18", "\\boxed 3")
]

if __name__ == "__main__":
    sys.exit(
        fuzzing.main(
            __file__,
            {
                check_extraction: {"text": TEXTS, "times": st.sampled_from([1, 2, 3000])},
                check_texts: {"text": ANSWERS},
                check_verdicts: {"gold": ANSWERS, "answers": st.lists(ANSWERS, min_size=1, max_size=3)},
                check_golds: {"golds": st.lists(ANSWERS, min_size=1, max_size=4)},
                check_majority: {"answers": st.lists(st.none() | ANSWERS, min_size=1, max_size=4)},
            },
            has_bytes=True,
        )
    )
