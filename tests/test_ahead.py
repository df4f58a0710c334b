"""Rollouts sampled while an update runs: by the weights of its start, in shards, and read by the next iteration."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from stepkto_fast import ahead
from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts
from stepkto_fast.run_directory import Progress
from stepkto_fast.sampling_shards import weights_digest

ROOT = Path(__file__).parent.parent


class Engine:
    name = "stand-in"

    def __init__(self):
        self.slept = 0

    def sleep(self):
        self.slept += 1


@pytest.fixture
def session(tmp_path, model, monkeypatch):
    """What while_updating reads of a session at iteration 0 of 2; `calls` lists what was sampled."""
    calls = []
    s = SimpleNamespace(
        recipe=Recipe(max_staleness=1, iterations=2, seed=5), progress=Progress(), sampler=Engine(), task=None,
        tokenizer=None, train=[["first"], ["second"]], calls=calls,
        run=SimpleNamespace(rollouts=tmp_path / "rollouts", policy_of=lambda t: tmp_path / f"iteration_{t}"),
        recorder=SimpleNamespace(phase=lambda name, text: nullcontext()),
    )  # fmt: skip
    monkeypatch.setattr(ahead, "sample_ahead", lambda *args, **how: calls.append((args[2], how)))
    return s


def test_the_next_prompts_are_sampled_while_the_block_runs(session, model, monkeypatch):
    within, sampled = threading.Event(), threading.Event()

    def sample(*args, **how):
        assert within.wait(20), "sampling and the update run at the same time"
        session.calls.append((args[2], how))
        sampled.set()

    monkeypatch.setattr(ahead, "sample_ahead", sample)
    with ahead.while_updating(session, model):
        within.set()
        assert sampled.wait(20)
    ((asked, how),) = session.calls
    assert asked == ["second"]
    assert how["weights"] == session.progress.ahead == weights_digest(model)
    assert how["folder"] == ahead.rollout_shards(session, 1)
    assert session.progress.seconds_beside > 0
    assert session.sampler.slept == 0


def test_nothing_is_sampled_ahead_in_the_last_iteration_or_unasked(session, model):
    session.progress.iteration = 1
    with ahead.while_updating(session, model):
        pass
    session.progress.iteration, session.recipe = 0, Recipe(iterations=2)
    with ahead.while_updating(session, model):
        pass
    assert not session.calls
    assert session.sampler.slept == 2


def test_what_goes_wrong_in_the_engine_is_raised_at_the_end(session, model, monkeypatch):
    def sample(*args, **how):
        raise RunError("the engine is gone")

    monkeypatch.setattr(ahead, "sample_ahead", sample)
    done = []
    with pytest.raises(RunError, match="the engine is gone"), ahead.while_updating(session, model):
        done.append("update")
    assert done == ["update"]


def test_what_goes_wrong_in_the_update_waits_for_nobody(session, model, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(ahead, "sample_ahead", lambda *args, **how: never.wait(60))
    with pytest.raises(ZeroDivisionError), ahead.while_updating(session, model):
        raise ZeroDivisionError
    never.set()


@pytest.mark.loop
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="sampling ahead takes vLLM: not installed")
def test_the_loop_learns_from_rollouts_of_the_model_before(tmp_path):
    folder = tmp_path / "run"
    arguments = [
        str(ROOT / "recipes" / "smoke.yaml"), "--max_staleness", "1", "--importance_correction", "token",
        "--rollout_shard_size", "8", "--output_dir", str(folder), "--report_to", "none", "--learning_rate", "1e-3",
        "--reference_points", "exact",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "stepkto_fast.train", *arguments], capture_output=True, text=True, timeout=500,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = {t: [line["kl"] for line in lines if "kl" in line and line["iteration"] == t] for t in (0, 1)}
    assert abs(points[0][0]) < 1e-6, "at its first step the policy is M_0, which sampled"
    assert points[1][0] > 1e-3, "M_1 is held against M_0, which sampled, and not against itself"
    lines = [line for line in lines if "staleness" in line]
    assert [line["staleness"] for line in lines] == [0, 1]
    fresh, stale = (line["importance/sampling_logp_difference/max"] for line in lines)
    assert fresh < 1e-3 < 0.01 < stale
    for t in (0, 1):
        rollouts = read_rollouts(folder / "rollouts" / f"iteration_{t}.parquet")
        pairs = [pair for r in rollouts for pair in zip(r.logps, r.ref_logps, strict=True)]
        assert max(abs(a - b) for a, b in pairs) < 1e-3, "the reference is the model that sampled"
        weights = [w for r in rollouts for w in r.importance]
        assert len(weights) == len(pairs)
        assert (max(abs(w - 1) for w in weights) > 0.01) == (t == 1)
