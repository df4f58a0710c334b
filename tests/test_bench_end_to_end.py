"""bench/end_to_end.py: that every way to take a step takes the same one, and that its processes tell how they end."""

import os
import select
import signal
import sys
from pathlib import Path

import pytest
import torch
from stepkto_kernels import backends

from stepkto_fast.objective import log_probs
from stepkto_fast.packing import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import end_to_end
from end_to_end import PROVIDERS, SIZES, Child, Clock, FinishedError, Nursery, Ours, Trl
from planted import END

SIZE = SIZES["quick"]
NATIVE = backends.why_not("linear_logp", "native")
HEAD = pytest.param("native", marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE)))
WAYS = {name: way for name, way in PROVIDERS.items() if isinstance(way, Ours)}


def first_steps(name: str, dtype: str = "fp32", count: int = 1) -> list[dict]:
    found: list[dict] = []
    with pytest.raises(FinishedError):
        end_to_end.work(name, SIZE, dtype, Clock(iter(["check"] * count), found.append))
    return found


@pytest.fixture(scope="module")
def truths():
    return end_to_end.truths(SIZE)


@pytest.fixture
def nursery():
    opened = Nursery()
    yield opened
    opened.close()


@pytest.mark.parametrize("head", [HEAD, "reference"])
@pytest.mark.parametrize("every_row", [False, True])
def test_padded_and_packed_trunks_give_the_same_log_probs(head, every_row):
    rollouts, way = end_to_end.batch(SIZE), Ours(packed=False, every_row=every_row, exact=True, head=head)
    model, recipe = end_to_end.policy(SIZE), way.recipe("fp32")
    packed = torch.cat(log_probs(model, rollouts, recipe))
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), end_to_end.backend(head):
        padded = end_to_end.padded_logps(model, rollouts, way, recipe)
    torch.testing.assert_close(padded, packed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", WAYS)
def test_a_feature_off_changes_neither_loss_nor_gradient(name, truths):
    way = WAYS[name]
    if way.head == "TRL":
        pytest.importorskip("trl.trainer.kto_trainer", reason="needs TRL", exc_type=ImportError)
    if reason := backends.why_not("linear_logp", way.backend):
        pytest.skip(reason)
    (found,) = first_steps(name)
    wanted = truths[way.truth.name]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(
        wanted["gradient_norm"], rel=1e-2 if found.get("rho", 1) < 1 else 1e-4
    )


@pytest.mark.parametrize("name", [name for name, way in PROVIDERS.items() if isinstance(way, Trl) and not way.liger])
def test_trls_trainer_takes_the_very_same_step(name, truths):
    pytest.importorskip("trl.trainer.kto_trainer", reason="needs TRL", exc_type=ImportError)
    found, again = first_steps(name, count=2)
    wanted = truths[PROVIDERS[name].truth.name]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4)
    assert found["forwards"] == (2 if PROVIDERS[name].objective == "outcome" else 4)
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-3)  # the same batch again


def test_the_objectives_differ(truths):
    assert {"step", "outcome", "kto", "kto grouped"} == set(truths)
    assert len({round(each["loss"], 6) for each in truths.values()}) == len(truths)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_tokens_are_prompts_and_completions_without_padding(size):
    rollouts = end_to_end.batch(size)
    assert end_to_end.count_tokens(rollouts) == pack(rollouts).input_ids.numel()
    ids, mask = end_to_end.padded(rollouts)
    assert mask.sum() == end_to_end.count_tokens(rollouts) < ids.numel()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_batch_suits_both_sides(size):
    rollouts = end_to_end.batch(size)
    assert rollouts == end_to_end.batch(size)
    assert {r.label for r in rollouts} == {True, False}
    assert {x for r in rollouts for x in r.step_labels} == {-1, 0, 1}
    assert all(r.step_ends[-1] == len(r.completion_ids) and r.completion_ids[-1] == END for r in rollouts)
    pairs = end_to_end.rotated(rollouts)
    assert all(pair.prompt_ids == r.prompt_ids for pair, r in zip(pairs, rollouts, strict=True))
    assert all(pair.completion_ids != r.completion_ids for pair, r in zip(pairs, rollouts, strict=True))
    mean = sum(len(r.completion_ids) for r in rollouts) / len(rollouts)
    assert mean == pytest.approx(size.completion, rel=0.1)


def test_trl_reads_the_very_tokens():
    pytest.importorskip("datasets")
    words, rollouts = end_to_end.tokenizer(SIZE), end_to_end.batch(SIZE)
    for row, r in zip(end_to_end.dataset(SIZE, 1), rollouts, strict=True):
        assert words(row["prompt"] + row["completion"])["input_ids"] == [*r.prompt_ids, *r.completion_ids]
        assert words(row["prompt"])["input_ids"] == r.prompt_ids
        assert row["completion"].endswith(words.eos_token)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_takes_a_step_a_request(nursery):
    child = Child(nursery, "ours, reference backend", "quick", "fp32")
    first, second = child.ask("check"), child.ask("step")
    child.close()
    assert first["seconds"] > 0
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
    if end_to_end.CLEAR.exists():
        assert first["peak_bytes"] > 0
        assert second["peak_bytes"] is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_or_fails_is_reported_and_the_next_one_works(nursery):
    dead = Child(nursery, "ours, reference backend", "quick", "fp32")
    os.kill(dead.pid, signal.SIGKILL)
    assert dead.ask("step")["failed"].startswith("the process ended with code -9")
    unknown = Child(nursery, "nobody", "quick", "fp32")
    ended = select.poll()
    ended.register(unknown.socket, 0)
    assert ended.poll(60_000), "still there"
    assert unknown.ask("check") == {"failed": "KeyError: 'nobody'"}
    assert unknown.ask("step")["failed"].startswith("the process ended with code 1: KeyError")
    last = Child(nursery, "ours, reference backend", "quick", "fp32")
    assert "loss" in last.ask("check")
    for child in (dead, unknown, last):
        child.close()
