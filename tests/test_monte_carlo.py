"""Monte-Carlo labels: values against enumerations, by both engines; resuming; shared prefixes; agreement of sources."""

import importlib.util
import math
import random
import shutil
import struct
from fractions import Fraction
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stepkto_fast import monte_carlo
from stepkto_fast.answers import Verdict
from stepkto_fast.monte_carlo import agreement, consensus, estimate_cost, labels_of, monte_carlo_values
from stepkto_fast.policy import build_policy
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout, read_rollouts, write_rollouts
from stepkto_fast.run_directory import save_pretrained
from stepkto_fast.sampler import Sample, open_sampler
from stepkto_fast.segmentation import step_ends, step_texts
from stepkto_fast.tasks import arithmetic
from stepkto_fast.warm_start import fine_tune

VLLM = pytest.param(
    "vllm",
    marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
)
LABELS = st.lists(st.tuples(st.sampled_from([1, 0, -1]), st.sampled_from([1, 0, -1])), max_size=30)


# ---- a toy whose values can be counted: continuations are fair coin flips ----


class Coins:
    """A sampler that enumerates: every sequence of flips " 0", " 1" as long as the prompt's limit, equally often."""

    name = "coins"

    def __init__(self, tokenizer):
        self.faces = [tokenizer.convert_tokens_to_ids(" 0"), tokenizer.convert_tokens_to_ids(" 1")]
        self.calls = []

    def sync(self, model):
        raise AssertionError("there is no model")

    def sample(self, prompts, *, n, temperature, max_tokens, seed, on_progress):
        self.calls.append((prompts, max_tokens, seed))
        on_progress(n * len(prompts), n * len(prompts))
        return [
            [Sample([self.faces[k >> bit & 1] for bit in range(room)], [0.0] * room, True) for k in range(n)]
            for room in max_tokens
        ]


def more_ones(problem_ids, completions, finished):
    """Right where "1" outnumbers "0"; not verified where problem 7 has its first flip on "0"."""
    return [
        Verdict(c.count("1") > c.count("0"), not (problem == 7 and c.startswith(" 0")), None)
        for problem, c in zip(problem_ids, completions, strict=True)
    ]


def flips(tokenizer, text, problem_id=0, sample=0, finished=True):
    """A rollout of coin flips, each a step of its own."""
    ids = [tokenizer.convert_tokens_to_ids(f" {face}") for face in text]
    r = Rollout(problem_id, sample, "flip", [5, 6 + problem_id], text, ids, [-1.0] * len(ids), finished)
    r.step_ends, r.label = list(range(1, len(ids) + 1)), text.count("1") > text.count("0")
    return r


def chance(ones, zeros, left):
    """The probability that ones outnumber zeros after `left` more fair flips."""
    good = sum(math.comb(left, k) for k in range(left + 1) if ones + k > zeros + left - k)
    return good / 2**left


def settings(**changes):
    return Recipe(**{"mc_continuations": 32, "max_completion_length": 5, "label_source": "monte_carlo", **changes})


def bits(rollouts):
    """Values to the last bit: nan equals nan."""
    return [struct.pack(f"{len(r.step_values)}d", *r.step_values) for r in rollouts]


