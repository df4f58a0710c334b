"""Faults of disk, files, engine and ranks: one message, a non-zero exit code, and nothing is lost.

Each fault hits a copy of one run that was cut in its second update; what a resume makes of it must be what the
undisturbed run is, to the last bit.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks

from stepkto_fast import atomic, command, ranks, update
from stepkto_fast.errors import RunError
from stepkto_fast.sampler_transformers import TransformersSampler
from stepkto_fast.train import main

ROOT = Path(__file__).parent.parent
SETTINGS = [
    str(ROOT / "recipes" / "smoke.yaml"), "--engine", "transformers", "--report_to", "none", "--label_source",
    "checker", "--num_prompts", "6", "--num_test_problems", "4", "--warm_start_steps", "20", "--num_generations", "4",
    "--num_eval_generations", "2", "--train_batch_size", "8", "--save_steps", "1", "--hidden_size", "32",
    "--prm_seed_problems", "10", "--prm_seed_generations", "2",
]  # fmt: skip
STEP = "checkpoints/iteration_1_step_1"
SECONDS = ("seconds", "tokens_per_second", "phase_seconds")


def run(folder, *more):
    return main([*SETTINGS, "--output_dir", str(folder), *more])


def resume(folder, *more):
    return run(folder, "--resume", "true", *more)


def result(folder):
    """What a run leaves, timings aside."""
    summary = json.loads((folder / "summary.json").read_text())
    weights = {p.parent.name: p.read_bytes() for p in folder.glob("checkpoints/iteration_*/model.safetensors")}
    return (
        {k: v for k, v in summary.items() if k not in SECONDS},
        weights | {"model": (folder / "model" / "model.safetensors").read_bytes()},
        (folder / "metrics.jsonl").read_text(),
        {p.name: p.read_bytes() for p in folder.glob("evaluations/*.parquet")},
    )


def interrupted(monkeypatch, folder, nth):
    real, calls = update.accumulate_gradients, []

    def gradients(*args):
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(update, "accumulate_gradients", gradients)
    return run(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(an undisturbed run, one that was cut by Ctrl-C in its second update, what the latter said)"""
    whole, cut = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("cut") / "run"
    assert run(whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        assert interrupted(patch, cut, 5) == 130
    assert {p.name for p in (cut / "checkpoints").iterdir()} == {"iteration_0", "iteration_1", "iteration_1_step_1"}
    return whole, cut


@pytest.fixture
def cut(runs, tmp_path):
    """A copy of the run that was cut, to be damaged."""
    shutil.copytree(runs[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def undisturbed(runs):
    return result(runs[0])


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- damaged files ----


@pytest.mark.parametrize(
    ("damage", "goes_on_from"),
    [
        ([(halve, f"{STEP}/model.safetensors")], "M_1"),
        ([(flip, f"{STEP}/optimizer.safetensors")], "M_1"),
        ([(halve, f"{STEP}/progress.json"), (Path.unlink, "checkpoints/iteration_1/config.json")], "M_0"),
        ([(halve, "checkpoints/iteration_1/model.safetensors")], "M_0"),
        ([(halve, "rollouts/iteration_1.parquet")], "M_1"),
        ([(Path.unlink, "rollouts/iteration_1.parquet")], "M_1"),
        ([(lambda p: shutil.copy(p.with_name("iteration_0.parquet"), p), "rollouts/iteration_1.parquet")], "M_1"),
    ],
    ids=[
        "weights",
        "optimizer",
        "progress-and-config",
        "policy",
        "rollouts",
        "no-rollouts",
        "rollouts-of-another-iteration",
    ],
)
def test_damage_is_found_said_and_survived(cut, undisturbed, capsys, damage, goes_on_from):
    for how, name in damage:
        how(cut / name)
    assert resume(cut) == 0
    out = " ".join(capsys.readouterr().out.split())
    for _, name in damage:
        assert Path(name).name in out
    assert f"warning: checkpoint {cut / STEP} cannot be used (" in out
    assert f"from {goes_on_from} to M_2" in out
    assert list((cut / "checkpoints").glob(".damaged-*_step_1"))
    assert result(cut) == undisturbed


def test_nothing_is_damaged_where_nothing_was_done(cut, undisturbed, capsys):
    assert resume(cut) == 0
    out = capsys.readouterr().out
    assert "cannot be used" not in out
    assert "from M_1 (update step 1) to M_2" in " ".join(out.split())
    assert result(cut) == undisturbed


@pytest.mark.parametrize(
    ("name", "message", "code"),
    [
        ("checkpoints/iteration_0/model.safetensors", "M_0, is damaged", 1),
        ("rollouts/seed.parquet", r"cannot read the rollouts in .*seed\.parquet", 1),
        ("config.yaml", r"config\.yaml is damaged .*put the recipe that the run was started with in its place", 1),
    ],
    ids=["M_0", "seed", "config"],
)
def test_what_cannot_be_made_again_is_named_and_kept(cut, undisturbed, capsys, name, message, code):
    content = (cut / name).read_bytes()
    (cut / name).write_bytes(b"[" + content[: len(content) // 2])
    assert resume(cut) == code
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL)
    assert "Traceback" not in error
    (cut / name).write_bytes(content)  # put back from a copy
    assert resume(cut) == 0
    assert result(cut) == undisturbed


def test_a_corrupt_prm_head_is_named(runs, tmp_path, capsys):
    head = tmp_path / "prm"
    shutil.copytree(runs[0] / "model", head)
    (head / "prm_head").mkdir(exist_ok=True)
    (head / "prm_head" / "head.safetensors").write_bytes(b"short")
    (head / "prm_config.json").write_text(
        json.dumps({"pooling": "last", "hidden_size": 32, "temperature": 1.0, "trunk": ".", "trunk_checksum": 1})
    )
    more = ["--prm", str(head), "--model", str(runs[0] / "checkpoints" / "iteration_0"), "--label_source", "head"]
    assert run(tmp_path / "run", *more) == 1
    error = capsys.readouterr().err
    assert f"{head / 'prm_head' / 'head.safetensors'} cannot be read" in error
    assert "Traceback" not in error


# ---- the disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of a given size and its remount; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    mount(["-t", "tmpfs", "-o", "size=100m", "tmpfs"])
    try:
        yield folder, lambda options: mount(["-o", f"remount,{options}"])
    finally:
        # Lazily: this process holds the run that was on it until it ends.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used(folder):
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))


def test_a_full_disk(cut, undisturbed, small_disk, capsys):
    """A real one, full in the middle of the next checkpoint: what it held is given back, and the one before stays."""
    disk, remount = small_disk
    shutil.copytree(cut, disk / "run")
    remount(f"size={used(disk) + (160 << 10)}")
    assert resume(disk / "run") == 1
    error = capsys.readouterr().err
    assert re.search(r"error: \S+/run/\S+: No space left on device; free some space, then start again", error)
    assert "Traceback" not in error
    assert not list(disk.rglob(".unfinished-*"))
    assert (disk / "run" / STEP / "manifest.json").exists()
    remount("size=100m")
    assert resume(disk / "run") == 0
    assert result(disk / "run") == undisturbed


def test_a_disk_that_becomes_read_only(cut, undisturbed, small_disk, capsys):
    disk, remount = small_disk
    shutil.copytree(cut, disk / "run")
    remount("ro")
    assert resume(disk / "run") == 1
    error = capsys.readouterr().err
    assert "Read-only file system; mount it for writing" in error
    assert "Traceback" not in error
    remount("rw")
    assert resume(disk / "run") == 0
    assert result(disk / "run") == undisturbed


def test_a_directory_without_permission(cut, undisturbed, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; the read-only file system is tested above")
    (cut / "checkpoints").chmod(0o555)
    assert resume(cut) == 1
    assert "Permission denied; allow this user to read and write there" in capsys.readouterr().err
    (cut / "checkpoints").chmod(0o755)
    assert resume(cut) == 0
    assert result(cut) == undisturbed


def test_a_limit_on_files_in_the_middle_of_a_checkpoint(cut, undisturbed, capsys):
    """The kernel refuses the optimizer's file, twice as long as the weights': a real error of a write in Rust."""
    weights = (cut / STEP / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights + 4096, before[1]))
    try:
        code = resume(cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    error = capsys.readouterr().err
    assert "iteration_1_step_2: File too large; have the limit on the size of files raised" in error
    assert not list(cut.rglob(".unfinished-*"))
    assert (cut / STEP).is_dir()
    assert resume(cut) == 0
    assert result(cut) == undisturbed


@pytest.mark.parametrize("nth", [2, 9, 20, 33])
def test_a_disk_that_is_full_at_any_write(cut, undisturbed, monkeypatch, capsys, nth):
    """Data that the disk does not take are known when they are forced to it: the nth such call fails."""
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    assert resume(cut) == 1
    assert "No space left on device; free some space" in capsys.readouterr().err
    assert not list(cut.rglob(".unfinished-*"))
    assert resume(cut) == 0
    assert result(cut) == undisturbed


# ---- the engine ----


def test_an_engine_that_dies_while_it_samples(cut, undisturbed, monkeypatch, capsys):
    shutil.rmtree(cut / STEP)
    real, calls = TransformersSampler._generate, []

    def dying(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise RunError("the engine is dead: start again with --resume true")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersSampler, "_generate", dying)
        assert resume(cut) == 1
    assert capsys.readouterr().err == "error: the engine is dead: start again with --resume true\n"
    assert resume(cut) == 0
    assert result(cut) == undisturbed


# ---- what a command says ----


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/file"), "a/file: Disk quota exceeded; free some space or"),
        (OSError(errno.EACCES, "Permission denied", "a/file"), "a/file: Permission denied; allow this user"),
        (MemoryError(), "out of memory (MemoryError): lower max_tokens_per_micro_batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried): lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "gradient_checkpointing"),
        (RunError("as it is"), "as it is"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_one_message_and_exit_code_1(capsys, error, message):
    def failing():
        raise error

    assert command.run_command(failing) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file", "x"), RuntimeError("shape"), KeyError("x")])
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    def failing():
        raise error

    with pytest.raises(type(error)):
        command.run_command(failing)


# ---- ranks ----


def _message_of_a_silent_rank(rank):
    """What rank 0 says when the other one does not answer."""
    if rank:
        time.sleep(5)
        return None
    start = time.monotonic()
    try:
        ranks.gather(rank)
    except RuntimeError as error:
        return command.machine_message(error), time.monotonic() - start
    return None


def test_a_rank_that_hangs_ends_the_others():
    message, seconds = on_ranks(2, _message_of_a_silent_rank, join=partial(_join_for, 1.5))[0]
    assert message.startswith("another rank ended, or did not answer within distributed_timeout (")
    assert seconds < 5


def _join_for(timeout):
    ranks.open_ranks(timeout)


WORKER = """
import os, signal, sys, time
from stepkto_fast import ranks
from stepkto_fast.command import run_command

def work():
    ranks.open_ranks(60)
    for n in range(1000):
        ranks.gather(n)
        if n == 3 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

sys.exit(run_command(work))
"""


def test_a_worker_that_is_killed_under_torchrun_ends_the_run(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # It looks rarely, so that rank 0 has found out by itself before it is ended.
    start += ["--monitor-interval", "3", str(tmp_path / "worker.py")]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        start, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: another rank ended, or did not answer within distributed_timeout" in done.stderr
    assert f"Signal {int(signal.SIGKILL)}" in done.stderr
