"""Shards of rollouts: each sampled once, from its own seed, by one rank; read back to the last bit or not at all."""

import math
import random
import struct
from dataclasses import replace
from datetime import timedelta

import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from torch import distributed as dist

from stepkto_fast import monte_carlo, ranks
from stepkto_fast.answers import Verdict
from stepkto_fast.collect import ask, check_sync, sample_rollouts, shard_size
from stepkto_fast.errors import RunError
from stepkto_fast.monte_carlo import monte_carlo_values
from stepkto_fast.objective import log_probs
from stepkto_fast.policy import build_policy
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.sampler import Sample
from stepkto_fast.sampling_shards import drop_shards, over_ranks, weights_digest
from stepkto_fast.task import ArithmeticTask
from stepkto_fast.tasks import arithmetic

RECIPE = Recipe(rollout_shard_size=4, max_completion_length=40)
TASK = ArithmeticTask(RECIPE)
PROMPTS = 10  # three shards: 4, 4, 2
PROBLEMS = {p.prompt.strip(): p for p in arithmetic.problems(40, "tests", "chain", range(1, 5))}  # as the fixture
DRAW = {"n": 2, "temperature": 0.7, "seed": 11}


class Writer:
    """A sampler that writes solutions, some wrong, drawn from the seed; log-probs have more digits than fp32 holds."""

    name = "writer"

    def __init__(self, tokenizer, stop_at=None, error=KeyboardInterrupt):
        self.tokenizer, self.stop_at, self.error, self.calls = tokenizer, stop_at, error, []

    def sample(self, prompts, *, n, temperature, max_tokens, seed, on_progress):
        self.calls.append((len(prompts), seed))
        if len(self.calls) == self.stop_at:
            raise self.error("stopped")
        rng = random.Random(f"{seed} {n} {temperature} {max_tokens}")
        teacher = arithmetic.Misconceptions.draw("writer", share=0.5, rate=0.7, slip=0.1)
        found = []
        for done, prompt in enumerate(prompts):
            problem = PROBLEMS[self.tokenizer.decode(prompt).strip()]
            texts = [arithmetic.demonstration(rng, problem, teacher) for _ in range(n)]
            rows = [[*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id] for text in texts]
            found.append([Sample(ids, [math.log(rng.random()) for _ in ids], True) for ids in rows])
            on_progress(n * (done + 1), n * len(prompts))
        return found


@pytest.fixture(scope="module")
def asked(problems, tokenizer):
    model = build_policy(tokenizer, hidden_size=32, layers=1, heads=2, max_length=96, seed=1)
    return ask(TASK, problems[:PROMPTS], tokenizer, model, RECIPE)[0]


def draw(asked, tokenizer, folder=None, recipe=RECIPE, sampler=None, **changes):
    return sample_rollouts(
        sampler or Writer(tokenizer), TASK, asked, tokenizer, recipe, folder=folder, **{**DRAW, **changes}
    )


def bits(rollouts):
    """Every field, floats by their bit pattern."""
    return [
        [struct.pack(f"{len(v)}d", *v) if k == "logps" else (type(v), v) for k, v in vars(r).items()] for r in rollouts
    ]


@pytest.mark.parametrize(
    ("setting", "prompts", "ranks_", "expected"),
    [
        (None, 500, 1, 500),
        (None, 5000, 1, 512),
        (None, 500, 8, 63),
        (None, 3, 8, 1),
        (None, 0, 2, 1),
        (100, 5000, 8, 100),
        (100, 7, 1, 100),
    ],
)
def test_shards_are_small_enough_for_every_rank(monkeypatch, setting, prompts, ranks_, expected):
    monkeypatch.setattr(ranks, "size", lambda: ranks_)
    assert shard_size(Recipe(rollout_shard_size=setting), prompts) == expected


def test_one_shard_has_the_seed_that_was_given_and_several_have_their_own(asked, tokenizer):
    sampler = Writer(tokenizer)
    whole = draw(asked, tokenizer, recipe=replace(RECIPE, rollout_shard_size=None), sampler=sampler)
    assert sampler.calls == [(10, 11)]
    sampler = Writer(tokenizer)
    cut = draw(asked, tokenizer, sampler=sampler)
    assert [prompts for prompts, _ in sampler.calls] == [4, 4, 2]
    assert len({11, *(seed for _, seed in sampler.calls)}) == 4
    places = [(a.problem_id, k) for a in asked for k in range(2)]
    assert [(r.problem_id, r.sample) for r in cut] == [(r.problem_id, r.sample) for r in whole] == places
    assert bits(cut) != bits(whole)
    assert {r.label for r in cut} == {True, False}
    assert all(r.checker_labels and r.answer for r in cut)


