"""Mathematical answers: which one a completion gives, whether it is right, and which ones are the same.

The answer is what stands in the last box, else in an explicit statement of a finished completion; never just the last
number, which in a truncated solution may match by accident. Whether two answers are the same is decided by math-verify
in processes with hard limits (`answer_pool`). The gold answer goes first, for the comparison is not symmetric: the
interval (1, 2) answers a gold `1 < x < 2`, but not the other way round. What crashes, hangs or exceeds a limit is left
unverified, which is not the same as wrong.
"""

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import compress
from operator import not_

from .answer_pool import INSTALL, WorkerPool
from .answer_text import extract_answer, leading_number, normalised, plain_number
from .errors import RunError

# What exceeds these is not parsed at all: it would take seconds, and no answer to a problem looks like that.
MAX_CHARACTERS = 2000
MAX_DEPTH = 16
GIANT_POWER = re.compile(
    r"\^\s*(?:\{\s*)?(?:-\s*)?[0-9][0-9,.]{6,}"  # an exponent of seven digits
    r"|\^\s*\{[^{}^]*\^\s*\{[^{}^]*\^|\^\s*[0-9]+\s*\^\s*[0-9]+\s*\^"  # a tower of four
)
RELATION = re.compile(r"[=<>≤≥≠∈]|\\(?:le(?!ft)|ge|ne(?!g)|lt|gt|not|in(?![a-z]))")

# math-verify rounds decimals to six places, and its floats have 15 digits.
SURELY_DIFFERENT = Fraction(2, 10**6)
SURELY_PRECISE = 10**8
MEMO_SIZE = 50_000

Pair = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """Of one completion. `verified` is False where the check could not be finished; `right` is False then."""

    right: bool
    verified: bool
    answer: str | None


# ---- what can be decided without parsing ----


def decided(gold: str, answer: str) -> bool | None:
    """Whether two normalised answers are the same, None where that takes math-verify."""
    if gold == answer:
        return True
    left, right = plain_number(gold), plain_number(answer)
    if left is None or right is None:
        return None
    (a, exact), (b, also_exact) = left, right
    if a == b:
        return True
    certain = abs(a - b) > SURELY_DIFFERENT and max(abs(a), abs(b)) < SURELY_PRECISE
    return False if (exact and also_exact) or certain else None


def over_limits(text: str) -> bool:
    """Whether `text` is too long, too deep or too large to be parsed."""
    if len(text) > MAX_CHARACTERS or GIANT_POWER.search(text):
        return True
    depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        if depth > MAX_DEPTH:
            return True
    return False


# ---- checking ----