def test_values_are_the_probabilities_of_an_exact_enumeration(tokenizer, tmp_path):
    rollouts = [flips(tokenizer, text, k % 3, k // 3) for k, text in enumerate(["10110", "01000", "011", "10011", "1"])]
    work = monte_carlo_values(rollouts, Coins(tokenizer), more_ones, tokenizer, settings(), seed=0, folder=tmp_path)
    for r in rollouts:
        for end, value in list(zip(r.step_ends, r.step_values, strict=True))[:-1]:
            ones = r.completion[:end].count("1")
            assert value == chance(ones, end - ones, 5 - end)
        assert r.step_values[-1] == r.label  # nothing is behind the end of a finished completion
    assert len({v for r in rollouts for v in r.step_values}) > 5
    assert (work.continuations, work.unverified, work.unlabelled) == (32 * 12, 0, 0)


def test_the_last_step_of_a_truncated_rollout_is_continued_where_there_is_room(tokenizer, tmp_path):
    rollouts = [flips(tokenizer, text, finished=False) for text in ("110", "11000", "11100")]
    monte_carlo_values(rollouts, Coins(tokenizer), more_ones, tokenizer, settings(), seed=0, folder=tmp_path)
    with_room, cut_off, answered = (r.step_values[-1] for r in rollouts)
    assert with_room == chance(2, 1, 2)
    assert math.isnan(cut_off), "nobody knows what the step would have become"
    assert answered == 1.0


def test_what_is_not_known_is_nan_and_unlabelled(tokenizer, tmp_path):
    rollouts = [flips(tokenizer, text, 7, k) for k, text in enumerate(["0110", "1100", "1"])]
    rollouts[1].verified = False
    rollouts.append(flips(tokenizer, "1111111", 1))  # longer than max_completion_length: nothing may follow its steps
    recipe = settings()
    work = monte_carlo_values(rollouts, Coins(tokenizer), more_ones, tokenizer, recipe, seed=0, folder=tmp_path)
    nan = math.nan
    expected = [
        [nan, nan, nan, float(rollouts[0].label)],
        [chance(1, 0, 4), chance(2, 0, 3), chance(2, 1, 2), nan],
        [1.0],
        [chance(1, 0, 4), chance(2, 0, 3), 1.0, 1.0, nan, nan, 1.0],
    ]
    assert bits(rollouts) == [struct.pack(f"{len(row)}d", *row) for row in expected]
    assert labels_of(rollouts[0].step_values, recipe) == [-1, -1, -1, 0]
    assert (work.unlabelled, work.unverified) == (6, 3 * 32)


def test_unverified_continuations_are_left_out_of_the_share(tokenizer, tmp_path):
    def judge(problem_ids, completions, finished):
        # A right answer that could not be compared must not count as right.
        return [Verdict(True, c.endswith("1"), None) if "1 0" in c else Verdict(False, True, None) for c in completions]

    r = flips(tokenizer, "10", finished=False)
    monte_carlo_values(
        [r], Coins(tokenizer), judge, tokenizer, settings(max_completion_length=4), seed=0, folder=tmp_path
    )
    assert r.step_values[-1] == 1.0  # behind "1 0": 00 and 10 are unverified, 01 and 11 right


def test_shared_prefixes_are_sampled_once_each_before_those_that_begin_with_it(tokenizer, tmp_path):
    texts = ["1011", "10111", "0", "1000", "1011"]
    rollouts = [flips(tokenizer, text, problem, k) for problem in (3, 1) for k, text in enumerate(texts)]
    random.Random(0).shuffle(rollouts)
    sampler = Coins(tokenizer)
    monte_carlo_values(rollouts, sampler, more_ones, tokenizer, settings(), seed=0, folder=tmp_path)
    ((prompts, limits, _),) = sampler.calls
    wanted = {(r.problem_id, r.completion[:end]) for r in rollouts for end in r.step_ends[:-1]}
    assert len(prompts) == len(wanted) == len({tuple(p) for p in prompts}) == 2 * 5
    assert limits == [5 - (len(p) - 2) for p in prompts]
    problems = [p[:2] for p in prompts]
    assert problems == sorted(problems, key=problems.index)
    for before, after in pairwise(prompts):
        assert before[:2] != after[:2] or before < after
    values = {}
    for r in rollouts:
        for end, value in list(zip(r.step_ends, r.step_values, strict=True))[:-1]:
            assert values.setdefault((r.problem_id, r.completion[:end]), value) == value


def test_the_cost_is_counted_exactly(tokenizer, tmp_path):
    rollouts = [flips(tokenizer, "1011", 0, 0), flips(tokenizer, "10", 0, 1), flips(tokenizer, "01", 1, 0, False)]
    cost = estimate_cost(rollouts, settings(), tokens_per_second=2)
    # Ends at 1 (twice), 2 and 3 of problem 0; both steps of problem 1, whose rollout is not finished.
    assert (cost.steps, cost.prefixes, cost.continuations) == (6, 5, 5 * 32)
    assert cost.tokens_at_most == 32 * (4 + 3 + 2 + 4 + 3)
    assert cost.tokens_expected == 32 * ((3 + 1) / 2 + 2 + 1 + 1 + 0)
    assert cost.seconds == cost.tokens_expected / 2
    assert cost.text() == (
        "continuing from 5 different ends of steps (6 in all): 160 continuations, about 192 tokens, at most 512; "
        "about 96 s"
    )
    assert estimate_cost(rollouts, settings()).text().endswith("at most 512")
    work = monte_carlo_values(rollouts, Coins(tokenizer), more_ones, tokenizer, settings(), seed=0, folder=tmp_path)
    assert (work.continuations, work.tokens) == (cost.continuations, cost.tokens_at_most)  # coins go on to the limit
    assert estimate_cost([], settings()).continuations == 0


def test_chunks_hold_whole_problems_and_no_more_than_may_be_lost(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(monte_carlo, "CHUNK", 5 * 32)
    texts = {0: ["1000"], 1: ["110", "1"], 2: ["1010", "0101", "1100"], 3: ["110"], 4: ["10000"]}
    rollouts = [flips(tokenizer, text, n, k) for n, of in texts.items() for k, text in enumerate(of)]
    sampler, seen = Coins(tokenizer), []
    monte_carlo_values(
        rollouts, sampler, more_ones, tokenizer, settings(), seed=0, folder=tmp_path,
        on_progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    problems = [pq.read_table(tmp_path / f"chunk_{n}.parquet")["problem_id"].to_pylist() for n in range(4)]
    assert problems == [[0, 0, 0, 1, 1], [2] * 8, [3, 3], [4] * 4]
    assert len(list(tmp_path.iterdir())) == len({seed for _, _, seed in sampler.calls}) == 4
    assert seen == sorted(seen)
    assert seen[-1] == (19 * 32, 19 * 32)


def test_whole_completions_are_decoded_at_once(tmp_path):
    """A character whose bytes are divided between a prefix and its continuation reaches the judge whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({t: n for n, t in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    ids = tokenizer("aé = 7")["input_ids"]

    class Rest:
        def sample(self, prompts, *, n, **_):
            return [[Sample([*ids[2:], 1, 0], [0.0] * (len(ids)), True)] * n for _ in prompts]

    def judge(problem_ids, completions, finished):
        assert completions == ["aé = 7<pad>"] * 2  # without the end, with any other special token
        assert finished == [True] * 2
        return [Verdict(True, True, "7")] * 2

    r = Rollout(0, 0, "", [3], "", [*ids, 0], [], True, step_ends=[2, len(ids) + 1])
    monte_carlo_values(
        [r], Rest(), judge, tokenizer, settings(mc_continuations=2, max_completion_length=20), seed=0, folder=tmp_path
    )  # fmt: skip
    assert r.step_values == [1.0, 0.0]


def test_a_judge_that_loses_verdicts_is_caught(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="the judge gave 31 verdicts on 32 completions"):
        monte_carlo_values(
            [flips(tokenizer, "10")], Coins(tokenizer), lambda *x: more_ones(*x)[1:], tokenizer, settings(), seed=0,
            folder=tmp_path,
        )  # fmt: skip


# ---- real engines on arithmetic ----


@pytest.fixture(scope="module")
def taught(tokenizer):
    """(problems, a tiny model that has learnt the form of solutions and little arithmetic, its recipe)."""
    asked = arithmetic.problems(60, "monte carlo", "chain", range(1, 3))
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=96, seed=1)
    rng = random.Random(0)
    shown = [completion(n, 0, p, arithmetic.demonstration(rng, p), tokenizer) for n, p in enumerate(asked)]
    fine_tune(model, shown, steps=80, batch_size=24, learning_rate=5e-3, seed="0")
    return asked, model, settings(mc_continuations=100, max_completion_length=24, mc_temperature=0.8)


def completion(n, sample, problem, text, tokenizer):
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    prompt_ids = tokenizer(problem.prompt)["input_ids"]
    r = Rollout(n, sample, problem.prompt, prompt_ids, text, ids, [-1.0] * len(ids), True)
    r.step_ends = step_ends(ids, tokenizer)
    r.steps = step_texts(ids, r.step_ends, tokenizer)
    r.label = arithmetic.answer_is_right(problem, text)
    return r


def solutions(asked, tokenizer):
    """Two solutions, one with mistakes, of a few problems; their first steps are often the same."""
    rng, teacher = random.Random(3), arithmetic.Misconceptions.draw("mc", share=0.5, rate=0.9, slip=0.1)
    return [
        completion(n, k, asked[n], arithmetic.demonstration(rng, asked[n], teacher if k else None), tokenizer)
        for n in range(4)
        for k in range(2)
    ]


def judge_of(asked):
    def judge(problem_ids, completions, finished):
        assert all(isinstance(done, bool) for done in finished)
        found = zip(problem_ids, completions, strict=True)
        return [Verdict(arithmetic.answer_is_right(asked[n], text), True, None) for n, text in found]

    return judge


@torch.no_grad()
def exact_value(model, tokenizer, problem, prompt_ids, prefix, recipe):
    """(probability of a right completion behind `prefix`, mass of rare continuations that were not followed)."""
    model.set_attn_implementation("sdpa")
    right, dropped, live = 0.0, 0.0, [([], 1.0)]
    for room in range(recipe.max_completion_length - len(prefix), 0, -1):
        rows = torch.tensor([[*prompt_ids, *prefix, *tail] for tail, _ in live])
        shares = (model(rows).logits[:, -1].double() / recipe.mc_temperature).softmax(-1)
        grown = []
        for (tail, p), row in zip(live, shares, strict=True):
            likely = (row * p > 1e-4).nonzero()[:, 0].tolist()
            dropped += p * (1 - float(row[likely].sum()))
            grown += [([*tail, token], p * float(row[token])) for token in likely]
        ended = [t for t in grown if t[0][-1] == tokenizer.eos_token_id or room == 1]
        for tail, p in ended:
            text = tokenizer.decode([*prefix, *tail], skip_special_tokens=True)
            right += p * arithmetic.answer_is_right(problem, text)
        live = [t for t in grown if t[0][-1] != tokenizer.eos_token_id]
        if not live:
            break
    model.set_attn_implementation("stepkto_packed")
    return right, dropped


@pytest.fixture(scope="module")
def exact(taught, tokenizer):
    """{(problem, prefix): what `exact_value` says} for the prefixes of `solutions`."""
    asked, model, recipe = taught
    prefixes = {
        (r.problem_id, tuple(r.completion_ids[:end])): r.prompt_ids
        for r in solutions(asked, tokenizer)
        for end in r.step_ends[:-1]
    }
    return {
        (n, prefix): exact_value(model, tokenizer, asked[n], prompt_ids, prefix, recipe)
        for (n, prefix), prompt_ids in prefixes.items()
    }


@pytest.fixture(scope="module", params=[VLLM, "transformers"])
def engine(request, taught, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    _, model, recipe = taught
    save_pretrained(model, tokenizer, folder)
    recipe.engine = request.param
    sampler = open_sampler(recipe, model, tokenizer, folder, folder / "engine.log")
    sampler.sync(model)
    yield sampler
    sampler.close()


def test_engines_sample_the_values_that_the_model_has(engine, taught, exact, tokenizer, tmp_path):
    """Both agree with one enumeration, and so with each other; a second call gives the same values bit for bit."""
    asked, _, recipe = taught
    rollouts, again = solutions(asked, tokenizer), solutions(asked, tokenizer)
    work = monte_carlo_values(rollouts, engine, judge_of(asked), tokenizer, recipe, seed=1, folder=tmp_path / "1")
    monte_carlo_values(again, engine, judge_of(asked), tokenizer, recipe, seed=1, folder=tmp_path / "2")
    assert bits(again) == bits(rollouts)
    for r in rollouts:
        for end, value in list(zip(r.step_ends, r.step_values, strict=True))[:-1]:
            p, dropped = exact[r.problem_id, tuple(r.completion_ids[:end])]
            deviation = math.sqrt(max(p * (1 - p), 1 / 100) / 100)
            assert p - 4.5 * deviation <= value <= p + dropped + 4.5 * deviation
        assert r.step_values[-1] == r.label
    assert max(dropped for _, dropped in exact.values()) < 0.1
    assert len({round(p, 1) for p, _ in exact.values()}) >= 3
    assert work.continuations == 100 * len(exact) < 100 * sum(len(r.step_ends) - 1 for r in rollouts)


def test_the_prefix_cache_is_used_and_changes_no_result(engine, taught, tokenizer, monkeypatch):
    if engine.name != "vllm":
        pytest.skip("transformers' generate has no prefix cache")
    asked, _, _ = taught
    outputs, generate = [], engine._llm.generate
    monkeypatch.setattr(engine._llm, "generate", lambda *a, **k: outputs.append(generate(*a, **k)) or outputs[-1])
    line = [token for p in asked[:6] for token in tokenizer(p.prompt)["input_ids"]][:70]
    prompts = [line[:40], line[:55], line]
    draw = {"n": 1, "temperature": 0.9, "max_tokens": [20, 7, 12], "seed": 4}
    one = engine.sample(prompts, **draw)
    assert [output.num_cached_tokens for output in outputs[-1]] == [0, 32, 32]
    engine.sample([p[:35] for p in prompts], **{**draw, "max_tokens": 3})  # leaves other prefixes in the cache
    assert engine.sample(prompts, **draw) == one
    assert [output.num_cached_tokens for output in outputs[-1]] == [0, 32, 32]


# ---- interrupted work ----


class Interrupted:
    """A real sampler that counts its calls and is stopped at one of them."""

    name = "transformers"

    def __init__(self, sampler, stop_at=None):
        self.sampler, self.stop_at, self.calls = sampler, stop_at, 0

    def sample(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.sampler.sample(*arguments, **named)


@pytest.fixture(scope="module")
def undisturbed(taught, tokenizer, tmp_path_factory):
    """(rollouts, work, folder) of a call with a chunk for each of the four problems."""
    folder, rollouts = tmp_path_factory.mktemp("undisturbed"), solutions(taught[0], tokenizer)
    work, calls = label(taught, tokenizer, rollouts, folder)
    assert (calls, work.reused, work.damaged) == (4, 0, 0)
    return rollouts, work, folder


def label(taught, tokenizer, rollouts, folder, stop_at=None, seed=5, **changes):
    asked, model, _ = taught
    recipe = settings(**{"max_completion_length": 20, "mc_continuations": 6, "engine": "transformers", **changes})
    sampler = Interrupted(open_sampler(recipe, model, tokenizer, folder, folder / "log"), stop_at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monte_carlo, "CHUNK", 1)
        work = monte_carlo_values(
            rollouts, sampler, judge_of(asked), tokenizer, recipe, seed=seed, folder=folder / "chunks"
        )
    return work, sampler.calls


def test_interrupted_work_goes_on_bit_for_bit(undisturbed, taught, tokenizer, tmp_path):
    expected, work, folder = undisturbed
    with pytest.raises(KeyboardInterrupt):
        label(taught, tokenizer, solutions(taught[0], tokenizer), tmp_path, stop_at=3)
    rollouts = solutions(taught[0], tokenizer)
    resumed, calls = label(taught, tokenizer, rollouts, tmp_path)
    assert (calls, resumed.reused, resumed.damaged) == (2, 2, 0)
    assert bits(rollouts) == bits(expected)
    assert (resumed.tokens, resumed.continuations) == (work.tokens, work.continuations)
    for n in range(4):
        mine, theirs = (pq.read_table(at / f"chunks/chunk_{n}.parquet") for at in (tmp_path, folder))
        assert mine.equals(theirs, check_metadata=True)


@pytest.fixture
def done(undisturbed, tmp_path):
    """A copy of the undisturbed call's folder, to spoil."""
    return shutil.copytree(undisturbed[2], tmp_path / "done")


def test_chunks_differ_by_seed_and_are_not_taken_for_each_other(undisturbed, done, taught, tokenizer):
    other = solutions(taught[0], tokenizer)
    work, calls = label(taught, tokenizer, other, done, seed=6)
    assert (calls, work.reused, work.damaged) == (4, 0, 4)
    assert bits(other) != bits(undisturbed[0])


@pytest.mark.parametrize("changes", [{"mc_temperature": 0.8}, {"mc_continuations": 7}, {"max_completion_length": 19}])
def test_chunks_of_other_settings_are_sampled_again(done, taught, tokenizer, changes):
    work, calls = label(taught, tokenizer, solutions(taught[0], tokenizer), done, **changes)
    assert (calls, work.reused, work.damaged) == (4, 0, 4)


def test_chunks_of_other_rollouts_are_sampled_again(done, taught, tokenizer):
    rollouts = solutions(taught[0], tokenizer)
    for r in rollouts[2:4]:  # both of one problem, so that only token ids differ
        r.prompt_ids = [r.prompt_ids[1], *r.prompt_ids[1:]]
    work, calls = label(taught, tokenizer, rollouts, done)
    assert (calls, work.reused, work.damaged) == (1, 3, 1)


def _columns(change):
    def damage(path):
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: pq.write_table(pq.read_table(path).drop_columns("right"), path),
        lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata({}), path),
        _columns(lambda rows: rows.pop()),
        _columns(lambda rows: rows[0].update(right=7)),
        _columns(lambda rows: rows[0].update(right=0, verified=5, total=5)),
        _columns(lambda rows: rows[0].update(tokens=5)),
        _columns(lambda rows: rows[0].update(verified=None)),
        _columns(lambda rows: rows.reverse()),
    ],
    ids=["cut", "empty", "column", "metadata", "row", "right", "total", "tokens", "null", "order"],
)
def test_a_damaged_chunk_is_sampled_again(undisturbed, done, taught, tokenizer, damage):
    longest = max((done / "chunks").iterdir(), key=lambda path: pq.read_metadata(path).num_rows)
    damage(longest)
    rollouts = solutions(taught[0], tokenizer)
    work, calls = label(taught, tokenizer, rollouts, done)
    assert (calls, work.reused, work.damaged) == (1, 3, 1)
    assert bits(rollouts) == bits(undisturbed[0])


# ---- labels ----


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan))), st.floats(0, 1, exclude_min=True))
def test_labels_follow_their_definition(values, threshold):
    hard = labels_of(values, Recipe(mc_labels="hard"))
    soft = labels_of(values, Recipe(mc_labels="soft", mc_threshold=threshold))
    for value, h, s in zip(values, hard, soft, strict=True):
        assert h == (-1 if math.isnan(value) else int(value > 0))
        if not math.isnan(value) and abs(value - threshold) > 1e-5:
            assert s == int(value >= threshold)
        assert (s == -1) == math.isnan(value)


