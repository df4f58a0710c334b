"""The loop end to end, as a stranger runs it: the command line, its files, its errors, kill and resume."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepkto_fast.prm_files import load_prm
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
ENGINE = "vllm" if importlib.util.find_spec("vllm") else "transformers"
# Shorter still than the smoke recipe, for the runs that are not about learning or vLLM.
TINY = [
    "--engine", "transformers", "--num_prompts", "8", "--num_test_problems", "10", "--warm_start_steps", "80",
    "--iterations", "1", "--prm_seed_problems", "10", "--report_to", "none",
]  # fmt: skip

pytestmark = pytest.mark.loop


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stepkto_fast.train", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=500, cwd=ROOT)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second", "phase_seconds")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """One undisturbed run of the smoke recipe with the best engine of this machine."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = run(SMOKE, "--output_dir", str(folder), "--seed", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_summary_says_what_it_must(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    assert (summary["recipe"], summary["engine"], summary["seed"]) == ("smoke", ENGINE, 1)
    assert summary["seconds"] > 0
    assert set(summary["tokens_per_second"]) == {"rollout", "train"}
    assert min(summary["tokens_per_second"].values()) > 0
    assert [r["iteration"] for r in summary["iterations"]] == [0, 1, 2]
    for record in summary["iterations"]:
        for key in ("pass@1", "maj@8", "flawed_correct", "step_accuracy", "prm_f1"):
            assert record[key] is None or 0 <= record[key] <= 1, key
        assert 0 <= record["weight_sync_max_abs_logp_diff"] < 1e-3
    assert summary["iterations"][0]["kl_from_initial"] == pytest.approx(0, abs=1e-4)
    assert summary["iterations"][2]["kl_from_initial"] != summary["iterations"][0]["kl_from_initial"]


