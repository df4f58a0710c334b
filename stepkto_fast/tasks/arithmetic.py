"""Multi-step arithmetic on digits: problems, worked solutions, and an exact checker of answers and of single steps.

A problem is a binary expression over digits; every operation is taken modulo 10, so a step is one of a few hundred
facts, and `min`, `max` and `*` absorb errors: a wrong step can still reach the right answer, which is what
step-level feedback is for. Three ways to write a problem (`level`):

    chain    Compute left to right, modulo 10: 3 + 4 * 2 min 5
    nested   Compute modulo 10: ( 3 + 4 ) * ( 2 min 5 )
    words    A counter shows one digit. It starts at 3. Add 4. Multiply by 2. Keep at most 5.

and one way to write a solution, for all of them:

    Step 1: 3 + 4 = 7
    Step 2: 7 * 2 = 4
    Answer: \\boxed{ 4 }
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import RunError
from ..rows import local_path

MODULUS = 10
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % MODULUS,
    "*": lambda a, b: (a * b) % MODULUS,
    "min": min,
    "max": max,
}
LEVELS = ("chain", "nested", "words")
CHAIN_TEXT = "Compute left to right, modulo 10: "
NESTED_TEXT = "Compute modulo 10: "
WORDS_TEXT = "A counter shows one digit. It starts at "
WORDS = {"+": "Add {}.", "*": "Multiply by {}.", "min": "Keep at most {}.", "max": "Raise to at least {}."}

Expression = int | tuple[str, "Expression", "Expression"]
STEP = re.compile(r"Step (\d+): (\d) (\+|\*|min|max) (\d) = (\d)")
BOXED = re.compile(r"\\boxed\{\s*([^{}]*?)\s*\}")
ANSWER = re.compile(r"Answer: " + BOXED.pattern)


@dataclass(frozen=True)
class Problem:
    """A prompt, the expression it asks for, and the expression's value."""

    prompt: str
    expression: Expression

    @property
    def answer(self) -> int:
        return evaluate(self.expression)


def evaluate(expression: Expression) -> int:
    """The value of an expression, in 0..9."""
    if isinstance(expression, int):
        return expression
    operator, left, right = expression
    return OPERATIONS[operator](evaluate(left), evaluate(right))


# ---- writing problems ----


def problem(expression: Expression, level: str) -> Problem:
    """The problem that asks for `expression`, written in the style of `level`."""
    return Problem(
        prompt={"chain": _chain, "nested": _nested, "words": _words}[level](expression), expression=expression
    )


def _chain(expression: Expression) -> str:
    first, rest = _unchain(expression)
    return CHAIN_TEXT + " ".join([str(first), *(f"{operator} {b}" for operator, b in rest)]) + "\n"


def _nested(expression: Expression) -> str:
    def write(node: Expression) -> str:
        return str(node) if isinstance(node, int) else f"( {write(node[1])} {node[0]} {write(node[2])} )"

    return NESTED_TEXT + write(expression)[2:-2] + "\n"


def _words(expression: Expression) -> str:
    first, rest = _unchain(expression)
    return " ".join([f"{WORDS_TEXT}{first}.", *(WORDS[operator].format(b) for operator, b in rest)]) + "\n"


def _unchain(expression: Expression) -> tuple[int, list[tuple[str, int]]]:
    rest: list[tuple[str, int]] = []
    while not isinstance(expression, int):
        operator, expression, right = expression
        assert isinstance(right, int), "a chain has digits on the right of every operation"
        rest.insert(0, (operator, right))
    return expression, rest


def random_problem(rng: random.Random, level: str, operations: int) -> Problem:
    """A random problem of `level` with `operations` operations."""
    digits = [rng.randrange(MODULUS) for _ in range(operations + 1)]
    operators = [rng.choice(list(OPERATIONS)) for _ in range(operations)]

    def tree(first: int, last: int) -> Expression:
        if first == last:
            return digits[first]
        split = rng.randrange(first, last) if level == "nested" else last - 1
        return operators[split], tree(first, split), tree(split + 1, last)

    return problem(tree(0, operations), level)


def random_problems(
    seed: str, level: str, operations: range, exclude: frozenset[str] = frozenset()
) -> Iterator[Problem]:
    """Random problems without end, the same ones for the same `seed`, none whose prompt is in `exclude`.

    Raises RunError when a thousand in a row are excluded.
    """
    rng = random.Random(f"problems {seed}")
    excluded = 0
    while excluded < 1000:
        candidate = random_problem(rng, level, rng.choice(operations))
        excluded = excluded + 1 if candidate.prompt in exclude else 0
        if not excluded:
            yield candidate
    raise RunError(
        f"every problem of level {level!r} with {operations.start} to {operations.stop - 1} operations is held out: "
        "raise max_operations or ask for fewer held-out problems"
    )