def test_what_is_read_back_is_what_was_sampled_to_the_last_bit(asked, tokenizer, tmp_path):
    sampled, seen, sampler = draw(asked, tokenizer, tmp_path), [], Writer(tokenizer)
    back = draw(asked, tokenizer, tmp_path, sampler=sampler, on_progress=lambda *x: seen.append(x))
    assert not sampler.calls
    assert bits(back) == bits(sampled) == bits(draw(asked, tokenizer))
    assert any(logp != math.log(math.exp(logp)) for r in sampled for logp in r.logps)
    assert seen == [(8, 20), (16, 20), (20, 20)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"shard_{k}.parquet" for k in range(3)]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_call_that_was_stopped_goes_on_with_the_shard_that_was_not_done(asked, tokenizer, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        draw(asked, tokenizer, tmp_path, sampler=Writer(tokenizer, stop_at))
    sampler, seen = Writer(tokenizer), []
    resumed = draw(asked, tokenizer, tmp_path, sampler=sampler, on_progress=lambda *x: seen.append(x))
    assert len(sampler.calls) == 3 - (stop_at - 1)
    assert bits(resumed) == bits(draw(asked, tokenizer))
    assert seen == sorted(seen)
    assert seen[-1] == (20, 20)


def test_without_a_folder_nothing_is_written(asked, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(asked, tokenizer)
    assert not list(tmp_path.iterdir())


def rewrite(change):
    return lambda path: pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        rewrite(lambda table: table.drop_columns("finished")),
        rewrite(lambda table: table.replace_schema_metadata({})),
        rewrite(lambda table: table[:-1]),
        rewrite(lambda table: table.take([1, 0, *range(2, 8)])),
    ],
    ids=["cut", "empty", "column", "digest", "row", "order"],
)
def test_a_damaged_shard_is_sampled_again_and_told_of(asked, tokenizer, tmp_path, damage):
    expected, told, sampler = draw(asked, tokenizer, tmp_path), [], Writer(tokenizer)
    damage(tmp_path / "shard_1.parquet")
    assert bits(draw(asked, tokenizer, tmp_path, sampler=sampler, say=told.append)) == bits(expected)
    assert [prompts for prompts, _ in sampler.calls] == [4]
    assert told == [f"1 of 3 shards in {tmp_path} were damaged or of other work, and sampled again"]
    sampler = Writer(tokenizer)
    draw(asked, tokenizer, tmp_path, sampler=sampler, say=told.append)
    assert not sampler.calls, "what was sampled again is stored"
    assert len(told) == 1


