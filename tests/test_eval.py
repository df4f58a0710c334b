"""The evaluation command: its figures by hand, its files, who judges steps, and what it says of mistakes."""

import json
import random

import pyarrow.parquet as pq
import pytest
import torch

from stepkto_fast import eval as evaluation_command
from stepkto_fast.eval import EvalSettings, main
from stepkto_fast.policy import build_byte_tokenizer, build_policy
from stepkto_fast.prm import PRM
from stepkto_fast.prm_files import save_prm
from stepkto_fast.prm_head import AttentionHead
from stepkto_fast.rollout import read_rollouts
from stepkto_fast.sampler import Sample
from stepkto_fast.tasks import arithmetic, math


class Scripted:
    """A sampler whose completions are known: `greedy` one text a problem, `samples` a list of texts a problem."""

    name = "scripted"

    def __init__(self, tokenizer, greedy, samples):
        self._tokenizer, self._greedy, self._samples = tokenizer, greedy, samples

    def sample(self, prompts, *, n, temperature, max_tokens, seed, on_progress):
        assert len(prompts) == len(self._greedy)
        texts = self._samples if temperature else [[text] for text in self._greedy]
        assert {len(group) for group in texts} == {n}
        return [[self._drawn(text, max_tokens) for text in group] for group in texts]

    def _drawn(self, text, max_tokens):
        ids = [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return Sample(ids[:max_tokens], [-0.5] * len(ids[:max_tokens]), finished=len(ids) <= max_tokens)


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(folder, model, *more):
    return ["--model", str(model), "--output_dir", str(folder), "--engine", "transformers", "--device", "cpu", *more]


def evaluated(folder, model, *more):
    assert main(arguments(folder, model, *more)) == 0
    return json.loads((folder / "eval.json").read_text())


FOUR_PROBLEMS = ["--num_test_problems", "4", "--min_operations", "2", "--max_operations", "3", "--context_length", "96"]


@pytest.fixture
def four():
    """The problems of FOUR_PROBLEMS, and of each a right solution, one with a wrong step, one with a wrong answer."""
    asked = arithmetic.problems(4, "test", "chain", range(2, 4))
    right = [arithmetic.demonstration(random.Random(0), p) for p in asked]
    wrong = [
        text.replace(f"{{ {p.answer} }}", f"{{ {(p.answer + 1) % 10} }}") for text, p in zip(right, asked, strict=True)
    ]
    flawed = [text.replace("Step 2:", "Step 1:") for text in right]
    return asked, right, flawed, wrong


def test_figures_by_hand(four, saved, tokenizer, tmp_path, monkeypatch, capsys):
    asked, right, flawed, wrong = four
    greedy = [right[0], flawed[1], wrong[2], "Step 1: 3"]
    samples = [
        [right[0]] * 4,
        [right[1], wrong[1], wrong[1], right[1]],  # a tie, right first
        [wrong[2], right[2], wrong[2], wrong[2]],
        ["Step 1: 3"] * 4,
    ]
    monkeypatch.setattr(evaluation_command, "open_sampler", lambda *_: Scripted(tokenizer, greedy, samples))
    found = evaluated(tmp_path / "out", saved, "--num_eval_generations", "4", *FOUR_PROBLEMS)
    values = {name: result["value"] for name, result in found["metrics"].items()}
    steps = [arithmetic.check_steps(p, text.splitlines()) for p, text in zip(asked, greedy, strict=True)]
    assert values == {
        "greedy_pass@1": 2 / 4,
        "pass@1": 7 / 16,
        "pass@2": pytest.approx((1 + 5 / 6 + 1 / 2) / 4),
        "pass@4": 3 / 4,
        "maj@4": 2 / 4,
        "flawed_correct": 1 / 2,
        "step_accuracy": pytest.approx(sum(map(sum, steps)) / sum(map(len, steps))),
    }
    assert 0 < values["step_accuracy"] < 1
    for name, result in found["metrics"].items():
        assert 0 <= result["low"] <= result["value"] <= result["high"] <= 1, name
    assert found["metrics"]["greedy_pass@1"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert (found["problems"], found["engine"], found["steps_judged_by"]) == (4, "scripted", "checker")
    assert found["samples"]["per_problem"] == 4
    assert (found["samples"]["without_answer"], found["samples"]["unverified"]) == (4 / 16, 0)
    assert found["greedy"]["completion_length"] == sum(len(tokenizer(t)["input_ids"]) + 1 for t in greedy) / 4
    assert found["greedy"]["steps"]["steps"] == sum(map(len, steps))
    assert found["settings"]["num_test_problems"] == 4

    table = pq.read_table(tmp_path / "out" / "greedy.parquet").to_pylist()
    assert [row["label"] for row in table] == [True, True, False, False]
    stored = read_rollouts(tmp_path / "out" / "samples.parquet")
    assert [r.completion for r in stored] == [text for group in samples for text in group]
    said = capsys.readouterr().out
    assert "Pass@2 from 4 samples" in said
    assert "58.3%" in said
    assert "steps are not judged" not in said


def test_a_model_evaluates_to_the_same_figures_again(saved, tmp_path, capsys):
    """transformers' generate on random weights: nothing is right, so flawed_correct has no value."""
    settings = ["--num_eval_generations", "3", "--max_completion_length", "12", *FOUR_PROBLEMS]
    first = evaluated(tmp_path / "one", saved, *settings)
    second = evaluated(tmp_path / "two", saved, *settings)
    for found in (first, second):
        del found["seconds"], found["settings"]
    assert first == second
    assert first["engine"] == "transformers"
    assert list(first["metrics"]) == [
        "greedy_pass@1", "pass@1", "pass@2", "pass@3", "maj@3", "flawed_correct", "step_accuracy",
    ]  # fmt: skip
    assert first["metrics"]["flawed_correct"] == {"value": None, "low": None, "high": None}
    assert first["greedy"]["truncated"] == 1.0
    assert "cut at max_completion_length (12 tokens)" in capsys.readouterr().out
    drawn = [read_rollouts(tmp_path / name / "samples.parquet") for name in ("one", "two")]
    assert [r.completion_ids for r in drawn[0]] == [r.completion_ids for r in drawn[1]]
    assert len({tuple(r.completion_ids) for r in drawn[0]}) > 4, "samples are not greedy"


def test_mathematics_is_judged_by_answers_and_by_the_prm_beside_the_model(tmp_path, monkeypatch, capsys):
    """Without a PRM nobody judges steps, and the results say why."""
    problems, _ = math.problems("sample", purpose="test")
    problems = problems[:2]
    tokenizer = build_byte_tokenizer([p.question for p in problems])
    model = build_policy(tokenizer, hidden_size=16, layers=1, heads=1, max_length=2048, seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    greedy = [f"Step 1: a\nStep 2: so \\boxed{{{p.answer}}}" for p in problems]
    samples = [[f"so \\boxed{{{p.answer}}}", "\\boxed{-123}"] for p in problems]
    monkeypatch.setattr(evaluation_command, "open_sampler", lambda *_: Scripted(tokenizer, greedy, samples))
    settings = [
        "--task", "math", "--num_test_problems", "2", "--num_eval_generations", "2", "--context_length", "2048",
        "--max_completion_length", "128", "--step_style", "step", "--answer_workers", "1",
    ]  # fmt: skip
    found = evaluated(tmp_path / "one", tmp_path / "model", *settings)
    values = {name: result["value"] for name, result in found["metrics"].items()}
    assert values == {
        "greedy_pass@1": 1.0, "pass@1": 0.5, "pass@2": 1.0, "maj@2": 1.0, "flawed_correct": None, "step_accuracy": None,
    }  # fmt: skip
    assert found["steps_judged_by"] is None
    assert "no exact checker of steps and no PRM lies beside" in found["steps_not_judged_because"]
    assert "steps are not judged: task math has" in capsys.readouterr().out
    assert found["greedy"]["steps"]["steps"] == 4

    torch.manual_seed(0)
    head = AttentionHead(16)
    head.threshold.fill_(2.0)  # above every probability: all steps are wrong
    save_prm(PRM(model, head, 1.0), tmp_path / "model", tokenizer, beside=model)
    weights = [path.name for path in (tmp_path / "model").glob("*.safetensors")]
    assert weights == ["model.safetensors"], "vLLM would take any other for weights of the model"
    found = evaluated(tmp_path / "two", tmp_path / "model", *settings)
    assert (found["steps_judged_by"], found["steps_not_judged_because"]) == ("head", None)
    assert found["metrics"]["flawed_correct"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["metrics"]["step_accuracy"]["value"] == 0.0


def test_problems_of_a_file_are_counted_and_bad_rows_named(four, saved, tokenizer, tmp_path, monkeypatch, capsys):
    asked, right, _, _ = four
    rows = [{"prompt": p.prompt} for p in (asked[0], asked[0], *asked[1:])]
    path = tmp_path / "held_out.jsonl"
    path.write_text("nonsense\n" + "".join(json.dumps(row) + "\n" for row in rows))
    scripted = Scripted(tokenizer, right[:3], [[t] for t in right[:3]])
    monkeypatch.setattr(evaluation_command, "open_sampler", lambda *_: scripted)
    settings = ["--num_eval_generations", "1", *FOUR_PROBLEMS, "--num_test_problems", "3", "--test_dataset", str(path)]
    found = evaluated(tmp_path / "out", saved, *settings)
    assert (found["problems"], found["skipped_rows"], found["skipped_prompts"]) == (3, 1, 0)
    assert found["metrics"]["pass@1"]["value"] == 1.0
    assert "held_out.jsonl:1" in capsys.readouterr().out


def test_what_is_there_is_replaced_only_when_asked(four, saved, tokenizer, tmp_path, monkeypatch, capsys):
    _, right, flawed, _ = four
    monkeypatch.setattr(evaluation_command, "open_sampler", lambda *_: Scripted(tokenizer, right, [[t] for t in right]))
    settings = ["--num_eval_generations", "1", *FOUR_PROBLEMS]
    assert evaluated(tmp_path, saved, *settings)["metrics"]["flawed_correct"]["value"] == 0.0
    monkeypatch.setattr(
        evaluation_command, "open_sampler", lambda *_: Scripted(tokenizer, flawed, [[t] for t in right])
    )
    assert main(arguments(tmp_path, saved, *settings)) == 1
    assert "eval.json exists: --overwrite true replaces it" in capsys.readouterr().err
    assert evaluated(tmp_path, saved, "--overwrite", "true", *settings)["metrics"]["flawed_correct"]["value"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is not set: give --model"),
        (["--modell", "x"], "unknown option --modell; did you mean 'model'?"),
        (["--model", "."], "has no config.json"),
        (["--model", ".", "--step_style", "regex", "--step_pattern", "("], "step_pattern '(' is no regular expression"),
        (["--model", ".", "--test_dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", ".", "--device", "nothing"], "device 'nothing' is not available"),
        (["nothing.yaml"], "recipe file 'nothing.yaml' does not exist"),
    ],
)
def test_what_the_user_can_mend_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_results_lie_under_the_names_of_model_and_problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(**settings):
        return EvalSettings(**settings).folder().as_posix()

    assert folder(model="runs/demo/model") == "runs/eval/demo-model/arithmetic"
    assert folder(model="org/name-1.5B", test_dataset="org/set-1.5") == "runs/eval/org-name-1.5B/set-1.5"
    assert folder(model="runs/demo/model", output_dir="here") == "here"
