"""One Step-KTO iteration of a small Llama from reference log-probs to AdamW, by our loop and by TRL's KTOTrainer; where
the factor between them comes from; and the rollouts.

Each provider has a process of its own (end_to_end.py). Its first step is compared with the reference backend's in fp32;
whoever misses is not timed. The second gives the peak memory. Then the processes take turns. In each turn one step goes
before the one that counts: memory that others have used in the meantime has to be had from the system again, which a
training run would not pay for. Steps of many seconds are taken one after the other right away, for the same reason;
for them the first step gives the memory, too. "quick" is a small shape for a glance at every path, "goal" the one to
report.

The rows of `test_factors` have one feature less each, from our loop down to TRL's trainer.
"""

import os
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from end_to_end import (
    COMPARED,
    PROVIDERS,
    ROLLOUT,
    SIZES,
    STEP_KTO,
    TABLE,
    TRUTH,
    Child,
    Engine,
    Nursery,
    Ours,
    Trl,
    batch,
    count_tokens,
)
from measure import Measured
from replay import replay

# of the loss and of the gradient's norm, relative; TRL rounds its logits to bf16
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (3e-2, 1e-1)}
SLOW = 6.0  # seconds: beyond, no turns and no step for memory alone
ROUNDS = ((1.0, 5), (5.0, 3))  # as many where a step takes less seconds than that, else two
QUICK = (STEP_KTO, "ours, outcome only", "TRL KTOTrainer")
SELDOM = (
    "ours, Step-KTO, exact",
    "TRL KTOTrainer, precomputed reference",
    "TRL's head function",
    "transformers generate",
)  # nobody's best: with --large alone
FP32 = (STEP_KTO, "ours, reference backend", "TRL KTOTrainer")
NO_ROLLOUTS = "TRL's KTOTrainer trains on the completions of its dataset: it samples none"
NOTES = {
    "ours, Step-KTO": "outcome and step loss; the reference's log-probs in one pass",
    "ours, outcome only": "the objective of TRL's apo_zero_unpaired",
    "ours, Step-KTO, exact": "filter_eps 0",
    "TRL KTOTrainer": "outcome loss only; KL from mismatched pairs of each micro-batch",
    "TRL KTOTrainer, precomputed reference": "precomputation included: each rollout is used once",
    "TRL KTOTrainer, apo_zero_unpaired": "outcome loss only, no KL",
    "with TRL's KL: 4 forwards": "KL from the pairs of the whole batch",
    "padded": "in TRL's micro-batches, each with its own KL",
    "TRL's head function": "ChunkedLogProbFunction, with the entropies and mean logits that its trainer logs",
    "transformers generate": "the loop's other sampler; bf16 with weights in bf16, as vLLM has them",
}


def rounds(seconds: float) -> int:
    return next((count for most, count in ROUNDS if seconds < most), 2)


def errors(found: dict, wanted: dict, dtype: str) -> dict[str, float]:
    """Relative, of loss and gradient's norm; AssertionError beyond the tolerance, and for a NaN."""
    names = {"loss_error": "loss", "gradient_norm_error": "gradient_norm"}
    missed = {name: abs(found[key] - wanted[key]) / abs(wanted[key]) for name, key in names.items()}
    for (name, error), most in zip(missed.items(), TOLERANCE[dtype], strict=True):
        assert error <= most, f"{name.replace('_', ' ')} {error:.2g} beyond {most:g}"
    return missed


def measure(nursery: Nursery, providers: Iterable[str], shape: str, dtype: str) -> dict[str, Measured]:
    """By provider. They take turns, each in a process of its own."""
    found: dict[str, Measured] = {}
    children: dict[str, Child] = {}
    try:
        for name in providers:
            if not isinstance(PROVIDERS[name], Engine) and shape not in WANTED:
                truth = Child(nursery, TRUTH, shape, "fp32")
                WANTED[shape] = truth.ask("check")
                truth.close()
            children[name] = Child(nursery, name, shape, dtype)
            found[name] = started(name, children[name], shape, dtype, WANTED.get(shape, {}))
        counts = {name: each.facts.pop("rounds") for name, each in found.items() if "rounds" in each.facts}
        for turn in range(max(counts.values(), default=0)):
            for name in [name for name, count in counts.items() if turn < count and not found[name].failed]:
                found[name] = timed(children[name], found[name], 1)
    finally:
        for child in children.values():
            child.close()
    for each in found.values():
        if each.seconds:
            each.facts["tokens_per_s"] = each.facts["tokens"] / statistics.median(each.seconds)
    return found


WANTED: dict[str, dict] = {}  # by shape: loss and gradient's norm of each objective


