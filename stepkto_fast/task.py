"""A task behind one protocol: where problems come from, how they are asked, and who judges answers and steps."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from .answers import AnswerChecker, Verdict
from .errors import RunError
from .policy import build_byte_tokenizer, build_tokenizer
from .recipe import Recipe, needs_seed
from .rollout import UNLABELLED
from .tasks import arithmetic, math

GOLDS = 1000  # gold answers that are parsed together
MIN_POOL = 10  # problems that a run must find in train_dataset


@dataclass(frozen=True)
class Problems:
    """The problems of a run: training problems for each iteration, none of them among the held-out ones.

    seed: those that the PRM head is fitted on (empty where it is not fitted on the run's own samples).
    """

    test: list[Any]
    seed: list[Any]
    train: list[list[Any]]
    complaints: list[str]

    def every(self) -> list[Any]:
        return [*self.test, *self.seed, *(p for train in self.train for p in train)]


@dataclass(frozen=True)
class Demonstrations:
    """What M_0 is made from where the recipe names no model: (problem, solution) pairs and a tokenizer for them."""

    pairs: list[tuple[Any, str]]
    tokenizer: PreTrainedTokenizerBase


class Asking(Protocol):
    """What decides how a question is asked: the recipe, or settings of other commands with these keys."""

    @property
    def task(self) -> str: ...
    @property
    def instruction(self) -> str | None: ...
    @property
    def system_prompt(self) -> str | None: ...


class Task(Protocol):
    """What the loop asks of a task. A problem is whatever `problems` gives; the loop only hands it back."""

    name: str
    exact_steps: bool  # whether check_steps judges; if not, it leaves all steps unlabelled

    def held_out(self) -> tuple[list[Any], list[str]]:
        """The problems of every evaluation, and what was wrong with rows that are left out."""

    def problems(self) -> Problems: ...

    def prompt(self, problem: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
        """The prompt as text and as token ids."""

    def place(self, problem: Any) -> str:
        """Where a problem stands, or what it is, for messages."""

    def answer(self, problem: Any) -> str:
        """The gold answer."""

    def judge(self, problems: Sequence[Any], completions: Sequence[str], finished: Sequence[bool]) -> list[Verdict]: ...

    def check_steps(self, problem: Any, steps: list[str]) -> list[int]:
        """1, 0, or -1 (not judged) for each step."""

    def majority(self, answers: Sequence[Sequence[str | None]]) -> list[int | None]:
        """For each problem the index of the first answer of the largest group of equal ones, None without any."""

    def demonstrations(self, problems: Problems) -> Demonstrations: ...

    def close(self) -> None: ...


def open_task(recipe: Recipe) -> Task:
    """The recipe's task; close it when done."""
    return MathTask(recipe) if recipe.task == "math" else ArithmeticTask(recipe)


def asked_rows(
    rows: Sequence[dict[str, Any]], recipe: Asking, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Labelled rows whose prompt is a bare question (one message of the user) asked as the math task asks.

    Other prompts, and those of other tasks, stay as they are.
    """
    if recipe.task != "math":
        return list(rows)
    instruction = math.INSTRUCTION if recipe.instruction is None else recipe.instruction
    asked = []
    for row in rows:
        prompt = row["prompt"]
        if not isinstance(prompt, str) and [message["role"] for message in prompt] == ["user"]:
            question = prompt[0]["content"]
            prompt = math.asked(question, tokenizer, system_prompt=recipe.system_prompt, instruction=instruction)
        asked.append({**row, "prompt": prompt})
    return asked


def _iterations(pool: list[Any], recipe: Recipe, seeds: int, purpose: str) -> tuple[list[Any], list[list[Any]]]:
    """Seed problems and the training problems of each iteration, drawn from a pool that is given.

    The head is not fitted on the problems whose steps it will label.
    """
    if len(pool) < MIN_POOL:
        raise RunError(
            f"{recipe.train_dataset!r} has {len(pool)} different problems that are not held out: give at "
            f"least {MIN_POOL}"
        )
    rng = random.Random(f"{purpose} {recipe.seed}")
    rng.shuffle(pool)
    cut = min(seeds, len(pool) // 2)
    rest = pool[cut:]
    return pool[:cut], [rng.sample(rest, min(recipe.num_prompts, len(rest))) for _ in range(recipe.iterations)]


class ArithmeticTask:
    """Chains of operations on digits, generated or read from files; an exact checker judges everything."""

    name = "arithmetic"
    exact_steps = True

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._operations = range(recipe.min_operations, recipe.max_operations + 1)

    def held_out(self) -> tuple[list[arithmetic.Problem], list[str]]:
        recipe = self._recipe
        if recipe.test_dataset:
            found, complaints = arithmetic.read_problems(recipe.test_dataset)
            return list(dict.fromkeys(found))[: recipe.num_test_problems], complaints
        # The held-out problems do not depend on the seed, so that runs can be compared on them.
        return arithmetic.problems(recipe.num_test_problems, "test", recipe.level, self._operations), []

    def problems(self) -> Problems:
        recipe, level, operations = self._recipe, self._recipe.level, self._operations
        test, complaints = self.held_out()
        held_out = frozenset(p.prompt for p in test)
        if recipe.train_dataset:
            pool, more = arithmetic.read_problems(recipe.train_dataset)
            complaints += more
            pool = [p for p in dict.fromkeys(pool) if p.prompt not in held_out]
            seed, train = _iterations(pool, recipe, recipe.prm_seed_problems, "train_file")
        else:
            count = recipe.prm_seed_problems + recipe.iterations * recipe.num_prompts
            pool = arithmetic.problems(count, f"train {recipe.seed}", level, operations, exclude=held_out)
            seed, rest = pool[: recipe.prm_seed_problems], pool[recipe.prm_seed_problems :]
            train = [rest[t * recipe.num_prompts : (t + 1) * recipe.num_prompts] for t in range(recipe.iterations)]
        return Problems(test, seed, train, complaints)

    def prompt(self, problem: arithmetic.Problem, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
        return problem.prompt, list(tokenizer(problem.prompt, add_special_tokens=False)["input_ids"])

    def place(self, problem: arithmetic.Problem) -> str:
        return repr(problem.prompt.strip()[:60])

    def answer(self, problem: arithmetic.Problem) -> str:
        return str(problem.answer)

    def judge(
        self, problems: Sequence[arithmetic.Problem], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[Verdict]:
        found = map(arithmetic.boxed_answer, completions)
        return [Verdict(a == str(p.answer), True, a) for p, a in zip(problems, found, strict=True)]

    def check_steps(self, problem: arithmetic.Problem, steps: list[str]) -> list[int]:
        return [int(right) for right in arithmetic.check_steps(problem, steps)]

    def majority(self, answers: Sequence[Sequence[str | None]]) -> list[int | None]:
        found: list[int | None] = []
        for given in answers:
            votes = Counter(x for x in given if x is not None).most_common(1)
            found.append(list(given).index(votes[0][0]) if votes else None)
        return found

    def demonstrations(self, problems: Problems) -> Demonstrations:
        """Worked solutions by a teacher with misconceptions, of problems that are not held out."""
        recipe = self._recipe
        held_out = frozenset(p.prompt for p in problems.test)
        stream = arithmetic.random_problems(
            f"demonstrations {recipe.seed}", recipe.level, self._operations, exclude=held_out
        )
        asked = list(islice(stream, min(recipe.warm_start_steps * recipe.warm_start_batch_size, 20_000)))
        teacher = arithmetic.Misconceptions.draw(
            str(recipe.seed), recipe.misconceptions, recipe.misconception_rate, recipe.slip_rate
        )
        every = [*asked, *problems.every()]
        tokenizer = build_tokenizer(p.prompt + arithmetic.demonstration(random.Random(0), p) for p in every)
        rng = random.Random(f"demonstrations {recipe.seed}")
        return Demonstrations([(p, arithmetic.demonstration(rng, p, teacher)) for p in asked], tokenizer)

    def close(self) -> None:
        pass


class MathTask:
    """Mathematics in words: known datasets, hub names or files; math-verify compares answers, nobody checks steps."""

    name = "math"
    exact_steps = False

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._answers = AnswerChecker(workers=recipe.answer_workers, timeout=recipe.answer_timeout)

    def held_out(self) -> tuple[list[math.Problem], list[str]]:
        recipe = self._recipe
        found, complaints = self._read(recipe.test_dataset, recipe.test_split, "test")
        test, more = self._with_usable_golds(found, recipe.num_test_problems)
        if not test:
            raise RunError(f"{recipe.test_dataset or 'sample'!r} has no usable problem; first complaint: {more[0]}")
        return test, complaints + more

    def problems(self) -> Problems:
        recipe = self._recipe
        test, complaints = self.held_out()
        found, of_rows = self._read(recipe.train_dataset, recipe.train_split, "train")
        held_out = {" ".join(p.question.split()) for p in test}
        found = [p for p in found if " ".join(p.question.split()) not in held_out]
        random.Random(f"train_dataset order {recipe.seed}").shuffle(found)
        seeds = recipe.prm_seed_problems if needs_seed(recipe) else 0
        wanted = max(MIN_POOL, seeds + recipe.iterations * recipe.num_prompts)
        pool, of_golds = self._with_usable_golds(found, wanted)
        seed, train = _iterations(pool, recipe, seeds, "train_dataset")
        return Problems(test, seed, train, complaints + of_rows + of_golds)

    def _read(self, source: str | None, split: str | None, purpose: str) -> tuple[list[math.Problem], list[str]]:
        recipe = self._recipe
        return math.problems(
            source or "sample", split=split, purpose=purpose, question_column=recipe.question_column,
            answer_column=recipe.answer_column,
        )  # fmt: skip

    def _with_usable_golds(self, found: Sequence[math.Problem], count: int) -> tuple[list[math.Problem], list[str]]:
        """The first `count` problems whose gold answer parses, and what was wrong with those passed over.

        Only as many golds are parsed as it takes: data sets have hundreds of thousands of rows.
        """
        usable: list[math.Problem] = []
        complaints: list[str] = []
        for start in range(0, len(found), GOLDS):
            part = found[start : start + GOLDS]
            for p, complaint in zip(part, self._answers.complaints([p.answer for p in part]), strict=True):
                if complaint is None:
                    usable.append(p)
                else:
                    complaints.append(f"{p.source}: {complaint}")
            if len(usable) >= count:
                break
        return usable[:count], complaints

    def prompt(self, problem: math.Problem, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
        recipe = self._recipe
        instruction = math.INSTRUCTION if recipe.instruction is None else recipe.instruction
        prompt = math.prompt(problem.question, tokenizer, system_prompt=recipe.system_prompt, instruction=instruction)
        # A chat template writes the special tokens itself.
        ids = list(tokenizer(prompt.text, add_special_tokens=not prompt.templated)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.templated:
            ids.pop()  # some tokenizers end every text; the completion is still to come
        return prompt.text, ids

    def place(self, problem: math.Problem) -> str:
        return f"{problem.source} ({problem.question.strip()[:60]!r})"

    def answer(self, problem: math.Problem) -> str:
        return problem.answer

    def judge(
        self, problems: Sequence[math.Problem], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[Verdict]:
        return self._answers.judge([p.answer for p in problems], completions, finished)

    def check_steps(self, problem: math.Problem, steps: list[str]) -> list[int]:
        return [UNLABELLED] * len(steps)

    def majority(self, answers: Sequence[Sequence[str | None]]) -> list[int | None]:
        return self._answers.majority(answers)

    def demonstrations(self, problems: Problems) -> Demonstrations:
        """The training problems' own solutions."""
        asked: Iterable[math.Problem] = dict.fromkeys([*problems.seed, *(p for t in problems.train for p in t)])
        pairs = [(p, p.solution) for p in asked if p.solution]
        if not pairs:
            raise RunError(
                f"model is not set and {self._recipe.train_dataset!r} has no solutions to make M_0 from: set model, or "
                "give problems with a column 'solution'"
            )
        instruction = math.INSTRUCTION if self._recipe.instruction is None else self._recipe.instruction
        texts = [f"{p.question}\n{instruction}\n{solution}" for p, solution in pairs]
        return Demonstrations(pairs, build_byte_tokenizer(texts))

    def close(self) -> None:
        self._answers.close()
