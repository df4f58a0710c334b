"""train_prm and eval_prm end to end: a head fitted on generated labels finds first errors on held-out problems."""

import json
import random

import numpy as np
import pytest
import torch

from stepkto_fast import eval_prm, train_prm
from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_policy, build_tokenizer
from stepkto_fast.prm_files import load_prm
from stepkto_fast.rollout import Rollout
from stepkto_fast.tasks import arithmetic
from stepkto_fast.tasks.math import INSTRUCTION
from stepkto_fast.train_prm import PRMTraining, split_problems
from stepkto_fast.warm_start import fine_tune

OPERATIONS = range(2, 5)
TEACHER = arithmetic.Misconceptions.draw("a fallible solver", share=0.3, rate=0.5, slip=0.08)


def worked(rng, problem):
    """A solution with mistakes: its steps, and what the exact checker says of each."""
    steps = arithmetic.demonstration(rng, problem, TEACHER).splitlines()
    return steps, arithmetic.check_steps(problem, steps)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stepwise(rng, problem):
    steps, right = worked(rng, problem)
    outcome = arithmetic.answer_is_right(problem, steps[-1])
    return {"prompt": problem.prompt, "completions": steps, "labels": right, "label": outcome}


def process_bench_row(rng, n, problem):
    steps, right = worked(rng, problem)
    return {
        "id": f"{len(steps) - 1}-{n}", "generator": "a fallible solver", "problem": problem.prompt.strip(),
        "steps": steps, "final_answer_correct": arithmetic.answer_is_right(problem, steps[-1]),
        "label": right.index(False) if False in right else -1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A model with random weights, and the files of a small data set."""
    folder = tmp_path_factory.mktemp("untaught")
    problems = arithmetic.problems(60, "train_prm", "chain", OPERATIONS)
    rng = random.Random(1)
    rows = [stepwise(rng, p) for p in problems for _ in range(2)]
    tokenizer = build_tokenizer([r["prompt"] + "\n".join(r["completions"]) for r in rows])
    model = build_policy(tokenizer, hidden_size=32, layers=1, heads=2, max_length=96, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model"), write_lines(folder / "data.jsonl", rows), rows


def test_a_head_fitted_on_labelled_steps_finds_first_errors_on_held_out_problems(tmp_path, capsys):
    """The whole road: a model that can reckon, labelled rows, train_prm, ProcessBench's format, eval_prm."""
    problems = arithmetic.problems(14000, "train_prm end to end", "chain", OPERATIONS)
    held_out, labelled, taught = problems[:300], problems[300:2300], problems[2300:]
    rng = random.Random(0)
    texts = [arithmetic.demonstration(rng, p) for p in taught]
    tokenizer = build_tokenizer([p.prompt + text for p, text in zip(taught, texts, strict=True)])
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=128, seed=1)
    shown = []
    for n, (p, text) in enumerate(zip(taught, texts, strict=True)):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        shown.append(Rollout(n, 0, p.prompt, tokenizer(p.prompt)["input_ids"], text, ids, [], True, [text], [len(ids)]))
    fine_tune(model, shown, steps=180, batch_size=64, learning_rate=4e-3, seed="0")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    data = write_lines(tmp_path / "labelled.jsonl", [stepwise(rng, p) for p in labelled])
    bench = [process_bench_row(rng, n, p) for n, p in enumerate(held_out)]

    words = ["--model", str(folder), "--data", data, "--output_dir", str(folder), "--prm_epochs", "6"]
    assert train_prm.main(words) == 0, capsys.readouterr().err
    assert "balanced accuracy" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == before
    assert not (folder / "prm_trunk").exists(), "the model beside the head is its trunk"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["counts"]["rows"] == metrics["counts"]["completions"] == 2000
    assert metrics["held_out"]["f1"] > 0.75
    assert metrics["held_out"]["majority"]["f1"] == 0
    assert metrics["held_out"]["ece"] < 0.05

    words = ["--prm", str(folder), "--data", write_lines(tmp_path / "bench.jsonl", bench)]
    assert eval_prm.main(words) == 0, capsys.readouterr().err
    figures = json.loads((folder / "prm_evaluation.json").read_text())
    assert set(figures["subsets"]) == {str(n) for n in OPERATIONS}
    assert sum(f["erroneous"] + f["correct"] for f in figures["subsets"].values()) == 300
    assert figures["average"]["f1"] >= 0.8
    assert figures["average"]["step_auroc"] > 0.95


