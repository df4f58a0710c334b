"""Offline training: a labelled dataset in, a trained model out, with no sampler anywhere."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stepkto_fast.objective import log_probs
from stepkto_fast.policy import load_policy
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts
from stepkto_fast.run_directory import save_pretrained
from stepkto_fast.train import main


def row(r, **changes):
    steps = [step.rstrip("\n") for step in r.steps]
    return {
        "prompt": r.prompt, "completions": steps, "labels": [bool(x) for x in r.checker_labels], "label": r.label,
        **changes,
    }  # fmt: skip


@pytest.fixture
def data(tmp_path, model, tokenizer, rollouts):
    """A model directory and a JSONL file of two completions for each of 12 prompts."""
    save_pretrained(model, tokenizer, tmp_path / "m0")
    path = tmp_path / "rows.jsonl"
    # The first and the eleventh prompt are held out: one with a right completion and one with a wrong one.
    by_prompt = [rollouts[n : n + 2] for n in range(0, len(rollouts), 2)]
    by_prompt.sort(key=lambda pair: -sum(r.label for r in pair))
    by_prompt.insert(10, by_prompt.pop())
    path.write_text("".join(json.dumps(row(r)) + "\n" for pair in by_prompt for r in pair))
    return tmp_path / "m0", path


def arguments(data, folder, *more):
    m0, path = data
    return [
        "--label_source", "dataset", "--labelled_dataset", str(path), "--model", str(m0), "--output_dir", str(folder),
        "--report_to", "none", "--train_batch_size", "5", "--warmup_steps", "0", "--learning_rate", "3e-3",
        "--num_train_epochs", "6", "--context_length", "96", *more,
    ]  # fmt: skip


def test_a_labelled_dataset_trains_a_model(tmp_path, data, rollouts, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would be an error
    folder = tmp_path / "run"
    assert main(arguments(data, folder)) == 0
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["iterations"]
    assert (before["auroc"], before["step_auroc"]) == (0.5, 0.5), "M_0 is its own reference"
    training = read_rollouts(folder / "rollouts" / "iteration_0.parquet")
    held_out = read_rollouts(folder / "rollouts" / "held_out.parquet")
    assert after["held_out_completions"] == len(held_out) == 4
    assert not {r.prompt for r in training} & {r.prompt for r in held_out}
    given = {(r.prompt, r.completion): r for r in rollouts}
    for r in training + held_out:
        same = given[r.prompt, r.completion]
        assert (r.completion_ids, r.step_ends) == (same.completion_ids, same.step_ends)
        assert (r.step_labels, r.label) == (same.checker_labels, same.label)
    trained, _ = load_policy(str(folder / "model"))
    ratios = [
        (float((logp - torch.tensor(r.ref_logps)).sum()), r.label)
        for r, logp in zip(training, log_probs(trained, training, Recipe()), strict=True)
    ]
    right, wrong = ([d for d, label in ratios if label is which] for which in (True, False))
    assert sum(right) / len(right) > sum(wrong) / len(wrong) + 1, "what it was trained on is told apart, in nats"
    page = (folder / "report.html").read_text()
    assert "training on a dataset of labelled solutions" in page
    assert "AUROC" in page
    assert "chance alone moves it by up to" in page
    assert "process-reward head" not in page, "sections on what an offline run does not have"
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size


@pytest.mark.parametrize("more", [(), ("--lora_rank", "4"), ("--reference_points", "exact")], ids=str)
def test_an_interrupted_update_resumes_to_the_same_weights(tmp_path, data, interrupt_update, more):
    if more[:1] == ("--lora_rank",):
        pytest.importorskip("peft", reason="peft is not installed")
    more = (*more, "--save_steps", "2", "--num_train_epochs", "1")
    assert main(arguments(data, tmp_path / "whole", *more)) == 0
    interrupt_update(4)
    assert main(arguments(data, tmp_path / "cut", *more)) == 130
    (saved,) = (tmp_path / "cut" / "checkpoints").glob("iteration_0_step_2")
    names = set(load_file(saved / "model.safetensors"))
    assert all("lora_" in name for name in names) == ("--lora_rank" in more), "only what is trained is saved"
    assert main(arguments(data, tmp_path / "cut", *more, "--resume", "true")) == 0
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    records = [json.loads((tmp_path / name / "summary.json").read_text())["iterations"] for name in ("whole", "cut")]
    assert records[0] == records[1]


def test_bad_rows_are_named_and_counted_and_the_others_train(tmp_path, data, rollouts, capsys):
    _, path = data
    good = path.read_text().splitlines()
    bad = [
        json.dumps(row(rollouts[0], labels=[True])),
        json.dumps({k: v for k, v in row(rollouts[1]).items() if k != "label"}),
        "not json",
    ]
    path.write_bytes(("\n".join([*good, *bad]) + "\n").encode() + b'{"prompt": "\xff"}\n')
    assert main(arguments(data, tmp_path / "run", "--num_train_epochs", "1")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"skipped {path}:{len(good) + 1}" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["counts"]["skipped_rows"] == 4, "three bad rows, and one without an outcome"
    assert len(read_rollouts(tmp_path / "run" / "rollouts" / "iteration_0.parquet")) == len(good) - 4


def test_unpaired_completions_train_on_outcomes_alone(tmp_path, data, rollouts):
    """TRL's unpaired preference: nobody labelled a step, so nothing is said of steps."""
    _, path = data
    rows = [{"prompt": r.prompt, "completion": r.completion, "label": r.label} for r in rollouts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(data, tmp_path / "run", "--num_train_epochs", "1")) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"][1]
    assert after["step_auroc"] is None
    for r in read_rollouts(tmp_path / "run" / "rollouts" / "iteration_0.parquet"):
        assert set(r.step_labels) == {-1}
        assert len(r.step_ends) == r.completion.count("\n") + 1, "cut into lines all the same"


