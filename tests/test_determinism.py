"""A run twice, with `--deterministic true` and without a network: the same bits, and nobody called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepkto_fast.determinism import WORKSPACES, make_deterministic

ROOT = Path(__file__).parent.parent
SMALL = [
    str(ROOT / "recipes" / "smoke.yaml"), "--deterministic", "true", "--engine", "transformers", "--report_to", "none",
    "--label_source", "checker", "--num_prompts", "6", "--num_test_problems", "4", "--num_eval_generations", "2",
    "--iterations", "1", "--warm_start_steps", "20", "--max_completion_length", "24",
]  # fmt: skip
# Addresses of this machine stay open, for process groups and the like. Names are looked up by a call of its own.
WITHOUT_NETWORK = """
import socket, sys
def refuse(*address):
    print("CALLED", address, file=sys.stderr)
    raise OSError("no network here")
connect = socket.socket.connect
def local_only(self, address):
    local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
    return connect(self, address) if local else refuse(address)
socket.socket.connect = socket.socket.connect_ex = local_only
look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **named: (
    look_up(host, *rest, **named) if host in (None, "127.0.0.1", "::1", "localhost", socket.gethostname())
    else refuse(host)
)
from stepkto_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one recipe in processes of their own: folders and what they said."""
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    found = []
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name)
        words = [sys.executable, "-c", WITHOUT_NETWORK, *SMALL, "--output_dir", str(folder)]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((folder, done.stderr))
    return found


@pytest.mark.loop
def test_the_same_seed_gives_the_same_bits(runs):
    (one, _), (other, _) = runs
    names = [p.relative_to(one) for p in one.rglob("*") if p.suffix in (".safetensors", ".parquet")]
    assert len(names) >= 4
    for name in (*names, "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    loss = [line for line in map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert loss


@pytest.mark.loop
def test_nobody_is_called_unless_asked(runs):
    for _, said in runs:
        assert "CALLED" not in said


@pytest.fixture
def settings_put_back(monkeypatch):
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_it_may_be_asked_twice(settings_put_back):
    settings_put_back.setenv("CUBLAS_WORKSPACE_CONFIG", "garbage")
    for _ in range(2):
        make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACES[0]
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark


def test_a_workspace_that_is_deterministic_is_kept(settings_put_back):
    settings_put_back.setenv("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[1])
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACES[1]