def problems(
    count: int, seed: str, level: str, operations: range, exclude: frozenset[str] = frozenset()
) -> list[Problem]:
    """`count` different random problems whose prompts are not in `exclude`.

    Raises RunError when the level has fewer different problems than asked for.
    """
    found: dict[str, Problem] = {}
    for candidate in islice(random_problems(seed, level, operations, exclude), 100 * count + 1000):
        if len(found) == count:
            break
        found.setdefault(candidate.prompt, candidate)
    if len(found) < count:
        raise RunError(
            f"only {len(found)} different problems of level {level!r} with {operations.start} to {operations.stop - 1} "
            f"operations are left, {count} were asked for: raise max_operations or ask for fewer problems"
        )
    return list(found.values())


# ---- reading problems ----


def parse_prompt(prompt: str) -> Problem:
    """The problem behind a prompt of any level, its prompt as this module writes it; ValueError where it is none."""
    text = prompt.strip()
    if text.startswith(CHAIN_TEXT):
        return problem(_parse_chain(text[len(CHAIN_TEXT) :].split()), "chain")
    if text.startswith(NESTED_TEXT):
        return problem(_parse_nested(["(", *text[len(NESTED_TEXT) :].split(), ")"]), "nested")
    if text.startswith(WORDS_TEXT):
        return problem(_parse_words(text[len(WORDS_TEXT) :]), "words")
    raise ValueError(f"a prompt starts with {CHAIN_TEXT!r}, {NESTED_TEXT!r} or {WORDS_TEXT!r}, got {prompt[:60]!r}")


def _digit(token: str) -> int:
    if len(token) != 1 or token not in "0123456789":
        raise ValueError(f"expected one digit, got {token!r}")
    return int(token)


def _operator(token: str) -> str:
    if token not in OPERATIONS:
        raise ValueError(f"expected one of {', '.join(OPERATIONS)}, got {token!r}")
    return token


def _parse_chain(tokens: list[str]) -> Expression:
    if len(tokens) % 2 == 0:
        raise ValueError("a chain is a digit followed by operator-digit pairs")
    expression: Expression = _digit(tokens[0])
    for operator, right in zip(tokens[1::2], tokens[2::2], strict=True):
        expression = (_operator(operator), expression, _digit(right))
    return expression


def _parse_nested(tokens: list[str]) -> Expression:
    stack: list[list] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            group = stack.pop()
            if len(group) != 3 or not stack:
                raise ValueError("parentheses hold exactly: left operator right")
            stack[-1].append((_operator(group[1]), group[0], group[2]))
        else:
            stack[-1].append(token if len(stack[-1]) == 1 else _digit(token))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("unbalanced parentheses")
    return stack[0][0]


def _parse_words(text: str) -> Expression:
    first, *sentences = [sentence.strip() for sentence in text.rstrip(".").split(".")]
    expression: Expression = _digit(first)
    for sentence in sentences:
        for operator, template in WORDS.items():
            before = template.split("{}")[0]
            if sentence.startswith(before):
                expression = (operator, expression, _digit(sentence[len(before) :]))
                break
        else:
            raise ValueError(f"unknown sentence {sentence!r}")
    return expression


def read_problems(path: str) -> tuple[list[Problem], list[str]]:
    """Problems of a JSONL file, one `{"prompt": ...}` a line, and what was wrong with the lines left out.

    An optional `"answer"` must agree with the prompt's own value. Raises RunError when the file is missing or holds
    no usable row.
    """
    if not local_path(path).is_file():
        raise RunError(f"problem file {path!r} does not exist: give a JSONL file with a 'prompt' in every line")
    try:
        lines = local_path(path).read_bytes().splitlines()
    except OSError as error:
        raise RunError(f"problem file {path!r} cannot be read: {error.strerror}") from error
    found: list[Problem] = []
    complaints: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError("expected an object with a text field 'prompt'")
            candidate = parse_prompt(row["prompt"])
            answer = str(candidate.answer)  # also proves that the expression is not too deep to work with
            if "answer" in row and str(row["answer"]).strip() != answer:
                raise ValueError(f"its answer {row['answer']!r} is not the prompt's value {answer}")
            found.append(candidate)
        except (ValueError, UnicodeDecodeError, RecursionError) as error:
            complaints.append(f"{path}:{number}: {error}")
    if not found:
        raise RunError(f"{path!r} holds no usable problem; first complaint: {(complaints or ['it is empty'])[0]}")
    return found, complaints


