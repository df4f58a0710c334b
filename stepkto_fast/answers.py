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
from itertools import combinations

from .answer_pool import INSTALL, WorkerPool
from .errors import RunError

# What exceeds these is not parsed at all: it would take seconds, and no answer to a problem looks like that.
MAX_CHARACTERS = 2000
MAX_DEPTH = 16
GIANT_POWER = re.compile(
    r"\^\s*\{?\s*-?\s*[0-9][0-9,.]{6,}"  # an exponent of seven digits
    r"|\^\s*\{[^{}^]*\^\s*\{[^{}^]*\^|\^\s*[0-9]+\s*\^\s*[0-9]+\s*\^"  # a tower of four
)

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
STATEMENT = re.compile(r"\banswer\b\**\s*(?:is\b|:|=)[\s:*]*", re.IGNORECASE)
STATEMENT_END = re.compile(r"\.(?:[\s*]|$)|\n")

DELIMITER = re.compile(r"(\\\\)|\\?\$|\\[()\[\]]")  # a line break of a matrix is none, though a bracket may follow
SEPARATOR = re.compile(r"(?<=[0-9])(?:\\[,!:; ]|\{,\}(?:\\!)?|,\\!)(?=[0-9]{3}(?![0-9]))")
MIXED = re.compile(r"([+-]?[0-9]+)\s+([0-9]+)/([0-9]+)")
DECIMAL = re.compile(r"[+-]?(?:(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)")
FRACTION = re.compile(r"([+-]?)(?:\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}|\\[dtc]?frac([0-9])([0-9])|([0-9]+)/([0-9]+))")
MAX_DIGITS = 100
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


# ---- which answer a completion gives ----


def extract_answer(completion: str, finished: bool = True) -> str | None:
    r"""The answer that `completion` states, None where it states none. Takes time linear in its length.

    The last `\boxed{...}` or `\fbox{...}` that is closed and not empty. Without one, and only if the completion is
    `finished`: what follows `####` in the last line, or the last "answer is", "answer:" or "answer =", up to the end
    of that sentence.
    """
    box = _last_box(completion)
    return _statement(completion) if box is None and finished else box


def _last_box(text: str) -> str | None:
    opened: list[tuple[int, bool]] = []
    start, found = -1, None
    for match in BRACE.finditer(text):
        token = match.group()
        if token[-1] == "{" and token != r"\{":
            opened.append((match.end(), len(token) > 1))
        elif token == "}" and opened:
            begin, boxed = opened.pop()
            if boxed and begin > start and (content := text[begin : match.start()].strip()):
                start, found = begin, content
    return found


def _statement(text: str) -> str | None:
    last_line = text.rstrip().rpartition("\n")[2].strip()
    if re.match("####[^#]", last_line):
        return last_line[4:].strip() or None
    starts = [match.end() for match in STATEMENT.finditer(text)]
    if not starts:
        return None
    end = STATEMENT_END.search(text, starts[-1])
    return text[starts[-1] : end.start() if end else None].strip(" \t*") or None


# ---- what can be decided without parsing ----


def normalised(answer: str) -> str:
    """`answer` without delimiters, separators of thousands that are not commas, and a full stop."""
    text = SEPARATOR.sub("", DELIMITER.sub(r"\1", answer)).strip()
    return MIXED.sub(r"\1\\frac{\2}{\3}", text) if MIXED.fullmatch(text) else text.rstrip(".").rstrip()


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, decimal or simple fraction, and whether it is no decimal; None for all other text."""
    if len(text) > MAX_DIGITS:
        return None
    if DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", "")), "." not in text
    if match := FRACTION.fullmatch(text):
        above, below = (int(x) for x in match.groups()[1:] if x is not None)
        return (Fraction(above, below) * (-1 if match[1] == "-" else 1), True) if below else None
    return None


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
            elif not (text := normalised(gold)):
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
        pairs = [
            (normalised(gold), normalised(answer)) if answer is not None else None
            for gold, answer in zip(golds, answers, strict=True)
        ]
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
        classes = [{text: text for text in given if text is not None} for given in texts]  # to the first of its class
        for swapped in (False, True):
            open_pairs = [
                [(b, a) if swapped else (a, b) for a, b in combinations(first_of, 2) if first_of[a] != first_of[b]]
                for first_of in classes
            ]
            same = self._same(pair for pairs in open_pairs for pair in pairs)
            for first_of, pairs in zip(classes, open_pairs, strict=True):
                order = {text: n for n, text in enumerate(first_of)}
                for a, b in pairs:
                    kept, joined = sorted((first_of[a], first_of[b]), key=order.__getitem__)
                    if same[a, b] and kept != joined:
                        first_of.update({text: kept for text, first in first_of.items() if first == joined})
        winners = []
        for given, first_of in zip(texts, classes, strict=True):
            sizes = Counter(first_of[text] for text in given if text is not None)
            winners.append(given.index(max(sizes, key=sizes.__getitem__)) if sizes else None)
        return winners

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


def _shown(gold: str) -> str:
    return repr(gold if len(gold) <= 60 else gold[:60] + "...")