def test_a_trained_trunk_is_stored_and_exported(untaught, tmp_path, capsys):
    model, data, _ = untaught
    out, export = tmp_path / "prm", tmp_path / "export"
    settings = tmp_path / "prm.yaml"
    settings.write_text("prm_pooling: last\nprm_trunk: trained\nprm_trunk_learning_rate: 1.0e-3\nprm_epochs: 2\n")
    words = [str(settings), "--model", model, "--data", data, "--output_dir", str(out), "--export", str(export)]
    assert train_prm.main(words) == 0, capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {
        "metrics.json", "prm_config.json", "prm_head", "prm_trunk",
    }  # fmt: skip
    prm = load_prm(out, torch.device("cpu"))
    untrained = build_policy(
        train_prm.load_policy(model)[1], hidden_size=32, layers=1, heads=2, max_length=96, seed=0
    ).state_dict()
    assert any(not torch.equal(untrained[k], v) for k, v in prm.trunk.state_dict().items())
    assert json.loads((export / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]
    assert train_prm.main(words) == 1
    assert "already holds a PRM" in capsys.readouterr().err
    assert train_prm.main([*words, "--overwrite", "true"]) == 0
    again = load_prm(out, torch.device("cpu"))
    one, other = prm.head.state_dict(), again.head.state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one), "the same settings give the same head"


def test_bad_rows_are_counted_and_the_others_go_on(untaught, tmp_path, capsys):
    model, _, rows = untaught
    bad = [{**rows[0], "labels": [True]}, {"prompt": "Compute left to right, modulo 10: 1 + 1\n"}]
    unlabelled = {**rows[1], "labels": [None] * len(rows[1]["labels"])}
    within = {"prompt": "Compute left to righ", "completions": ["t,"], "labels": [None]}
    long = {**rows[0], "prompt": rows[0]["prompt"] * 20}
    data = write_lines(tmp_path / "data.jsonl", [*rows, *bad, unlabelled, within, long])
    words = ["--model", model, "--data", data, "--output_dir", str(tmp_path / "prm"), "--prm_epochs", "1"]
    assert train_prm.main([*words, "--data_format", "stepwise"]) == 0
    said = capsys.readouterr().out
    assert f"data.jsonl:{len(rows) + 1}" in said
    assert f"data.jsonl:{len(rows) + 2}" in said
    assert f"data.jsonl:{len(rows) + 5}" in said
    assert "note: prompts that are tokenised otherwise" in said
    assert f"the first in {data}:{len(rows) + 4}. What differs" in said
    assert "0 cut at max_length" in said
    counts = json.loads((tmp_path / "prm" / "metrics.json").read_text())["counts"]
    assert counts["rows"] == len(rows) + 5
    assert counts["skipped_rows"] == 2
    assert counts["completions"] == len(rows) + 2
    assert counts["skipped_completions"] == 1
    assert counts["completions_without_labels"] == 2
    assert counts["right_steps"] == sum(x for row in rows for x in row["labels"])
    assert counts["unlabelled_steps"] == len(rows[1]["labels"]) + 1


