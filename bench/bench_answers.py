"""The outcome check on ordinary answers: ours in two processes, and math-verify called as it is, in this one.

Eight completions to a problem, as answers to MATH and GSM8K look: integers, with separators, currencies and units,
decimals, fractions, roots, polynomials, pairs and text. Half of the completions repeat the gold answer, a sixth write
it in another way, the others are wrong. Every round has fresh problems, so that no verdict of an earlier one helps.
"""

import itertools
import random

import pytest
from math_verify import parse, verify

from stepkto_fast.answers import AnswerChecker

WAYS = [  # of writing an answer made from two numbers, and of writing it otherwise; integers as often as in both
    (lambda a, b: f"{a}", lambda a, b: f"{a}.0"),
    (lambda a, b: f"{a}", lambda a, b: rf"\${a:,}"),
    (lambda a, b: f"{a}", lambda a, b: rf"{a}\text{{ km}}"),
    (lambda a, b: f"{a}", lambda a, b: f"x = {a}"),
    (lambda a, b: f"{a}.{b}", lambda a, b: f"{a}.{b}0"),
    (lambda a, b: rf"\frac{{{a}}}{{{b}}}", lambda a, b: f"{a}/{b}"),
    (lambda a, b: rf"{b}\sqrt{{{a}}}", lambda a, b: rf"\sqrt{{{a * b * b}}}"),
    (lambda a, b: f"x^2 + {a}x + {b}", lambda a, b: f"{b} + {a}x + x^2"),
    (lambda a, b: f"({a}, {b})", lambda a, b: rf"\left({a}, {b}\right)"),
    (lambda a, b: rf"\text{{box {a}}}", lambda a, b: rf"\text{{Box {a}}}"),
]
SAMPLES = 8


def completions(rng: random.Random, problems: int) -> tuple[list[str], list[str]]:
    """Gold answers and completions, SAMPLES in a row for each problem."""
    golds, texts = [], []
    for _ in range(problems):
        usual, otherwise = rng.choice(WAYS)
        a, b = rng.randrange(2, 3000), rng.randrange(2, 100)
        for _ in range(SAMPLES):
            kind = rng.random()
            slip = 0 if kind < 2 / 3 else rng.randrange(1, 30)
            answer = (otherwise if 1 / 2 < kind < 2 / 3 else usual)(a + slip, b)
            golds.append(usual(a, b))
            texts.append(f"Step 1: {a} and {b} are given.\nStep 2: So the answer is $\\boxed{{{answer}}}$.")
    return golds, texts


@pytest.fixture(scope="module")
def ours():
    with AnswerChecker(workers=2, timeout=5) as checker:
        yield lambda golds, texts: [v.right for v in checker.judge(golds, texts, [True] * len(texts))]


@pytest.fixture(scope="module")
def plain():
    def judge(golds: list[str], texts: list[str]) -> list[bool]:
        parsed = {gold: parse(f"${gold}$") for gold in dict.fromkeys(golds)}
        return [verify(parsed[gold], parse(text)) for gold, text in zip(golds, texts, strict=True)]

    return judge


@pytest.mark.parametrize("problems", [pytest.param(20, id="quick"), pytest.param(400, id="400 problems")])
@pytest.mark.parametrize(("name", "role"), [("ours", "ours"), ("plain", "peer")], ids=["ours", "math-verify"])
def test_answers(benchmark, request, name, role, problems):
    judge, seeds = request.getfixturevalue(name), itertools.count()
    judge(*completions(random.Random("warm-up"), 100))  # parsers learn from what they read
    benchmark.group = f"answers - {problems} problems, {SAMPLES} completions each"
    found = benchmark.pedantic(
        judge, setup=lambda: (completions(random.Random(f"{problems} {next(seeds)}"), problems), {}), rounds=3
    )
    assert 0.5 < sum(found) / len(found) < 0.8
    facts = {"op": "answers", "shape": f"{problems} problems", "role": role}
    facts["provider"] = "ours, 2 processes" if role == "ours" else "math-verify, 1 process"
    benchmark.extra_info.update(facts, answers_per_s=round(SAMPLES * problems / benchmark.stats.stats.median))
