"""The run directory: whole files or none, and a resumed optimizer that is the same to the last bit."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from on_ranks import on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stepkto_fast import ranks
from stepkto_fast.adapters import attach_adapters
from stepkto_fast.atomic import MANIFEST, damage, write_manifest
from stepkto_fast.errors import RunError
from stepkto_fast.objective import LaggedPoints
from stepkto_fast.policy import build_policy, build_tokenizer
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import read_rollouts, write_rollouts
from stepkto_fast.run_directory import Progress, RunDirectory
from stepkto_fast.sharding import full_state, shard


def open_run(tmp_path, **settings):
    return open_at(tmp_path / "run", **settings)


def open_at(folder, **settings):
    return RunDirectory(Recipe(output_dir=str(folder), **settings))


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
    again.load_step(progress, other, fresh)
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


def test_a_failing_write_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress(global_step=1))

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"iteration_0: No space left on device; free some space, then start again"):
        run.save_policy(model, Broken(), Progress(global_step=2))
    assert run.load_progress(run.policy_of(0)).global_step == 1
    assert [p.name for p in run.checkpoints.iterdir()] == ["iteration_0"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path, model, tokenizer, whole):
    """Killed between the rename that takes the old one away and the one that brings the new one, or right after it."""
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress(global_step=1))
    old, replaced = run.policy_of(0), run.checkpoints / ".replaced-iteration_0"
    os.replace(old, replaced)
    if whole:
        run.save_policy(model, tokenizer, Progress(global_step=2))
        assert not replaced.exists()
        os.replace(old, replaced)
        run.save_policy(model, tokenizer, Progress(global_step=2))
        (run.checkpoints / ".replaced-iteration_0").mkdir()
    again = open_run(tmp_path, resume=True)
    assert again.load_progress(again.newest_checkpoint()).global_step == 1 + whole
    assert [p.name for p in run.checkpoints.iterdir()] == ["iteration_0"]


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


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("file", ["progress.json", "model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_is_taken(tmp_path, model, tokenizer, file, damage):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress())
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0)
    run.save_step(model, optimizer, Progress(step=1))
    folder, said = run.newest_checkpoint(), []
    assert folder.name == "iteration_0_step_1"
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        middle = len(content) // 2
        bad = content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flipped" else b"")
        (folder / file).write_bytes(bad)
    again = open_run(tmp_path, resume=True)
    if (file, damage) == ("manifest.json", "missing"):  # as an older version wrote it: taken as it is
        assert again.newest_checkpoint(said.append) == folder
        return
    assert again.newest_checkpoint(said.append) == run.policy_of(0)
    (warning,) = said
    assert f"checkpoint {folder} cannot be used ({folder / file}: " in warning
    aside = run.checkpoints / ".damaged-iteration_0_step_1"
    assert aside.name in warning
    assert aside.is_dir()
    assert open_run(tmp_path, resume=True).newest_checkpoint(said.append) == run.policy_of(0)
    assert len(said) == 1


def test_no_flipped_bit_of_a_manifest_is_an_error_of_ours(tmp_path):
    (tmp_path / "weights").write_bytes(b"some")
    write_manifest(tmp_path, ranks=1)
    content, found = (tmp_path / MANIFEST).read_bytes(), []
    for place, bit in itertools.product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (tmp_path / MANIFEST).write_bytes(flipped)
        found.append(damage(tmp_path))
    assert sum(bool(x) for x in found) > len(found) / 2, "what is left are spaces and the number of ranks"
    (tmp_path / MANIFEST).write_bytes(content)
    assert damage(tmp_path) == []


def test_a_step_rests_on_its_rollouts_and_its_policy(tmp_path, model, tokenizer, rollouts):
    run = open_run(tmp_path)
    file = run.rollouts / "iteration_0.parquet"
    optimizer = torch.optim.AdamW(model.parameters())
    for other in (rollouts[:5], None):
        run.save_policy(model, tokenizer, Progress())
        write_rollouts(rollouts, file)
        run.save_step(model, optimizer, Progress(step=1))
        if other is None:
            weights = run.policy_of(0) / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
        else:
            write_rollouts(other, file)  # of another run
        said = []
        newest = open_run(tmp_path, resume=True).newest_checkpoint(said.append)
        assert newest == (None if other is None else run.policy_of(0))
        assert all("cannot be used" in text for text in said)
        assert len(said) == (2 if other is None else 1)
        assert file.exists() == (other is None), "rollouts of another run are not taken for this one's"
    assert len(read_rollouts(run.rollouts / ".damaged-iteration_0.parquet")) == 5


def test_without_m_0_a_run_does_not_go_on(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    for t in (0, 1):
        run.save_policy(model, tokenizer, Progress(iteration=t))
    config = run.policy_of(0) / "config.json"
    config.write_text(config.read_text()[:-5])
    with pytest.raises(RunError, match=r"iteration_0, M_0, is damaged .*config\.json: it has .*Put it back"):
        open_run(tmp_path, resume=True).newest_checkpoint()
    assert run.policy_of(0).is_dir()


def test_checkpoints_of_an_older_version_are_named_when_they_do_not_load(tmp_path, model, tokenizer):
    run = open_run(tmp_path)
    run.save_policy(model, tokenizer, Progress())
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_step(model, optimizer, Progress(step=1))
    folder = run.newest_checkpoint()
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(RunError, match=r"iteration_0_step_1 is damaged.*delete it to go back"):
        run.load_step(Progress(step=1), model, optimizer)
    (folder / "progress.json").write_text("{")
    with pytest.raises(RunError, match=r"iteration_0_step_1 is damaged.*delete it to go back"):
        run.load_progress(folder)


def test_lost_metrics_and_another_number_of_ranks_are_said(tmp_path, model, tokenizer, monkeypatch):
    run = open_run(tmp_path)
    run.metrics.write_text("0123456789")
    run.save_policy(model, tokenizer, Progress(metrics_bytes=10))
    said = []
    assert run.newest_checkpoint(said.append)
    assert not said
    run.metrics.write_text("012345")
    monkeypatch.setattr("stepkto_fast.ranks.size", lambda: 2)
    monkeypatch.setattr("stepkto_fast.ranks.from_main", lambda action: action())
    assert run.newest_checkpoint(said.append)
    assert "was written by 1 ranks and is read by 2" in said[0]
    assert "lacks 4 bytes" in said[1]


def test_a_run_is_open_in_one_process_at_a_time(tmp_path):
    open_run(tmp_path)
    code = "import sys; from pathlib import Path; from stepkto_fast.atomic import hold; print(hold(Path(sys.argv[1])))"
    run = str(tmp_path / "run")
    other = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"
    open_run(tmp_path, resume=True)
    waiting = f"{code}; sys.stdout.flush(); sys.stdin.read()"
    (tmp_path / "other").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", waiting, str(tmp_path / "other")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "True\n"
        with pytest.raises(RunError, match="another process is at work in"):
            RunDirectory(Recipe(output_dir=str(tmp_path / "other")))
        holder.kill()
        holder.wait()
        RunDirectory(Recipe(output_dir=str(tmp_path / "other")))


def test_a_damaged_config_is_named(tmp_path):
    open_run(tmp_path)
    config = tmp_path / "run" / "config.yaml"
    for text in ("name: [", "- a list"):
        config.write_text(text)
        with pytest.raises(
            RunError, match=r"(?s)config\.yaml is damaged .*put the recipe that the run was started with"
        ):
            open_run(tmp_path, resume=True)


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


# ---- several ranks, and adapters ----

LORA = Recipe(lora_rank=2, lora_merge="end")


def made(tied=False):
    """A policy and its tokenizer, the same ones on every rank."""
    tokenizer = build_tokenizer(["Step 1: 1 + 1 = 2", "a b c d e f"])
    model = build_policy(tokenizer, hidden_size=16, layers=2, heads=2, max_length=32, seed=3)
    if tied:
        model.config.tie_word_embeddings = True
        torch.manual_seed(3)
        model = type(model)(model.config)
    return model, tokenizer


def adam_step(model, optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = 0.1 * parameter.detach() + 0.01
    optimizer.step()


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model):
    return {name: tensor.clone() for name, tensor in full_state(model)}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _on_two_ranks(rank, folder, recipe, tied, of_one_rank):
    """Writes M_0, M_1 and a step from two ranks; returns what the weights were after two steps, and what came back."""
    model, tokenizer = made(tied)
    if recipe.lora_rank:
        attach_adapters(model, recipe, 0)
    shard(model, bf16=False)
    run = RunDirectory(Recipe(output_dir=folder))
    run.save_policy(model, tokenizer, Progress())
    optimizer, progress = adam(model), Progress(iteration=1, step=1)
    adam_step(model, optimizer)
    run.save_policy(model, tokenizer, Progress(iteration=1))
    run.save_step(model, optimizer, progress)
    adam_step(model, optimizer)
    expected = trained(model)
    again = RunDirectory(Recipe(output_dir=folder, resume=True))
    said = []
    assert again.newest_checkpoint(said.append).name == "iteration_1_step_1"
    assert not said
    found = []
    for path in (folder, of_one_rank):
        other, _ = again.load_model(0, torch.device("cpu"))
        if recipe.lora_rank:
            attach_adapters(other, recipe, 1)
            again.load_adapters(other, progress)
        shard(other, bf16=False)
        fresh = adam(other)
        RunDirectory(Recipe(output_dir=path, resume=True)).load_step(progress, other, fresh)
        adam_step(other, fresh)
        found.append(same(trained(other), expected))
    refused = []
    for failing, write in (
        (0, lambda: run.save_policy(model, tokenizer, Progress(iteration=2))),
        (0, lambda: run.save_step(model, optimizer, Progress(iteration=1, step=2))),
        (1, lambda: run.save_step(model, optimizer, Progress(iteration=1, step=2))),
    ):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
        with pytest.raises(RunError) as caught:
            write()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        refused.append(str(caught.value))
        ranks.barrier()
        assert not list(run.checkpoints.glob(".unfinished-*"))
        ranks.barrier()
    return expected, found, refused


@pytest.mark.parametrize("kind", ["plain", "tied", "adapters"])
def test_two_ranks_write_what_one_reads_and_the_other_way_round(tmp_path, kind):
    if kind == "adapters":
        pytest.importorskip("peft", reason="peft is not installed")
    recipe = LORA if kind == "adapters" else Recipe()
    folders = tmp_path / "two", tmp_path / "one"
    # One rank.
    model, tokenizer = made(kind == "tied")
    if recipe.lora_rank:
        attach_adapters(model, recipe, 0)
    run, optimizer, progress = open_at(folders[1]), adam(model), Progress(iteration=1, step=1)
    run.save_policy(model, tokenizer, Progress())
    adam_step(model, optimizer)
    run.save_policy(model, tokenizer, Progress(iteration=1))
    run.save_step(model, optimizer, progress)
    adam_step(model, optimizer)
    # Two ranks, which read the step of one as well as their own.
    shutil.copytree(folders[1], tmp_path / "copy")
    both = on_ranks(2, _on_two_ranks, str(folders[0]), recipe, kind == "tied", str(tmp_path / "copy"))
    for expected, found, refused in both:
        assert found == [True, True]
        assert same(expected, trained(model))
        assert all("File too large" in text for text in refused), refused
    # One rank reads what two wrote: the policies as plain models, in the same files as its own.
    two = open_at(folders[0], resume=True)
    for t in (0, 1):
        mine, theirs = (load_file(r.policy_of(t) / "model.safetensors") for r in (run, two))
        assert same(mine, theirs)
        assert ("lm_head.weight" in theirs) == (kind != "tied")
        assert {p.name for p in run.policy_of(t).iterdir()} == {p.name for p in two.policy_of(t).iterdir()}
        loaded = AutoModelForCausalLM.from_pretrained(two.policy_of(t), dtype="auto")
        assert loaded.dtype == torch.float32
        assert same(dict(loaded.state_dict()) if kind == "plain" else mine, mine)
    other, _ = two.load_model(0, torch.device("cpu"))
    if recipe.lora_rank:
        attach_adapters(other, recipe, 1)
        two.load_adapters(other, progress)
    fresh, said = adam(other), []
    assert two.newest_checkpoint(said.append).name == "iteration_1_step_1"
    assert "was written by 2 ranks and is read by 1" in said[0]
    two.load_step(progress, other, fresh)
    adam_step(other, fresh)
    assert same(trained(other), trained(model))
