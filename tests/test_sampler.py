"""The engines in this process keep the contract of samplers; which engine is chosen, and what prompts fit."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from sampler_contract import SamplerContract, open_engine

from stepkto_fast.collect import ask
from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.sampler import open_sampler, require_engine
from stepkto_fast.task import ArithmeticTask
from stepkto_fast.tasks import arithmetic

VLLM = pytest.param(
    "vllm",
    marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
)


@pytest.fixture(scope="module", params=[VLLM, "transformers"])
def engine(request, tmp_path_factory, tokenizer):
    """One engine for all tests: starting vLLM takes seconds."""
    found = open_engine(tokenizer, tmp_path_factory.mktemp("policy"), engine=request.param)
    yield found
    found[2].close()


class TestSamplersInThisProcess(SamplerContract):
    pass


def test_rows_of_like_length_are_generated_together_and_come_back_in_order(model, tokenizer, problems, monkeypatch):
    from stepkto_fast import sampler_transformers

    monkeypatch.setattr(sampler_transformers, "BATCH", 6)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems[:12]]
    assert len({len(prompt) for prompt in prompts}) > 2
    limits, sampler = [3, 9] * 6, sampler_transformers.TransformersSampler(model, tokenizer)
    seen, real = [], sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda rows, t: seen.append(rows) or real(rows, t))
    found = sampler.sample(prompts, n=2, temperature=0.0, max_tokens=limits, seed=0)
    rows = [(limit, len(prompt)) for batch in seen for prompt, limit in batch]
    assert rows == sorted(rows)
    assert [len(batch) for batch in seen] == [6] * 4
    for prompt, limit, samples in zip(prompts, limits, found, strict=True):
        ((alone,),) = sampler.sample([prompt], n=1, temperature=0.0, max_tokens=limit, seed=0)
        assert [s.token_ids for s in samples] == [alone.token_ids] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_keys_and_values_written_in_place_give_the_bits_of_transformers_own_cache(
    temperature, model, tokenizer, problems, monkeypatch
):
    from stepkto_fast import sampler_transformers

    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems[:12]]
    call = {"n": 3, "temperature": temperature, "max_tokens": [5, 40] * 6, "seed": 7}
    made, real = [], sampler_transformers.cache_of
    monkeypatch.setattr(sampler_transformers, "cache_of", lambda *a: made.append(real(*a)) or made[-1])
    ours = sampler_transformers.TransformersSampler(model, tokenizer).sample(prompts, **call)
    (cache,) = made
    assert len(cache.layers) == model.config.num_hidden_layers
    assert all(x.keys.untyped_storage().nbytes() > x.keys.nbytes for x in cache.layers)  # a view of a larger tensor
    monkeypatch.setattr(sampler_transformers, "cache_of", lambda *a: None)
    assert sampler_transformers.TransformersSampler(model, tokenizer).sample(prompts, **call) == ours


def test_layers_with_a_sliding_window_keep_their_own_cache():
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from stepkto_fast.sampler_transformers import cache_of

    config = MistralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=4)  # fmt: skip
    layers = cache_of(MistralForCausalLM(config), 20).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer] * 2


def test_prompts_that_do_not_fit_are_counted_or_refused(problems, tokenizer, model):
    lengths = sorted(len(tokenizer(p.prompt)["input_ids"]) for p in problems)
    limit = model.config.max_position_embeddings - lengths[len(lengths) // 2]
    task = ArithmeticTask(Recipe())
    fitting, skipped = ask(task, problems, tokenizer, model, Recipe(max_completion_length=limit))
    assert len(fitting) + len(skipped) == len(problems)
    assert len(skipped) == sum(n > lengths[len(lengths) // 2] for n in lengths) > 0
    assert all("lower the latter or raise the former" in c for c in skipped)
    with pytest.raises(
        RunError, match=r"no prompt of 40 can be used; first complaint: prompt 0, '.*': 14 tokens, context_length"
    ):
        ask(task, problems, tokenizer, model, Recipe(max_completion_length=95))
    foreign = arithmetic.problem(problems[0].expression, "words")
    fitting, skipped = ask(task, [problems[0], foreign], tokenizer, model, Recipe())
    assert [a.problem for a in fitting] == [problems[0]]
    assert "prompt 1, 'A counter shows" in skipped[0]
    assert "does not know" in skipped[0]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"label_source": "checker"}, False),
        ({"label_source": "monte_carlo"}, True),
        ({"label_source": "consensus"}, True),
        ({"prm_labels": "monte_carlo"}, True),
    ],
)
def test_prefixes_are_cached_where_labels_are_continued(model, tokenizer, monkeypatch, settings, expected):
    from stepkto_fast import sampler_vllm

    given = {}
    monkeypatch.setattr(sampler_vllm.vllm, "LLM", lambda **engine: given.update(engine))
    open_sampler(Recipe(engine="vllm", **settings), model, tokenizer, Path("policy"), Path(os.devnull))
    assert given["enable_prefix_caching"] == expected
    assert expected or given["block_size"] is None


def test_a_missing_engine_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="engine vllm is not installed: pip install"):
        open_sampler(Recipe(engine="vllm"), model, tokenizer, Path(), Path())
    assert open_sampler(Recipe(engine="auto"), model, tokenizer, Path(), Path()).name == "transformers"


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="Ray is not installed: pip install"):
        require_engine(Recipe(vllm_mode="ray"))
    assert require_engine(Recipe(vllm_mode="server", vllm_server_url="http://h:1")) == "vllm"


def test_nccl_without_a_gpu_here_is_refused_before_anything_starts(monkeypatch):
    nccl = {"vllm_mode": "server", "vllm_server_url": "http://h:1", "vllm_sync": "nccl"}
    for cuda, device in ((False, None), (True, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        with pytest.raises(RunError, match="from GPU to GPU, and there is none here: set it to reload"):
            require_engine(Recipe(**nccl, device=device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="wants vLLM here, too"):
        require_engine(Recipe(**nccl))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert require_engine(Recipe(**nccl)) == "vllm"


@pytest.mark.parametrize("mode", [{"vllm_mode": "ray"}, {"vllm_mode": "server", "vllm_server_url": "http://h:1"}])
def test_adapters_alone_go_to_an_engine_in_this_process_only(mode):
    with pytest.raises(RunError, match="lora_sync adapters wants vllm_mode colocate"):
        require_engine(Recipe(lora_rank=4, lora_merge="end", lora_sync="adapters", **mode))
