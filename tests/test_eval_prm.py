"""eval_prm: subsets, counts, thresholds and undefined figures, against the head's own scores."""

import json
import random

import numpy as np
import pytest
import torch

from stepkto_fast import eval_prm
from stepkto_fast.eval_prm import PRMEvaluation
from stepkto_fast.labelled import labelled_rollouts
from stepkto_fast.prm import PRM
from stepkto_fast.prm_files import save_prm
from stepkto_fast.prm_head import LastTokenHead
from stepkto_fast.tasks import arithmetic


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A PRM with random weights, spread so that some steps are called right and some wrong."""
    torch.manual_seed(7)
    head = LastTokenHead(model.config.hidden_size)
    with torch.no_grad():
        head.out.weight.normal_(std=0.5)
        head.threshold.fill_(0.1)
    save_prm(PRM(model, head, 1.0), tmp_path / "prm", tokenizer)
    return tmp_path / "prm"


def rows_of(rollouts):
    """The rollouts as stepwise rows in three subsets: with mistakes and without, without, and with."""
    rows = []
    for n, r in enumerate(rollouts):
        flawed = 0 in r.step_labels
        steps = [s.strip() for s in r.steps]
        labels = [None if 0 in r.step_labels[:k] else bool(x) for k, x in enumerate(r.step_labels)]
        subset = "mixed" if n % 2 else "flawed" if flawed else "clean"
        rows.append({"prompt": r.prompt, "completions": steps, "labels": labels, "subset": subset})
    return rows


def evaluated(folder, path, rows, *words):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = path.with_suffix(".figures")
    assert eval_prm.main(["--prm", str(folder), "--data", str(path), "--output_file", str(output), *words]) == 0
    return json.loads(output.read_text())


def test_figures_are_those_of_the_heads_scores(folder, rollouts, tokenizer, tmp_path, capsys):
    rows = rows_of(rollouts)
    found = evaluated(folder, tmp_path / "rows.jsonl", rows)
    prm, _ = eval_prm.load_prm_and_tokenizer(folder, torch.device("cpu"))
    asked, _ = labelled_rollouts(rows, tokenizer)
    kinds = {}
    for row, scores in zip(rows, prm.score(asked, PRMEvaluation(prm="p", data="d")), strict=True):
        said = next((n for n, p in enumerate(scores) if p < 0.1), -1)
        truth = row["labels"].index(False) if False in row["labels"] else -1
        kinds.setdefault(row["subset"], {"error": [], "correct": []})["correct" if truth == -1 else "error"].append(
            said == truth
        )
    assert set(found["subsets"]) == set(kinds) == {"mixed", "flawed", "clean"}
    for name, kind in kinds.items():
        for which, hits in kind.items():
            expected = pytest.approx(np.mean(hits)) if hits else None
            assert found["subsets"][name][f"{which}_accuracy"] == expected
    mixed = found["subsets"]["mixed"]
    assert 0 < mixed["f1"] < 1, "the test can tell"
    assert mixed["f1"] == pytest.approx(
        2 * mixed["error_accuracy"] * mixed["correct_accuracy"] / (mixed["error_accuracy"] + mixed["correct_accuracy"])
    )
    for alone, missing in (("flawed", "correct_accuracy"), ("clean", "error_accuracy")):
        assert found["subsets"][alone][missing] is None
        assert found["subsets"][alone]["f1"] is None
    assert found["average"]["f1"] == mixed["f1"], "over the subsets where it is defined"
    assert found["subsets"]["clean"]["step_auroc"] is None
    assert sum(f["wrong_steps"] for f in found["subsets"].values()) == sum(row["labels"].count(False) for row in rows)
    table = capsys.readouterr().out
    assert "average" in table
    assert f"{mixed['f1']:.3f}" in table


def test_the_threshold_decides(folder, rollouts, tmp_path):
    rows = rows_of(rollouts)
    nothing = evaluated(folder, tmp_path / "rows.jsonl", rows, "--threshold", "0")["subsets"]["mixed"]
    assert (nothing["error_accuracy"], nothing["correct_accuracy"], nothing["f1"]) == (0, 1, 0)
    all_wrong = evaluated(folder, tmp_path / "rows.jsonl", rows, "--threshold", "1")["subsets"]["mixed"]
    assert all_wrong["correct_accuracy"] == 0
    firsts = [row["labels"].index(False) for row in rows if row["subset"] == "mixed" and False in row["labels"]]
    assert all_wrong["error_accuracy"] == pytest.approx(firsts.count(0) / len(firsts))


def test_rows_that_do_not_tell_are_counted(folder, rollouts, tmp_path, capsys):
    rows = rows_of(rollouts)
    hidden = {**rows[0], "labels": [None] * len(rows[0]["labels"])}
    bad = {**rows[0], "labels": [True]}
    found = evaluated(folder, tmp_path / "rows.jsonl", [*rows, hidden, bad], "--data_format", "stepwise")
    assert found["counts"]["rows"] == len(rows) + 2
    assert found["counts"]["skipped_rows"] == 1
    assert found["counts"]["first_error_unknown"] == 1
    assert f"rows.jsonl:{len(rows) + 2}" in capsys.readouterr().out
    long = {**rows[0], "prompt": rows[0]["prompt"] * 20}
    counts = evaluated(folder, tmp_path / "rows.jsonl", [*rows, long])["counts"]
    assert (counts["skipped_rows"], counts["completions"], counts["skipped_completions"]) == (0, len(rows), 1)


@pytest.mark.parametrize("words", [[], ["--task", "math", "--instruction", "1 + 1", "--system_prompt", "2 + 2"]])
def test_questions_are_asked_as_in_training(folder, rollouts, tmp_path, monkeypatch, words):
    seen = []
    monkeypatch.setattr(eval_prm, "labelled_rollouts", lambda rows, *a, **k: seen.extend(rows) or ([], []))
    row = {**rows_of(rollouts)[0], "prompt": [{"role": "user", "content": "3 + 4"}]}
    evaluated(folder, tmp_path / "rows.jsonl", [row, {**row, "prompt": "a text"}], *words)
    asked = "2 + 2\n\n3 + 4\n\n1 + 1\n" if words else [{"role": "user", "content": "3 + 4"}]
    assert [row["prompt"] for row in seen] == [asked, "a text"]


def test_a_head_that_is_not_calibrated_and_prompts_that_end_within_a_token_are_told(
    folder, model, tokenizer, rollouts, tmp_path, capsys
):
    row = {"prompt": "Compute left to righ", "completions": ["t,", "1 + 1"], "labels": [True, False]}
    evaluated(folder, tmp_path / "rows.jsonl", [row])
    said = capsys.readouterr().out
    assert "note: prompts that are tokenised otherwise" in said
    assert "calibrated" not in said
    save_prm(PRM(model, LastTokenHead(model.config.hidden_size), 1.0, calibrated=False), folder, tokenizer)
    evaluated(folder, tmp_path / "rows.jsonl", rows_of(rollouts))
    said = capsys.readouterr().out
    assert "warning: this head could not be calibrated" in said
    assert "note" not in said


def test_cut_completions_count_only_where_the_error_is_left(folder, rollouts, tmp_path, capsys):
    row = next(row for row in rows_of(rollouts) if False not in row["labels"] and len(row["labels"]) > 2)
    early = {**row, "labels": [False] + [None] * (len(row["labels"]) - 1)}
    length = len(rollouts[0].prompt_ids)
    whole = evaluated(folder, tmp_path / "rows.jsonl", [row, early])
    assert whole["counts"]["completions_cut"] == 0
    cut = evaluated(folder, tmp_path / "rows.jsonl", [row, early], "--max_length", str(length + 24))
    assert cut["counts"] == {
        "rows": 2, "skipped_rows": 0, "completions": 2, "skipped_completions": 0, "completions_cut": 2,
        "first_error_unknown": 1,
    }  # fmt: skip
    assert "2 cut at max_length" in capsys.readouterr().out
    (figures,) = cut["subsets"].values()
    assert (figures["erroneous"], figures["correct"]) == (1, 0)


def test_process_benchs_splits_are_subsets(folder, problems, tmp_path):
    """Without ids, a row belongs to the subset that is its split."""
    data = tmp_path / "bench"
    data.mkdir()
    for n, split in enumerate(("train", "test")):
        steps = arithmetic.demonstration(random.Random(0), problems[n]).splitlines()
        row = {"problem": problems[n].prompt.strip(), "steps": steps, "final_answer_correct": True, "label": -1}
        (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--prm", str(folder), "--data", str(data), "--splits", "train, test"]
    assert eval_prm.main(words) == 0
    found = json.loads((folder / "prm_evaluation.json").read_text())
    assert set(found["subsets"]) == {"train", "test"}
    assert [f["correct"] for f in found["subsets"].values()] == [1, 1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "x"], "prm is missing"),
        (["--prm", "x"], "data is missing"),
        (["--prm", "/nowhere", "--data", "x"], "'/nowhere' holds no PRM"),
        (["--prm", "x", "--data", "x", "--threshold", "2"], "threshold is 2.0"),
        (["--prm", "x", "--data", "x", "--split", "gsm8k"], "did you mean 'splits'"),
        (["--prm", "x", "--data", "x", "--instruction", "Go."], "instruction is set, but task is arithmetic"),
    ],
)
def test_wrong_settings_are_one_line(words, complaint, capsys):
    assert eval_prm.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