def test_no_flipped_bit_changes_what_comes_back(asked, tokenizer, tmp_path):
    expected, sampler, path = bits(draw(asked, tokenizer, tmp_path)), Writer(tokenizer), tmp_path / "shard_1.parquet"
    whole = path.read_bytes()
    for place in range(3, len(whole), len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert bits(draw(asked, tokenizer, tmp_path, sampler=sampler)) == expected, place
    assert len(sampler.calls) > 40, "a few bits are of no use to anybody"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 12},
        {"n": 3},
        {"temperature": 0.8},
        {"weights": "other"},
        {"recipe": replace(RECIPE, max_completion_length=41)},
        {"recipe": replace(RECIPE, step_style="auto")},
        {"recipe": replace(RECIPE, rollout_shard_size=5)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_shards_of_other_work_are_not_taken(asked, tokenizer, tmp_path, changes):
    draw(asked, tokenizer, tmp_path)
    sampler = Writer(tokenizer)
    assert bits(draw(asked, tokenizer, tmp_path, sampler=sampler, **changes)) == bits(draw(asked, tokenizer, **changes))
    assert len(sampler.calls) >= 2


def test_shards_cut_by_another_pattern_are_not_taken(asked, tokenizer, tmp_path):
    by_line, by_comma = (replace(RECIPE, step_style="regex", step_pattern=pattern) for pattern in (r"\n", ","))
    draw(asked, tokenizer, tmp_path, recipe=by_line)
    assert bits(draw(asked, tokenizer, tmp_path, recipe=by_comma)) == bits(draw(asked, tokenizer, recipe=by_comma))


def test_a_log_prob_that_is_no_number_does_not_prove_the_sync(asked, tokenizer, model):
    rollouts = draw(asked, tokenizer)
    for r, logp in zip(rollouts, log_probs(model, rollouts, RECIPE), strict=True):
        r.logps = logp.tolist()
    assert check_sync(model, rollouts, RECIPE)[1] < 1e-3
    rollouts[3].logps[0] = math.nan
    with pytest.raises(RunError, match="weight sync failed"):
        check_sync(model, rollouts, RECIPE)


def test_shards_of_another_prompt_or_answer_are_not_taken(asked, tokenizer, tmp_path, monkeypatch):
    draw(asked, tokenizer, tmp_path)
    sampler = Writer(tokenizer)
    draw([*asked[:5], asked[9], *asked[6:]], tokenizer, tmp_path, sampler=sampler)
    assert [prompts for prompts, _ in sampler.calls] == [4]
    sampler = Writer(tokenizer)
    monkeypatch.setattr(TASK, "answer", lambda problem: "0")
    draw(asked, tokenizer, tmp_path, sampler=sampler)
    assert len(sampler.calls) == 3


def test_dropped_shards_are_gone_and_dropping_twice_is_no_error(asked, tokenizer, tmp_path):
    draw(asked, tokenizer, tmp_path / "shards")
    for _ in range(2):
        drop_shards(tmp_path / "shards")
        assert not (tmp_path / "shards").exists()


def test_weights_differ_in_their_digest_when_one_bit_differs(model, tokenizer):
    first = weights_digest(model)
    assert first == weights_digest(model)
    with torch.no_grad():
        next(model.parameters()).view(torch.int32)[0, 3] ^= 1
    assert weights_digest(model) != first
    assert weights_digest(model.to(torch.bfloat16)) != first


# ---- several ranks ----


class Coins:
    """Continuations of one token, right in a share that the seed decides."""

    def __init__(self):
        self.calls = 0

    def sample(self, prompts, *, n, temperature, max_tokens, seed, on_progress):
        self.calls += 1
        rng = random.Random(seed)
        return [[Sample([rng.choice([7, 8])], [0.0], True) for _ in range(n)] for _ in prompts]


def values(tokenizer, folder):
    """(step values, calls of the sampler, work) of six problems, a chunk each."""
    rollouts = [Rollout(k, 0, "", [5, k], "", [4, 6, 6], [0.0] * 3, True, step_ends=[1, 2, 3]) for k in range(6)]
    seven = tokenizer.decode([7])

    def judge(ids, texts, finished):
        return [Verdict(text.endswith(seven), True, None) for text in texts]

    sampler, monte_carlo.CHUNK = Coins(), 1
    recipe = Recipe(mc_continuations=16, max_completion_length=8)
    work = monte_carlo_values(rollouts, sampler, judge, tokenizer, recipe, seed=3, folder=folder)
    return [r.step_values for r in rollouts], sampler.calls, vars(work)


def fail_on_rank_1(number, item):
    if ranks.rank() == 1:
        raise RunError(f"shard {number} failed")
    return item


def on_two_ranks(rank, folder, asked, tokenizer):
    """Runs in a process of its own; what it found goes to a file."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    sampler, again, seen = Writer(tokenizer), Writer(tokenizer), []
    sampled = draw(asked, tokenizer, folder / "shards", sampler=sampler, on_progress=lambda *x: seen.append(x))
    resumed = draw(asked, tokenizer, folder / "shards", sampler=again)
    found = {"rollouts": bits(sampled), "resumed": bits(resumed) == bits(sampled), "seen": seen[-1]}
    found |= {"calls": sampler.calls, "calls again": again.calls, "values": values(tokenizer, folder / "chunks")}
    for name, work in (
        ("error", lambda: over_ranks([4, 5, 6], fail_on_rank_1)),
        (
            "sampler's error",
            lambda: draw(asked, tokenizer, sampler=Writer(tokenizer, stop_at=2 - rank, error=RunError)),
        ),
    ):
        with pytest.raises(RunError) as caught:
            work()
        found[name] = str(caught.value)
    model = build_policy(tokenizer, hidden_size=32, layers=1, heads=2, max_length=96, seed=1)
    torch.distributed.fsdp.fully_shard(model)
    found["weights"] = [weights_digest(model)]
    with torch.no_grad():
        if rank == 1:
            next(model.parameters()).to_local()[0, 0] += 1
    found["weights"].append(weights_digest(model))
    torch.save(found, folder / f"found_{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_shards_and_both_end_with_all(asked, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(monte_carlo, "CHUNK", 1)
    torch.multiprocessing.start_processes(on_two_ranks, (tmp_path, asked, tokenizer), nprocs=2, start_method="spawn")
    zero, one = (torch.load(tmp_path / f"found_{rank}.pt", weights_only=False) for rank in range(2))
    sampler = Writer(tokenizer)
    assert zero["rollouts"] == one["rollouts"] == bits(draw(asked, tokenizer, sampler=sampler))
    assert (zero["calls"], one["calls"]) == (sampler.calls[::2], sampler.calls[1::2])
    assert (zero["seen"], one["seen"]) == ((12, 12), (8, 8))
    assert zero["resumed"]
    assert one["resumed"]
    assert zero["calls again"] == one["calls again"] == []
    alone, calls, work = values(tokenizer, tmp_path / "alone")
    assert calls == 6
    assert len({tuple(v) for v in alone}) > 2
    assert zero["values"] == one["values"] == (alone, 3, work)
    assert zero["error"] == one["error"] == "shard 1 failed"
    assert zero["sampler's error"] == one["sampler's error"] == "stopped"
    assert zero["weights"] == one["weights"]
    assert len(set(zero["weights"])) == 2