# ---- solutions ----


@dataclass(frozen=True)
class Misconceptions:
    """A teacher with fixed wrong beliefs: `facts` maps (operator, a, b) to the wrong result it teaches.

    A believed fact is written with probability `rate`, any other step slips to a random digit with probability
    `slip`. Unlike evenly spread noise, fixed beliefs survive greedy decoding and leave something to learn.
    """

    facts: dict[tuple[str, int, int], int]
    rate: float
    slip: float

    @staticmethod
    def draw(seed: str, share: float, rate: float, slip: float) -> "Misconceptions":
        rng = random.Random(f"misconceptions {seed}")
        every = [(operator, a, b) for operator in OPERATIONS for a in range(MODULUS) for b in range(MODULUS)]
        wrong = rng.sample(every, round(share * len(every)))
        return Misconceptions({fact: _other_digit(rng, OPERATIONS[fact[0]](*fact[1:])) for fact in wrong}, rate, slip)

    def write(self, rng: random.Random, operator: str, a: int, b: int) -> int:
        truth = OPERATIONS[operator](a, b)
        if (operator, a, b) in self.facts:
            return self.facts[operator, a, b] if rng.random() < self.rate else truth
        return _other_digit(rng, truth) if rng.random() < self.slip else truth


def _other_digit(rng: random.Random, digit: int) -> int:
    return (digit + rng.randrange(1, MODULUS)) % MODULUS


def demonstration(rng: random.Random, asked: Problem, teacher: Misconceptions | None = None) -> str:
    """A worked solution of `asked`; with a `teacher`, as that teacher would write it."""
    lines: list[str] = []
    state = asked.expression
    while not isinstance(state, int):
        path, operator, a, b = next(_reducible(state))
        value = teacher.write(rng, operator, a, b) if teacher else OPERATIONS[operator](a, b)
        lines.append(f"Step {len(lines) + 1}: {a} {operator} {b} = {value}\n")
        state = _replace(state, path, value)
    return "".join([*lines, f"Answer: \\boxed{{ {state} }}"])


def _reducible(expression: Expression, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str, int, int]]:
    """The operations that could be done now (both operands known), leftmost first: (path, operator, a, b)."""
    if isinstance(expression, int):
        return
    operator, left, right = expression
    if isinstance(left, int) and isinstance(right, int):
        yield path, operator, left, right
    yield from _reducible(left, (*path, 1))
    yield from _reducible(right, (*path, 2))


def _replace(expression: Expression, path: tuple[int, ...], value: int) -> Expression:
    if not path:
        return value
    assert not isinstance(expression, int)
    parts = list(expression)
    parts[path[0]] = _replace(parts[path[0]], path[1:], value)  # type: ignore[arg-type]
    return tuple(parts)  # type: ignore[return-value]


# ---- the exact checker ----


def boxed_answer(completion: str) -> str | None:
    """The content of the last `\\boxed{...}`, or None."""
    found = BOXED.findall(completion)
    return found[-1] if found else None


def answer_is_right(asked: Problem, completion: str) -> bool:
    """Whether the last boxed answer is the problem's value. No box, no credit."""
    return boxed_answer(completion) == str(asked.answer)


def check_steps(asked: Problem, steps: list[str]) -> list[bool]:
    """Judges each step by itself: its own arithmetic, its number, and that it uses what came before.

    A step must do an operation that is possible in the expression as the earlier steps left it (operands in either
    order: all four operations commute), and get it right. After a wrong step the written result counts as what came
    before, so one slip does not condemn the steps that build on it correctly. The answer line is a step too: right
    when every operation is done and it repeats the last result.
    """
    state, verdicts, answered = asked.expression, [], False
    for number, step in enumerate(steps, start=1):
        text = step.strip()
        if answered:
            verdicts.append(False)
        elif match := STEP.fullmatch(text):
            written, a, operator, b, value = match.groups()
            possible = list(_reducible(state))
            wanted = sorted((int(a), int(b)))
            fitting = [p for p in possible if p[1] == operator and sorted(p[2:]) == wanted]
            right = OPERATIONS[operator](int(a), int(b)) == int(value)
            verdicts.append(bool(fitting) and right and int(written) == number)
            if possible:
                state = _replace(state, (fitting or possible)[0][0], int(value))
        elif match := ANSWER.fullmatch(text):
            verdicts.append(match.group(1) == str(state))
            answered = True
        else:
            verdicts.append(False)
    return verdicts