class AnswerChecker:
    """Checks answers in `workers` processes, each answer for `timeout` seconds at most.

    A context manager; its methods may be called from any thread. Raises RunError where math-verify is missing.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0):
        if workers < 1 or not timeout > 0:
            raise RunError(f"{workers} answer workers with {timeout} seconds: give at least 1, and a positive time")
        if missing := [name for name in ("math_verify", "antlr4") if importlib.util.find_spec(name) is None]:
            raise RunError(f"checking mathematical answers needs {missing[0]}, which is not installed: {INSTALL}")
        self.timeout = timeout
        self._pool = WorkerPool(workers, timeout)
        self._memo: dict[Pair, bool] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. The checker is of no use afterwards."""
        self._pool.close()

    def complaints(self, golds: Sequence[str]) -> list[str | None]:
        """Why a gold answer cannot be used, None where it can: one that math-verify cannot parse equals nothing."""
        found: dict[int, str | None] = {}
        to_parse: dict[int, str] = {}
        for n, gold in enumerate(golds):
            if not isinstance(gold, str):
                found[n] = f"the answer is of type {type(gold).__name__}: give text"
            elif not (text := _without_unit(normalised(gold))):
                found[n] = "the answer is empty"
            elif over_limits(text):
                found[n] = f"the answer {_shown(gold)} is too long, too deep or too large to be parsed"
            elif plain_number(text) is None:
                to_parse[n] = text
        distinct = list(dict.fromkeys(to_parse.values()))
        with self._lock:
            same = dict(zip(distinct, self._pool.run([(text, text) for text in distinct]), strict=True))
        for n, text in to_parse.items():
            if same[text] is None:
                found[n] = f"the answer {_shown(golds[n])} takes more time or memory than its check may"
            elif not same[text]:
                found[n] = f"the answer {_shown(golds[n])} does not parse: give a number or an expression in LaTeX"
        return [found.get(n) for n in range(len(golds))]

    def judge(
        self,
        golds: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """The verdict on each completion, given its gold answer and whether it came to its end.

        on_progress gets how many distinct answers are checked, and of how many.
        """
        answers = [extract_answer(text, whole) for text, whole in zip(completions, finished, strict=True)]
        pairs = [None if answer is None else _pair(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
        same = self._same((pair for pair in pairs if pair), on_progress)
        return [
            Verdict(bool(pair and same[pair]), pair is None or same[pair] is not None, answer)
            for pair, answer in zip(pairs, answers, strict=True)
        ]

    def majority(self, answers: Sequence[Sequence[str | None]]) -> list[int | None]:
        """For each problem, which of its answers is the first of those that most of them equal.

        Equality here is math-verify's in either direction, closed transitively; of classes of one size the one seen
        first counts. None where no answer is given.
        """
        texts = [[None if answer is None else normalised(answer) for answer in given] for given in answers]
        distinct = [list(dict.fromkeys(text for text in given if text is not None)) for given in texts]
        seen = {text for given in distinct for text in given}
        numbers = {text for text in seen if plain_number(text)}
        relations = {text for text in seen if RELATION.search(text)}
        classes: list[list[list[str]]] = [[] for _ in texts]  # of each problem, in the order of their first members
        for n in range(max(map(len, distinct), default=0)):
            new = [(given[n], found) for given, found in zip(distinct, classes, strict=True) if n < len(given)]
            self._sort_in(new, numbers, relations)
        winners = []
        for given, found in zip(texts, classes, strict=True):
            count = Counter(given)
            largest = max(found, key=lambda members: sum(count[text] for text in members), default=None)
            winners.append(given.index(largest[0]) if largest else None)
        return winners

    def _sort_in(self, new: Sequence[tuple[str, list[list[str]]]], numbers: set[str], relations: set[str]) -> None:
        """Puts each new answer into the classes of its problem; those that it connects become one.

        It is compared with the first member of each class, and the other way round only where nothing matched.
        Relations are compared with all members in both directions: through them equality is not transitive, for
        5 equals both x = 5 and y = 5.
        """
        apart = [list(found) for _, found in new]
        joined: list[list[list[str]]] = [[] for _ in new]

        def compared(text: str, members: list[str], matched: bool, first: bool, swapped: bool) -> list[str]:
            if first and not (swapped and (matched or (text in numbers and members[0] in numbers))):
                return members[:1]
            rest = members[:1] if first else members[1:]
            return rest if text in relations else [old for old in rest if old in relations]

        for first, swapped in ((True, False), (True, True), (False, False), (False, True)):
            pairs = [
                [
                    [(text, old) if swapped else (old, text) for old in compared(text, kind, bool(own), first, swapped)]
                    for kind in kinds
                ]
                for (text, _), kinds, own in zip(new, apart, joined, strict=True)
            ]
            same = self._same(pair for kinds in pairs for kind in kinds for pair in kind)
            for n, asked in enumerate(pairs):
                equal = [any(same[pair] for pair in kind) for kind in asked]
                joined[n] += compress(apart[n], equal)
                apart[n] = list(compress(apart[n], map(not_, equal)))
        for (text, found), own in zip(new, joined, strict=True):
            merged = [kind for kind in found if kind in own] or [[]]
            if not own:
                found += merged
            for kind in merged[1:]:
                merged[0].extend(kind)
                found.remove(kind)
            merged[0].append(text)

    def _same(
        self, pairs: Iterable[Pair], on_progress: Callable[[int, int], None] | None = None
    ) -> dict[Pair, bool | None]:
        """Whether gold and answer of each pair are the same, None where that stays open."""
        found: dict[Pair, bool | None] = {}
        to_parse: list[Pair] = []
        with self._lock:
            if len(self._memo) > MEMO_SIZE:
                self._memo.clear()
            for pair in dict.fromkeys(pairs):
                found[pair] = decided(*pair)
                if found[pair] is None:
                    found[pair] = self._memo.get(pair)
                if found[pair] is None and not any(map(over_limits, pair)):
                    to_parse.append(pair)
            quick = len(found) - len(to_parse)
            report = None if on_progress is None else lambda done: on_progress(quick + done, len(found))
            for pair, same in zip(to_parse, self._pool.run(to_parse, report), strict=True):
                found[pair] = same
                if same is not None:  # what was left open, say for want of time, may be decided another day
                    self._memo[pair] = same
        return found


def _pair(gold: str, answer: str) -> Pair:
    """Normalised; a gold answer with a unit, "18 dollars", takes the number alone as well."""
    left, right = normalised(gold), normalised(answer)
    return (left if left == right else _without_unit(left), right)


def _without_unit(gold: str) -> str:
    return normalised(leading_number(gold))


def _shown(gold: str) -> str:
    return repr(gold if len(gold) <= 60 else gold[:60] + "...")
