"""A process that checks answers with math-verify: `python -m stepkto_fast.answer_worker SECONDS BYTES`.

Requests and replies are JSON, one a line. The first reply is true once math-verify is loaded, or why it is not. Then a
request is `[gold, answer]`, both LaTeX, and its reply true, false, or null where the limits left it open. Model output
is only ever parsed, never evaluated as code.

math-verify answers False when it runs out of time, and keeps time only in a main thread. Here it keeps none: the
kernel ends this process when one request takes SECONDS, whatever it does then, and even if nobody is left to watch it.
A process that was stopped half-way is of no further use anyway: an interrupted sympy leaves half-made assumptions in
its caches.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

STATUS = Path("/proc/self/status")
# Enough for expressions as deep as the callers let through; the default of 1,000 would look like "does not parse".
RECURSION_LIMIT = 20_000
CLEARLY = 1e-5  # relative; math-verify rounds decimals to six places


def peak_bytes() -> int:
    """The most resident memory this process had; 0 where the system does not say."""
    if not STATUS.exists():
        return 0
    line = next((x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:")), "VmHWM: 0 kB")
    return 1024 * int(line.split()[1])


def parse_in_two_stages() -> None:
    """Makes latex2sympy predict in the mode SLL first, and only on errors in its own, LL: several times as fast.

    ANTLR promises of SLL that its parse tree is that of LL wherever it finds one (the documentation of
    `PredictionMode`). latex2sympy has no option for it.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy as Converter

    create_parser, parse = Converter.create_parser, Converter.parse

    def create_parser_of_mode(self, text: str):
        parser = create_parser(self, text)
        parser._interp.predictionMode = self.mode
        return parser

    def parse_twice(self, text: str):
        self.mode = PredictionMode.SLL
        try:
            return parse(self, text)
        except Exception:
            self.mode = PredictionMode.LL
            return parse(self, text)

    Converter.create_parser, Converter.parse = create_parser_of_mode, parse_twice


def parts_of(x) -> list:
    """An expression itself, both ends of an interval, those of all intervals of a union; nothing of anything else."""
    from sympy import Expr, Interval, Union

    if isinstance(x, Expr):
        return [] if x.is_Matrix else [x]
    intervals = x.args if isinstance(x, Union) else (x,)
    return [end for i in intervals for end in i.args[:2]] if all(isinstance(i, Interval) for i in intervals) else []


def differ_at_a_point(gold: list, answer: list) -> bool:
    """Whether two expressions in the same symbols have clearly different values somewhere, or two sets of intervals
    clearly different ends.

    Then no algebra makes them equal, and sympy need not try for long to simplify their difference.
    """
    from sympy import Expr, Float, UnevaluatedExpr

    if not len(gold) == len(answer) == 1:
        return False
    a, b = gold[0], answer[0]
    parts, others = parts_of(a), parts_of(b)
    if not parts or len(parts) != len(others) or isinstance(a, Expr) != isinstance(b, Expr):
        return False
    if a.free_symbols != b.free_symbols or a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):  # those are percentages
        return False
    point = {symbol: Float(1.37) + n / 7 for n, symbol in enumerate(sorted(a.free_symbols, key=str))}
    try:
        values = [sorted((complex(x.evalf(subs=point)) for x in xs), key=lambda z: z.real) for xs in (parts, others)]
        return any(abs(x - y) > CLEARLY * (1 + abs(x) + abs(y)) for x, y in zip(*values, strict=True))
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # no number, or too large a one
        return False


def load() -> Callable[[str, str], bool]:
    """math-verify's comparison of a gold answer and another one."""
    from math_verify import LatexExtractionConfig, parse, verify

    parse_in_two_stages()
    # Without an anchor, or with a second config for plain text, a box that does not parse would yield whatever
    # number stands somewhere in it.
    config = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

    @lru_cache(maxsize=4096)
    def parsed(text: str) -> list:
        boxed = f"\\boxed{{{text}}}"
        return parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)

    def equal(gold: str, answer: str) -> bool:
        try:
            left, right = parsed(gold), parsed(answer)
            return not differ_at_a_point(left, right) and verify(left, right, timeout_seconds=0, raise_on_error=True)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # what does not parse, or is undefined: equal to nothing, as math-verify has it
            return False

    return equal


def reply(equal: Callable[[str, str], bool], gold: str, answer: str, memory: int) -> bool | None:
    """True, False, or None where memory ran out, seen or not: math-verify catches MemoryError and answers False."""
    try:
        found = equal(gold, answer)
    except (MemoryError, RecursionError):
        return None
    return True if found else None if peak_bytes() > memory // 2 else False


def main(seconds: float, memory: int) -> None:
    # Nothing but replies may reach the parent: antlr prints warnings.
    out = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(RECURSION_LIMIT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        equal = load()
    except ImportError as error:
        print(json.dumps(str(error)), file=out)
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("true", file=out)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        found = reply(equal, gold, answer, memory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(found), file=out)
        if found is None:
            return  # a process without memory to spare is not to be trusted with the next one


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
