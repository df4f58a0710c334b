"""The loop on mathematics in words: the shipped sample, answers by math-verify, labels by continuations and a head."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from stepkto_fast.monte_carlo import consensus, labels_of
from stepkto_fast.prm_files import load_prm
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts
from stepkto_fast.tasks import math as math_task

ROOT = Path(__file__).parent.parent
SAMPLE = str(ROOT / "recipes" / "math-sample.yaml")
ENGINE = "vllm" if importlib.util.find_spec("vllm") else "transformers"

pytestmark = [
    pytest.mark.loop,
    pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"),
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The recipe as it stands, with the best engine of this machine."""
    folder = tmp_path_factory.mktemp("math") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "stepkto_fast.train", SAMPLE, "--output_dir", str(folder)],
        capture_output=True, text=True, timeout=550, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout, "what the labels will cost is said before"
    return folder


@pytest.fixture(scope="module")
def recipe(sample) -> Recipe:
    return Recipe(**yaml.safe_load((sample / "config.yaml").read_text()))


def test_the_summary_says_who_judged_what(sample):
    summary = json.loads((sample / "summary.json").read_text())
    assert (summary["task"], summary["engine"], summary["label_source"]) == ("math", ENGINE, "consensus")
    assert summary["held_out_problems"] == 6
    assert summary["counts"]["skipped_rows"] == 0
    for record in summary["iterations"]:
        assert record["steps_judged_by"] == "head", "nobody checks these steps exactly"
        assert record["prm_f1"] is None
        assert record["unverified"] == 0
        assert record["weight_sync_max_abs_logp_diff"] < 1e-3
        assert record["steps"]["steps_mean"] > 1
        assert 0 <= record["pass@1"] <= 1
    assert "the process-reward head finds right" in (sample / "report.html").read_text()


def test_rollouts_hold_answers_values_and_labels_where_both_sources_agree(sample, recipe):
    rollouts = read_rollouts(sample / "rollouts" / "iteration_0.parquet")
    prm = load_prm(sample / "model", torch.device("cpu"))
    assert {r.label for r in rollouts} == {True, False}
    import math_verify

    golds = {p.question: p.answer for p in math_task.problems("sample", split="train")[0]}
    for r in rollouts:
        question = r.prompt.split("\n\n")[0]
        assert question in golds
        if r.answer is None:
            assert not r.label
        else:
            gold, answer = (math_verify.parse(f"${text}$") for text in (golds[question], r.answer))
            assert r.label == math_verify.verify(gold, answer), (golds[question], r.answer)
        assert "".join(r.steps) == r.completion
        assert len(r.step_values) == len(r.step_probs) == len(r.steps) == len(r.step_ends)
        assert all(0 <= v <= 1 for v in r.step_values)
        assert r.step_values[-1] == float(r.label), "nothing is left to continue from the end"
        assert r.step_labels == consensus(labels_of(r.step_values, recipe), prm.label(r.step_probs))
    assert {x for r in rollouts for x in r.step_labels} >= {1, -1}
    assert any(0 < v < 1 for r in rollouts for v in r.step_values)


def test_training_and_held_out_questions_are_apart(sample):
    held_out = set(pq.read_table(sample / "evaluations" / "iteration_0.parquet")["prompt"].to_pylist())
    used = {r.prompt for path in (sample / "rollouts").glob("*.parquet") for r in read_rollouts(path)}
    assert len(held_out) == 6
    assert not held_out & used
    seed = {r.prompt for r in read_rollouts(sample / "rollouts" / "seed.parquet")}
    assert not seed & {r.prompt for r in read_rollouts(sample / "rollouts" / "iteration_0.parquet")}


def test_metrics_say_how_far_the_sources_agree(sample):
    lines = [json.loads(line) for line in (sample / "metrics.jsonl").read_text().splitlines()]
    (collected,) = [line for line in lines if "agreement/kept" in line]
    assert collected["agreement/kept"] == pytest.approx(collected["step_labels/labelled"])
    counts = [collected[f"agreement/{name}"] for name in ("both_right", "both_wrong")]
    rollouts = read_rollouts(sample / "rollouts" / "iteration_0.parquet")
    assert sum(counts) == sum(x != -1 for r in rollouts for x in r.step_labels)
    summary = json.loads((sample / "summary.json").read_text())
    stored = summary["iterations"][0]["step_label_agreement"]
    assert {f"agreement/{name}": value for name, value in stored.items()}.items() <= collected.items()
    page = (sample / "report.html").read_text()
    assert "The head beside continuations" in page
    assert f"<td>{100 * stored['kept']:.1f}\u202f%</td>" in page
    assert all(line["loss"] is not None and math.isfinite(line["loss"]) for line in lines if "loss" in line)


@pytest.mark.parametrize(
    "settings",
    [
        ["--label_source", "monte_carlo", "--mc_labels", "soft"],
        ["--label_source", "head", "--prm", "{model}"],
    ],
    ids=lambda s: s[1],
)
def test_other_label_sources_start_from_the_trained_model(sample, tmp_path, settings):
    """From the run's own model and head; with continuations alone there is no head, and nobody to judge steps."""
    from stepkto_fast.train import main

    model = str(sample / "model")
    given = [x.format(model=model) for x in settings]
    arguments = [SAMPLE, "--model", model, "--engine", "transformers", "--report_to", "none", "--num_prompts", "3"]
    arguments += ["--num_generations", "2", "--mc_continuations", "2", "--num_eval_generations", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "run"), *given]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    head = settings[1] == "head"
    assert {r["steps_judged_by"] for r in summary["iterations"]} == {"head" if head else None}
    assert (summary["iterations"][0]["step_accuracy"] is None) == (not head)
    for r in read_rollouts(tmp_path / "run" / "rollouts" / "iteration_0.parquet"):
        assert bool(r.step_probs) == head
        assert bool(r.step_values) == (not head)
        assert set(r.step_labels) <= {0, 1}
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("Nobody judged the steps" in page) == (not head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--label_source", "checker"], "task math has no exact checker of steps"),
        (["--label_source", "head", "--prm_labels", "checker"], "set prm_labels to monte_carlo"),
        (["--train_dataset", "gsm9k"], "did you mean 'gsm8k'?"),
        (["--train_dataset", "math-500"], "without a split to train on"),
        (["--prm", "nowhere"], "nowhere"),
        (["--step_style", "regex"], "step_pattern"),
        (["--step_style", "regex", "--step_pattern", "("], "no regular expression"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, capsys, settings, message):
    from stepkto_fast.train import main

    assert main([SAMPLE, "--output_dir", str(tmp_path / "run"), *settings]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()