@given(st.integers(1, 64), st.data())
def test_a_share_at_the_threshold_keeps_its_label_through_a_file(continuations, data):
    right = data.draw(st.integers(1, continuations))
    recipe = Recipe(mc_labels="soft", mc_threshold=right / continuations)
    stored = struct.unpack("f", struct.pack("f", right / continuations))[0]
    below = (right - 1) / continuations
    assert labels_of([right / continuations, stored, below], recipe) == [1, 1, 0]


def test_values_survive_a_rollouts_file(tokenizer, tmp_path):
    r = flips(tokenizer, "101")
    r.step_values = [0.1, math.nan, 1.0]
    write_rollouts([r], tmp_path / "r.parquet")
    (back,) = read_rollouts(tmp_path / "r.parquet")
    recipe = Recipe(mc_labels="soft", mc_threshold=0.1)
    assert labels_of(back.step_values, recipe) == labels_of(r.step_values, recipe) == [1, -1, 1]


@given(LABELS)
def test_consensus_keeps_what_both_say(pairs):
    mc, head = [a for a, _ in pairs], [b for _, b in pairs]
    kept = consensus(mc, head)
    assert kept == consensus(head, mc)
    assert consensus(mc, mc) == mc
    for a, b, label in zip(mc, head, kept, strict=True):
        assert label == (a if a == b else -1)
    found = agreement(mc, head)
    assert found["kept"] == (sum(x != -1 for x in kept) / len(kept) if kept else None)


@given(LABELS)
def test_kappa_is_cohens(pairs):
    found = agreement([a for a, _ in pairs], [b for _, b in pairs])
    both = [(a, b) for a, b in pairs if -1 not in (a, b)]
    counts = [found[k] for k in ("both_right", "both_wrong", "only_monte_carlo_right", "only_head_right")]
    assert counts == [both.count(x) for x in ((1, 1), (0, 0), (1, 0), (0, 1))]
    assert sum(counts) + found["unlabelled"] == len(pairs)
    if not both:
        assert found["kappa"] is None
        return
    observed = Fraction(sum(a == b for a, b in both), len(both))
    mc, head = (Fraction(sum(pair[k] for pair in both), len(both)) for k in (0, 1))
    expected = mc * head + (1 - mc) * (1 - head)
    if expected == 1:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx(float((observed - expected) / (1 - expected)), abs=1e-12)


def test_sources_of_unequal_length_are_refused():
    for compare in (consensus, agreement):
        with pytest.raises(ValueError, match="shorter"):
            compare([1, 0], [1])