def test_prompts_without_an_outcome_do_not_use_up_the_held_out_ones(tmp_path, data, rollouts):
    """The first and every tenth prompt lack an outcome: others are held out."""
    _, path = data
    rows = [row(r) for r in rollouts]
    for made, r in zip(rows, rollouts, strict=True):
        if r.problem_id % 10 == 0:
            del made["label"]
    path.write_text("".join(json.dumps(made) + "\n" for made in rows))
    assert main(arguments(data, tmp_path / "run", "--num_train_epochs", "1")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["counts"]["skipped_rows"] == sum("label" not in made for made in rows) == 4
    assert len({r.prompt for r in read_rollouts(tmp_path / "run" / "rollouts" / "held_out.parquet")}) == 1


def test_a_completion_that_is_cut_off_is_left_out_with_its_outcome(tmp_path, data, rollouts, capsys):
    longest = max(len(r) for r in rollouts)
    too_long = sum(len(r) == longest for r in rollouts)
    given = arguments(data, tmp_path / "run", "--num_train_epochs", "1", "--context_length", str(longest - 1))
    assert main(given) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["counts"]["skipped_rows"] == too_long
    assert f"longer than context_length ({longest - 1} tokens)" in " ".join(capsys.readouterr().out.split())
    kept = [
        r
        for name in ("iteration_0", "held_out")
        for r in read_rollouts(tmp_path / "run" / "rollouts" / f"{name}.parquet")
    ]
    assert len(kept) == len(rollouts) - too_long
    assert all(r.finished for r in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model"], "label_source dataset trains a given model"),
        (["--labelled_dataset"], "offline training takes both"),
        (["--labelled_dataset", "none.jsonl"], "none.jsonl does not exist"),
        (["--labelled_format", "prm800k"], "prm800k"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_missing_is_said_and_nothing_is_written(tmp_path, data, capsys, changes, message):
    given = arguments(data, tmp_path / "run")
    if len(changes) == 1:
        at = given.index(changes[0])
        given = given[:at] + given[at + 2 :]
    else:
        given += changes
    assert main(given) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "run").exists()


def test_one_prompt_alone_leaves_nothing_to_hold_out(tmp_path, data, rollouts, capsys):
    _, path = data
    path.write_text("".join(json.dumps(row(r)) + "\n" for r in rollouts[:2]))
    assert main(arguments(data, tmp_path / "run")) == 1
    assert "give at least two" in capsys.readouterr().err