def started(name: str, child: Child, shape: str, dtype: str, wanted: dict) -> Measured:
    """What the provider's first steps tell: is it right, and how much memory does it take."""
    way = PROVIDERS[name]
    facts: dict[str, Any] = {"shape": shape, "dtype": dtype}
    if isinstance(way, Ours):
        eps = way.recipe(dtype).filter_eps
        facts["filter_eps"] = "auto" if eps is None else eps
    answer = child.ask("check")
    if "seconds" in answer and not isinstance(way, Engine):
        if "failed" in wanted:
            return Measured([], {}, failed=f"no truth to compare with: {wanted['failed']}")
        try:
            facts |= errors(answer, wanted[way.truth.name], dtype)
        except AssertionError as error:
            return Measured([], {}, failed=str(error))
    facts |= {key: answer[key] for key in KEPT if key in answer}
    slow = answer.get("seconds", 0.0) >= SLOW and not isinstance(way, Engine)
    if "seconds" in answer and not slow:
        answer = child.ask("memory")
    if "seconds" not in answer:
        return Measured([], {}, answer.get("skipped", ""), answer.get("failed", ""))
    facts |= {"peak_bytes": answer["peak_bytes"]}
    facts.setdefault("tokens", count_tokens(batch(SIZES[shape])))
    if slow:
        return timed(child, Measured([], facts), rounds(answer["seconds"]), warm=True)
    return Measured([], facts | {"rounds": rounds(answer["seconds"])})


def timed(child: Child, known: Measured, count: int, warm: bool = False) -> Measured:
    """The same with `count` more rounds, taken one after the other, behind a step that does not count unless `warm`."""
    answers = [child.ask("step") for _ in range(count if warm else count + 1)]
    if any("seconds" not in answer for answer in answers):
        return Measured([], {}, failed=next(answer["failed"] for answer in answers if "failed" in answer))
    return known._replace(seconds=known.seconds + [answer["seconds"] for answer in answers[-count:]])


KEPT = (
    "forwards", "trunk_positions", "micro_batches", "rho", "path", "precompute_s", "tokens", "finished"
)  # fmt: skip
TESTS = ("test_end_to_end", "test_factors", "test_rollout")
FOUND: dict[tuple, dict[str, Measured]] = {}


def measured_as(name: str) -> str:
    """The first of the providers that are the same: a row of the table may be one of the compared."""
    return next(each for each, way in PROVIDERS.items() if way == PROVIDERS[name])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("the providers' processes need fork")
    opened = Nursery()
    yield opened
    opened.close()


@pytest.fixture
def measured(request, nursery, provider: str, shape: str, dtype: str) -> Measured:
    """This provider's result. The first test of a shape and dtype measures all of them that were selected."""
    sampling = isinstance(PROVIDERS[provider], Engine)
    key = shape, dtype, sampling
    if key not in FOUND:
        chosen = {
            measured_as(item.callspec.params["provider"]): None
            for item in request.session.items
            if item.originalname in TESTS
            and (item.callspec.params["shape"], item.callspec.params["dtype"]) == (shape, dtype)
            and isinstance(PROVIDERS[item.callspec.params["provider"]], Engine) == sampling
        }
        FOUND[key] = measure(nursery, chosen, shape, dtype)
    return FOUND[key][measured_as(provider)]


def row(measured: Measured, suite: str, provider: str, role: str, **facts: Any) -> Measured:
    """With what the report wants to know of it."""
    known = {"suite": suite, "role": role, "provider": provider, "note": NOTES.get(provider, "")}
    return measured._replace(facts=measured.facts | known | facts)


def group(suite: str, shape: str, dtype: str) -> str:
    return f"{suite.replace('_', ' ')} {shape} {dtype}"


def cases(names: Iterable[str], shape: str, dtype: str) -> list:
    found = []
    for name in names:
        marks = [pytest.mark.large] if dtype == "fp32" or name in SELDOM else []
        found.append(pytest.param(name, shape, dtype, id=f"{shape}-{dtype}-{name}", marks=marks))
    return found


def role(name: str) -> str:
    return "peer" if isinstance(PROVIDERS[name], Trl) or not name.startswith("ours") else "ours"


COMPARISON = [*cases(QUICK, "quick", "bf16"), *cases(COMPARED, "goal", "bf16"), *cases(FP32, "goal", "fp32")]
FACTORS = cases(TABLE, "goal", "bf16")
SAMPLING = cases([*ROLLOUT, "TRL KTOTrainer"], "goal", "bf16")


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("provider", "shape", "dtype"), COMPARISON)
def test_end_to_end(report, measured, provider, shape, dtype):
    report(row(measured, "end_to_end", provider, role(provider)), group("end_to_end", shape, dtype))


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("provider", "shape", "dtype"), FACTORS)
def test_factors(report, measured, provider, shape, dtype):
    rows = list(TABLE)
    place = rows.index(provider)
    facts: dict[str, Any] = {"order": place}
    if place and measured.seconds:
        before = FOUND[shape, dtype, False].get(measured_as(rows[place - 1]))
        if before and before.seconds:
            facts["times_slower"] = statistics.median(measured.seconds) / statistics.median(before.seconds)
    ends = {STEP_KTO: "ours", "TRL KTOTrainer": "peer"}
    found = row(measured, "factors", provider, ends.get(provider, "step of the table"), **facts)
    report(found, group("factors", shape, dtype))


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("provider", "shape", "dtype"), SAMPLING)
def test_rollout(request, report, provider, shape, dtype):
    if isinstance(PROVIDERS[provider], Trl):
        pytest.skip(NO_ROLLOUTS)
    found = row(request.getfixturevalue("measured"), "rollout", provider, role(provider))
    report(found, group("rollout", shape, dtype))