@pytest.mark.parametrize(
    "words", [{}, {"task": "math"}, {"task": "math", "instruction": "1 + 1", "system_prompt": "2"}]
)
def test_questions_are_asked_as_the_task_asks_them(untaught, tmp_path, monkeypatch, words):
    model, _, rows = untaught
    data = write_lines(
        tmp_path / "data.jsonl", [{**rows[0], "prompt": [{"role": "user", "content": "3 + 4"}]}, rows[1]]
    )
    seen = []
    monkeypatch.setattr(train_prm, "labelled_rollouts", lambda rows, *a, **k: seen.extend(rows) or ([], []))
    with pytest.raises(RunError, match="labelled steps for 0 different prompts"):
        train_prm.train_prm(PRMTraining(model=model, data=data, output_dir=str(tmp_path / "prm"), **words))
    asked = [{"role": "user", "content": "3 + 4"}]
    if words:
        instruction = words.get("instruction", INSTRUCTION)
        asked = ("2\n\n" if "system_prompt" in words else "") + f"3 + 4\n\n{instruction}\n"
    assert [row["prompt"] for row in seen] == [asked, rows[1]["prompt"]]


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.3, 0.2)])
def test_no_problem_is_in_two_parts(shares):
    def rollout(problem, sample):
        r = Rollout(problem, sample, "p", [1], "c", [2], [], True, step_ends=[1], step_labels=[sample % 2])
        r.step_labels = [-1] if problem == 7 else r.step_labels
        return r

    rollouts = [rollout(problem, sample) for problem in range(40) for sample in range(3)]
    settings = PRMTraining(model="m", data="d", calibration_share=shares[0], test_share=shares[1])
    fit, calibrate, measure = ({r.problem_id for r in part} for part in split_problems(rollouts, settings))
    assert sorted([*fit, *calibrate, *measure]) == [n for n in range(40) if n != 7]
    assert (len(calibrate), len(measure)) == tuple(round(share * 39) for share in shares)
    other = split_problems(rollouts, PRMTraining(model="m", data="d", seed=1))
    assert {r.problem_id for r in other[1]} != calibrate


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "x"], "model is missing"),
        (["--model", "x"], "data is missing"),
        (["--model", "x", "--data", "x", "--prm_pool", "last"], "did you mean 'prm_pooling'"),
        (["--model", "x", "--data", "x", "--export", "there"], "fit one with prm_pooling last"),
        (["--model", "x", "--data", "x", "--test_share", "0.5"], "test_share is 0.5"),
        (["--model", "x", "--data", "x", "--prm_epochs", "0"], "prm_epochs is 0"),
        (["--model", "x", "--data", "x", "--temperature", "0"], "temperature is 0.0"),
        (["--model", "x", "--data", "x", "--system_prompt", "Add."], "system_prompt is set, but task is arithmetic"),
        (["--model", "/nowhere", "--data", "x", "--device", "cpu"], "/nowhere"),
    ],
)
def test_wrong_settings_are_one_line(words, complaint, capsys):
    assert train_prm.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error


def test_one_class_or_too_few_problems_are_refused(untaught, tmp_path):
    model, _, rows = untaught
    right = [row for row in rows if all(row["labels"])]

    def refused(rows, words):
        data = write_lines(tmp_path / "data.jsonl", rows)
        with pytest.raises(RunError, match=words):
            train_prm.train_prm(PRMTraining(model=model, data=data, output_dir=str(tmp_path / "prm"), prm_epochs=1))

    refused(rows[:6], "3 different prompts: give at least 10")
    refused(right, "and 0 wrong steps, and needs both")
    assert not (tmp_path / "prm").exists()


def test_held_out_figures_are_those_of_the_saved_head(untaught, tmp_path):
    model, data, _ = untaught
    settings = PRMTraining(model=model, data=data, output_dir=str(tmp_path), prm_epochs=1, test_share=0.3)
    metrics = train_prm.train_prm(settings)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    view = metrics["held_out"]
    prm = load_prm(tmp_path, torch.device("cpu"))
    assert view["threshold"] == float(prm.head.threshold)
    _, tokenizer = train_prm.load_policy(model)
    rollouts, complaints = train_prm.labelled_rollouts(train_prm.read_labelled(data).rows, tokenizer)
    assert not complaints
    part = split_problems(rollouts, settings)[2]
    scores = np.concatenate(prm.score(part, settings))
    right = np.concatenate([r.step_labels for r in part]) == 1
    assert (view["right_steps"], view["wrong_steps"]) == (right.sum(), (~right).sum())
    assert view["accuracy"] == pytest.approx(((scores >= view["threshold"]) == right).mean())