def test_the_run_directory_is_complete(smoke):
    names = {p.name for p in smoke.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "model",
        "summary.json",
        "report.html",
    }
    assert not [p for p in smoke.rglob("*unfinished*")]
    assert {p.name for p in (smoke / "checkpoints").iterdir()} == {
        "iteration_0",
        "iteration_1",
        "iteration_2",
    }
    saved = yaml.safe_load((smoke / "config.yaml").read_text())
    assert (saved["name"], saved["seed"], saved["beta"]) == ("smoke", 1, Recipe().beta)
    assert list((smoke / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_carry_trls_names_with_step_twins(smoke):
    updates = [m for m in metrics(smoke) if "loss" in m]
    assert [m["step"] for m in updates] == list(range(1, len(updates) + 1))
    seen = set().union(*updates)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert {key, f"step_{key}"} <= seen
    assert {"logps/chosen", "logps/rejected", "kl", "step_kl", "grad_norm", "learning_rate"} <= seen
    assert all(math.isfinite(m["loss"]) for m in updates)


def test_rollouts_are_whole_and_their_reference_is_the_sampler(smoke):
    settings = Recipe(**yaml.safe_load((smoke / "config.yaml").read_text()))
    for t in range(settings.iterations):
        rollouts = read_rollouts(smoke / "rollouts" / f"iteration_{t}.parquet")
        assert 0 < len(rollouts) <= settings.num_prompts * settings.num_generations
        for r in rollouts:
            assert "".join(r.steps) == r.completion
            assert r.step_ends == sorted(set(r.step_ends))
            assert r.step_ends[-1] == len(r.completion_ids) == len(r.logps) == len(r.ref_logps)
            assert len(r.steps) == len(r.step_ends) == len(r.step_labels) == len(r.step_probs) == len(r.checker_labels)
            assert set(r.step_labels) <= {0, 1}
            assert max(abs(a - b) for a, b in zip(r.logps, r.ref_logps, strict=True)) < 1e-3
    table = pq.read_table(smoke / "evaluations" / "iteration_2.parquet")
    assert table.num_rows == settings.num_test_problems


def test_training_and_held_out_problems_are_disjoint(smoke):
    held_out = set(pq.read_table(smoke / "evaluations" / "iteration_0.parquet")["prompt"].to_pylist())
    used = {r.prompt for p in (smoke / "rollouts").glob("*.parquet") for r in read_rollouts(p)}
    assert held_out
    assert used
    assert not held_out & used


def test_the_model_loads_in_transformers_and_is_the_last_policy(smoke):
    model = AutoModelForCausalLM.from_pretrained(smoke / "model")
    tokenizer = AutoTokenizer.from_pretrained(smoke / "model")
    prompt = tokenizer("Compute left to right, modulo 10: 3 + 4 * 2\n", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=30, do_sample=False)[0])
    assert text.startswith("Compute left to right, modulo 10: 3 + 4 * 2\n")
    last = load_file(smoke / "checkpoints" / "iteration_2" / "model.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in last.items())
    first = load_file(smoke / "checkpoints" / "iteration_0" / "model.safetensors")
    assert any(not torch.equal(v, last[k]) for k, v in first.items()), "training moved the weights"
    saved = load_file(smoke / "model" / "prm_head" / "head.safetensors")
    assert "threshold" in saved
    trunk = load_file(smoke / "model" / "prm_trunk" / "model.safetensors")
    assert trunk, "prm_trunk is initial: the head reads M_0, not the model it lies beside"
    assert all(torch.equal(tensor, first[name]) for name, tensor in trunk.items())
    summary = json.loads((smoke / "summary.json").read_text())
    assert len({record["prm"]["threshold"] for record in summary["iterations"]}) == 1, "the head is fitted once"


def test_a_killed_run_resumes_to_the_same_weights_and_metrics(smoke, tmp_path):
    """SIGKILL in the middle of an update, with work behind the last checkpoint: it is redone, nothing doubles."""
    folder = tmp_path / "run"
    arguments = [SMOKE, "--output_dir", str(folder), "--seed", "1"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(*arguments), stdout=log, stderr=log, cwd=ROOT)
        deadline = time.monotonic() + 300
        steps = 0
        while steps < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
            steps = (folder / "metrics.jsonl").read_text().count('"loss"') if (folder / "metrics.jsonl").exists() else 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert not (folder / "summary.json").exists()
    done = run(*arguments, "--resume", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    for t in range(3):
        name = f"checkpoints/iteration_{t}/model.safetensors"
        assert (folder / name).read_bytes() == (smoke / name).read_bytes(), name
    assert without_timings(folder) == without_timings(smoke)
    assert metrics(folder) == metrics(smoke)


def test_a_finished_run_resumes_to_itself(smoke, tmp_path):
    before = without_timings(smoke)
    done = run(SMOKE, "--output_dir", str(smoke), "--seed", "1", "--resume", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert without_timings(smoke) == before


@pytest.mark.parametrize(
    "settings",
    [
        ["--reference_points", "exact", "--level", "nested", "--prm_trunk", "initial"],
        [
            "--reference_points",
            "mismatched",
            "--level",
            "words",
            "--prm_trunk",
            "trained",
            "--reference",
            "initial",
        ],
        [
            "--label_source",
            "checker",
            "--after_first_error",
            "mask",
            "--step_reduction",
            "sum",
            "--iterations",
            "2",
        ],
        [
            "--bf16",
            "true",
            "--loss_type",
            "apo_zero_unpaired",
            "--reference_points",
            "zero",
            "--class_weights",
            "none",
        ],
        ["--step_weight", "0", "--num_train_epochs", "2", "--lr_scheduler_type", "cosine"],
        ["--lora_rank", "4", "--lora_target", ".*_proj", "--step_style", "auto", "--iterations", "2"],
        ["--label_source", "consensus", "--mc_continuations", "2", "--mc_labels", "soft", "--prm_pooling", "last"],
    ],
    ids=lambda s: "-".join(s[1::2]),
)
def test_every_choice_runs(tmp_path, settings):
    from stepkto_fast.train import main

    if "--lora_rank" in settings:
        pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path / "run"
    assert main([SMOKE, *TINY, "--output_dir", str(folder), *settings]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    expected = int(settings[settings.index("--iterations") + 1]) if "--iterations" in settings else 1
    assert len(summary["iterations"]) == expected + 1
    assert summary["engine"] == "transformers"
    if "checker" in settings:
        for r in read_rollouts(folder / "rollouts" / "iteration_0.parquet"):
            assert r.step_labels == r.checker_labels


@pytest.mark.skipif(ENGINE != "vllm", reason="vLLM is not installed")
def test_bf16_with_vllm(tmp_path):
    """Both sides round to bf16, each in its own order: the sync is proven within that rounding, on a tiny model."""
    arguments = [x for x in TINY if x not in ("--engine", "transformers")]
    done = run(
        SMOKE, *arguments, "--output_dir", str(tmp_path / "run"), "--bf16", "true", "--weight_sync_tolerance", "0.3"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 1e-4 < summary["iterations"][1]["weight_sync_max_abs_logp_diff"] < 0.3


def test_a_saved_model_and_problem_files_start_a_run(smoke, tmp_path, capsys):
    from stepkto_fast.train import main

    train_file, test_file = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    prompts = [f"Compute left to right, modulo 10: {a} + {b} * 2\n" for a in range(5) for b in range(5)]
    train_file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts) + "not json\n")
    test_file.write_text(json.dumps({"prompt": prompts[0], "answer": 0}) + "\n")
    folder = tmp_path / "run"
    arguments = [
        "--model",
        str(smoke / "model"),
        "--train_dataset",
        str(train_file),
        "--test_dataset",
        str(test_file),
        "--num_prompts",
        "30",
    ]
    assert main([SMOKE, *TINY, *arguments, "--output_dir", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["counts"]["skipped_rows"] == 1
    assert summary["held_out_problems"] == 1
    assert f"skipped {train_file}:26" in " ".join(capsys.readouterr().out.split())
    used, seed = (
        {r.prompt for r in read_rollouts(folder / "rollouts" / name)}
        for name in ("iteration_0.parquet", "seed.parquet")
    )
    assert seed | used == set(prompts[1:]), "every problem but the held-out one"
    assert not seed & used, "the head does not label problems that it was fitted on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "recipe file 'none.yaml' does not exist"),
        (["--learning_rat", "1"], "unknown option --learning_rat; did you mean 'learning_rate'?"),
        (["--train_dataset", "none.jsonl"], "problem file 'none.jsonl' does not exist"),
        (["--device", "cuda:7"], "not available"),
        (["--model", "no/such/model"], "cannot load model 'no/such/model'"),
        (["--resume", "true"], "nothing to resume"),
        ([SMOKE, *TINY, "--max_completion_length", "125"], "no prompt of 10 can be used"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_one_message_and_exit_code_1(tmp_path, capsys, arguments, message):
    from stepkto_fast.train import main

    if "cuda:7" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, capsys):
    """A huge learning rate blows the weights up; the run ends with the batch saved and the last checkpoint intact."""
    from stepkto_fast.train import main

    folder = tmp_path / "run"
    arguments = [SMOKE, *TINY, "--output_dir", str(folder), "--learning_rate", "9e18", "--warmup_steps", "0"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "stopped before the optimizer moved" in error
    (saved,) = folder.glob("nonfinite_*.parquet")
    assert str(saved) in error
    assert read_rollouts(saved)
    weights = load_file(folder / "checkpoints" / "iteration_0" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    assert not (folder / "summary.json").exists()
    assert "continue from the last checkpoint with --resume true and a lower --learning_rate" in error
    assert main([*arguments[:-4], "--learning_rate", "1e-5", "--warmup_steps", "0", "--resume", "true"]) == 0
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["--reference_points", "exact", "--prm_trunk", "policy"],
        ["--reference_points", "mismatched", "--prm_trunk", "trained", "--reference", "initial"],
        ["--reference_points", "exact", "--prm_trunk", "policy", "--lora_rank", "4", "--lora_merge", "end"],
    ],
    ids=lambda s: "-".join(s[1::2]),
)
def test_an_interrupted_update_resumes_with_every_estimator_and_trunk(tmp_path, interrupt_update, settings):
    """The reference is M_t and the head is fitted anew: neither may come from the half-updated weights."""
    from stepkto_fast.train import main

    arguments = [SMOKE, *TINY, "--iterations", "2", "--save_steps", "1", *settings]
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    rollouts = read_rollouts(tmp_path / "whole" / "rollouts" / "iteration_1.parquet")
    moved = max(abs(a - b) for r in rollouts for a, b in zip(r.logps, r.ref_logps, strict=True))
    assert (moved > 1e-3) == ("initial" in settings), "M_1's samples are held against M_0 or against M_1 itself"
    interrupt_update(4)
    assert main([*arguments, "--output_dir", str(tmp_path / "cut")]) == 130
    assert list((tmp_path / "cut" / "checkpoints").glob("iteration_1_step_1")), "it stopped in the second update"
    assert main([*arguments, "--output_dir", str(tmp_path / "cut"), "--resume", "true"]) == 0
    assert without_timings(tmp_path / "cut") == without_timings(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    load_prm(tmp_path / "cut" / "model", torch.device("cpu"))


def test_labelling_by_continuations_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    """The rollouts are sampled again, the same ones; chunks of continuations that were done are not."""
    from stepkto_fast import monte_carlo
    from stepkto_fast.train import main

    monkeypatch.setattr(monte_carlo, "CHUNK", 32)
    arguments = [SMOKE, *TINY, "--label_source", "monte_carlo", "--mc_continuations", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    chunks = tmp_path / "cut" / "rollouts" / "monte_carlo_iteration_0"
    real = monte_carlo._sample_chunk

    def interrupted(*args):
        if len(list(chunks.glob("*.parquet"))) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(monte_carlo, "_sample_chunk", interrupted)
    assert main([*arguments, "--output_dir", str(tmp_path / "cut")]) == 130
    sampled = []
    monkeypatch.setattr(monte_carlo, "_sample_chunk", lambda *args: sampled.append(args) or real(*args))
    assert main([*arguments, "--output_dir", str(tmp_path / "cut"), "--resume", "true"]) == 0
    assert len(sampled) == len(list(chunks.glob("*.parquet"))) - 2 > 0
    assert without_timings(tmp_path / "cut") == without_timings(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_run_that_died_before_its_first_checkpoint_resumes_with_its_model_and_counts_once(smoke, tmp_path):
    from stepkto_fast.recipe import parse_recipe, write_recipe
    from stepkto_fast.train import main

    rows = [{"prompt": f"Compute left to right, modulo 10: {a} + 1"} for a in range(9)]
    rows.append({"prompt": "Compute left to right, modulo 10: 1" + " + 1" * 60})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    arguments = [SMOKE, *TINY, "--model", str(smoke / "model"), "--test_dataset", str(tmp_path / "test.jsonl")]
    arguments += ["--output_dir", str(folder)]
    folder.mkdir()
    write_recipe(parse_recipe(arguments), folder / "config.yaml")
    for _ in range(2):
        assert main([*arguments, "--resume", "true"]) == 0
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["held_out_problems"], summary["counts"]["skipped_held-out_prompts"]) == (9, 1)
    given = load_file(smoke / "model" / "model.safetensors")
    used = load_file(folder / "checkpoints" / "iteration_0" / "model.safetensors")
    assert all(torch.equal(used[name], tensor) for name, tensor in given.items())


def test_overwriting_finds_out_what_is_wrong_before_it_deletes(smoke, capsys):
    from stepkto_fast.train import main

    before = {p: os.stat(p).st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
    for bad in (["--model", "no/such/model"], ["--report_to", "wandb"], ["--test_dataset", "none.jsonl"]):
        if bad[1] == "wandb" and importlib.util.find_spec("wandb"):
            continue
        assert main([SMOKE, "--output_dir", str(smoke), "--overwrite", "true", *bad]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert before == {p: os.stat(p).st_mtime_ns for p in smoke.rglob("*") if p.is_file()}


def test_a_full_run_is_not_overwritten_by_accident(smoke, capsys):
    from stepkto_fast.train import main

    before = {p: os.stat(p).st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
    assert main([SMOKE, "--output_dir", str(smoke)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert before == {p: os.stat(p).st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
