"""The loop under torchrun: several ranks end where one ends, to rounding."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from stepkto_fast.checkpoint import save_pretrained

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
# Of the way that the weights went. Gradients of ranks are added in another order, and AdamW divides small gradients,
# rounding and all, by their own size: the update moves by more than the rounding does.
ROUNDING = 0.01

pytestmark = [pytest.mark.loop, pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")]


def train(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "stepkto_fast.train", *arguments, "--output_dir", str(folder)],
        capture_output=True, text=True, timeout=500, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def way_apart(one: Path, two: Path) -> float:
    """How far the models of two runs from one M_0 are apart, as a share of how far the first is from M_0."""
    start = load_file(one / "checkpoints" / "iteration_0" / "model.safetensors")
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum(float((a[name] - b[name]).square().sum()) for name in start) ** 0.5

    assert distance(first, start) > 0
    return distance(first, second) / distance(first, start)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="several ranks sample by vLLM: not installed")
def test_two_ranks_sample_the_same_and_learn_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # Shards of a fixed size have the same seeds on any number of ranks.
    same = [SMOKE, "--iterations", "1", "--rollout_shard_size", "10", "--engine", "vllm", "--report_to", "none"]
    for folder, ranks in ((one, 1), (two, 2)):
        done = train(folder, *same, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report ") == 1  # the main rank alone speaks
    for name in ("rollouts/seed.parquet", "rollouts/iteration_0.parquet"):
        a, b = (pq.read_table(folder / name) for folder in (one, two))
        for column in ("completion_ids", "logps", "label", "step_labels", "checker_labels"):
            assert a[column].equals(b[column]), (name, column)
    assert way_apart(one, two) < ROUNDING
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["counts"] == summaries[1]["counts"]
    assert summaries[0]["iterations"][0]["pass@1"] == summaries[1]["iterations"][0]["pass@1"]


def labelled_rows(folder: Path, model, tokenizer, rollouts) -> list[str]:
    """Arguments of an offline run on the completions `rollouts`."""
    save_pretrained(model, tokenizer, folder / "m0")
    rows = [
        {
            "prompt": r.prompt, "completions": [step.rstrip("\n") for step in r.steps],
            "labels": [bool(x) for x in r.checker_labels], "label": r.label,
        }
        for r in rollouts
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--label_source", "dataset", "--labelled_dataset", str(folder / "rows.jsonl"), "--model", str(folder / "m0"),
        "--report_to", "none", "--train_batch_size", "7", "--warmup_steps", "0", "--num_train_epochs", "3",
        "--context_length", "96", "--save_steps", "2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [["--reference_points", "exact"], ["--lora_rank", "4", "--lora_merge", "end", "--reference_points", "lagged"]],
    ids=["whole", "lora"],
)
def test_two_ranks_train_on_data_as_one_does(tmp_path, model, tokenizer, rollouts, more):
    arguments = [*labelled_rows(tmp_path, model, tokenizer, rollouts), *more]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, ranks in ((one, 1), (two, 2)):
        checkpointing = ["--gradient_checkpointing", "true"] if ranks == 2 else []
        done = train(folder, *arguments, *checkpointing, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    assert way_apart(one, two) < ROUNDING
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two))
    assert [set(x) for x in a] == [set(x) for x in b]
    assert [x["loss"] for x in a if "loss" in x] == pytest.approx([x["loss"] for x in b if "loss" in x], rel=1e-4)
