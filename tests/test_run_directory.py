"""The run directory: whole files or none, and a resumed optimizer that is the same to the last bit."""

import json

import pytest
import torch

from stepkto_fast.errors import RunError
from stepkto_fast.objective import LaggedPoints
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts, write_rollouts
from stepkto_fast.run_directory import Progress, RunDirectory, restore_optimizer


def open_run(tmp_path, **settings):
    return RunDirectory(Recipe(output_dir=str(tmp_path / "run"), **settings))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss = sum((p * torch.randn_like(p)).sum() for p in model.parameters())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_a_step_checkpoint_brings_back_weights_optimizer_and_progress(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for n in range(3):
        step(model, optimizer, n)
    progress = Progress(
        0, 3, 3, 77, LaggedPoints(0.25, -0.5), [{"iteration": 0}], {"update": 1.5}, {"train": 9}, {"x": 1}
    )
    run.save_step(model, optimizer, progress)
    step(model, optimizer, 99)
    expected = [p.detach().clone() for p in model.parameters()]

    again = open_run(tmp_path, resume=True)
    newest = again.newest_checkpoint()
    assert newest.name == "iteration_0_step_3"
    assert again.load_progress(newest) == progress
    other, _ = again.load_model(0, torch.device("cpu"))
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2)
    restore_optimizer(fresh, again.load_step(progress, other))
    step(other, fresh, 99)
    assert all(torch.equal(a, b) for a, b in zip(expected, other.parameters(), strict=True))


def test_only_the_newest_step_and_every_policy_are_kept(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_policy(model, tokenizer, Progress(iteration=0))
    for k in (2, 10):
        run.save_step(model, optimizer, Progress(iteration=0, step=k))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["iteration_0", "iteration_0_step_10"]
    run.save_policy(model, tokenizer, Progress(iteration=1))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["iteration_0", "iteration_1"]


def test_an_unfinished_checkpoint_is_never_taken_for_one(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress())
    unfinished = run.checkpoints / ".unfinished-iteration_1"
    unfinished.mkdir()
    again = open_run(tmp_path, resume=True)
    assert again.newest_checkpoint().name == "iteration_0"
    assert not unfinished.exists()


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress(global_step=1))

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.save_policy(model, Broken(), Progress(global_step=2))
    assert run.load_progress(run.policy_of(0)).global_step == 1


def test_a_run_is_not_overwritten_by_accident(tmp_path, model, tokenizer):
    open_run(tmp_path)
    open_run(tmp_path).save_policy(model, tokenizer, Progress())  # before its first checkpoint there is nothing to lose
    with pytest.raises(RunError, match="already holds a run: continue it with --resume true"):
        open_run(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text("old\n")
    with pytest.raises(RunError, match="lies in output_dir, which --overwrite true would empty"):
        open_run(tmp_path, overwrite=True, model=str(tmp_path / "run" / "checkpoints" / "iteration_0"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    open_run(tmp_path, overwrite=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resume_wants_a_run_and_the_same_settings(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        open_run(tmp_path, resume=True)
    open_run(tmp_path, beta=0.5)
    with pytest.raises(RunError, match=r"beta was 0\.5 and is now 0\.1"):
        open_run(tmp_path, resume=True, beta=0.1)
    open_run(tmp_path, resume=True, beta=0.5, save_steps=3, learning_rate=1e-5)


@pytest.mark.parametrize("damage", ["progress.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, model, tokenizer, damage):
    run = open_run(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0)
    progress = Progress(step=1)
    run.save_step(model, optimizer, progress)
    folder = run.newest_checkpoint()
    (folder / damage).write_bytes((folder / damage).read_bytes()[:20])
    with pytest.raises(RunError, match=r"iteration_0_step_1 is damaged.*delete it to go back"):
        run.load_progress(folder), run.load_step(progress, model)


def test_a_damaged_policy_is_named(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress())
    weights = run.policy_of(0) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"cannot load model .*iteration_0"):
        run.load_model(0, torch.device("cpu"))


def test_a_tokenizer_with_folders_is_saved(tmp_path, model):
    class Nested:
        def save_pretrained(self, folder):
            (folder / "templates").mkdir()
            (folder / "templates" / "chat.jinja").write_text("x")

    run = open_run(tmp_path)
    run.save_policy(model, Nested(), Progress())
    assert (run.policy_of(0) / "templates" / "chat.jinja").read_text() == "x"


def test_an_unusable_output_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory(Recipe(output_dir=str(tmp_path / "file" / "run")))


def test_rollouts_read_back_to_the_last_bit(tmp_path, rollouts):
    for r in rollouts:
        r.ref_logps = torch.tensor(r.ref_logps).tolist()
    path = tmp_path / "rollouts" / "iteration_0.parquet"
    write_rollouts(rollouts, path)
    assert read_rollouts(path) == rollouts
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"cannot read the rollouts in .*iteration_0\.parquet.*delete the file"):
        read_rollouts(path)


def test_progress_is_plain_json(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress(lagged=LaggedPoints(0.1, 0.2)))
    assert json.loads((run.policy_of(0) / "progress.json").read_text())["lagged"] == {
        "outcome": 0.1,
        "step": 0.2,
    }
