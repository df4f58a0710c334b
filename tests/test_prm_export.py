"""The export gives the PRM's own probabilities at step ends, in transformers and in vLLM."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from stepkto_fast.errors import RunError
from stepkto_fast.packing import pack
from stepkto_fast.policy import build_policy
from stepkto_fast.prm import PRM
from stepkto_fast.prm_export import export_token_classifier
from stepkto_fast.prm_head import AttentionHead, LastTokenHead
from stepkto_fast.recipe import Recipe

# The engine has a process of its own: two engines in one process share their settings.
VLLM = """
import json, sys, vllm
engine = vllm.LLM(
    model=sys.argv[1], runner="pooling", dtype="float32", max_model_len=96, enforce_eager=True,
    enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True,
)
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(sys.argv[2]))]
found = engine.encode(prompts, pooling_task="token_classify", use_tqdm=False)
json.dump([f.outputs.data.tolist() for f in found], open(sys.argv[3], "w"))
"""


@pytest.fixture
def prm(tokenizer, rollouts):
    """A head whose standardisation and calibration all matter, and that says different things of different steps."""
    # vLLM's attention on a CPU wants heads of at least 32
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=96, seed=1).eval()
    torch.manual_seed(5)
    head = LastTokenHead(model.config.hidden_size)
    with torch.no_grad():
        head.mean.normal_()
        head.std.uniform_(0.5, 2)
        head.out.weight.normal_()
        head.scale.fill_(0.7)
        batch = pack(rollouts)
        head.shift.copy_(-head(head.read(model, batch, 1.0), batch.cu_steps).mean())
        head.threshold.fill_(0.25)
    prm = PRM(model, head, temperature=1.0)
    assert np.ptp(np.concatenate(prm.score(rollouts, Recipe()))) > 0.5
    return prm


@pytest.fixture
def exported(prm, tokenizer, tmp_path):
    export_token_classifier(prm, tokenizer, tmp_path / "export")
    return tmp_path / "export"


def ids_of(r):
    return [*r.prompt_ids, *r.completion_ids]


def at_step_ends(r, probabilities):
    """Of (T, 2) probabilities, those of "right" at the last token of each step."""
    return [probabilities[len(r.prompt_ids) + end - 1][1] for end in r.step_ends]


def test_transformers_loads_the_export(prm, exported, rollouts):
    model = AutoModelForTokenClassification.from_pretrained(exported).eval()
    assert type(model).__name__ == "LlamaForTokenClassification"
    assert (model.config.id2label, model.config.label2id) == ({0: "wrong", 1: "right"}, {"wrong": 0, "right": 1})
    assert model.config.prm_threshold == 0.25
    for r, mine in zip(rollouts, prm.score(rollouts, Recipe()), strict=True):
        with torch.no_grad():
            theirs = at_step_ends(r, model(torch.tensor([ids_of(r)])).logits[0].softmax(-1).tolist())
        np.testing.assert_allclose(theirs, mine, atol=2e-6)


def test_vllm_pooling_loads_the_export(prm, exported, rollouts, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    asked, found = tmp_path / "asked.json", tmp_path / "found.json"
    asked.write_text(json.dumps([ids_of(r) for r in rollouts]))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", VLLM, str(exported), str(asked), str(found)],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    for r, mine, theirs in zip(rollouts, prm.score(rollouts, Recipe()), json.loads(found.read_text()), strict=True):
        np.testing.assert_allclose(at_step_ends(r, theirs), mine, atol=1e-5)


def test_a_head_that_is_not_linear_is_refused(model, tokenizer, tmp_path):
    prm = PRM(model, AttentionHead(model.config.hidden_size), 1.0)
    with pytest.raises(RunError, match=r"prm_pooling attention .* fit one with prm_pooling last"):
        export_token_classifier(prm, tokenizer, tmp_path / "export")
    assert not (tmp_path / "export").exists()
