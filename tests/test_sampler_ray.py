"""Two vLLM engines under a Ray of this machine keep the contract of samplers, and a dead one ends the run."""

import importlib.util
import os
import subprocess
import sys
import time
import types

import pytest
import torch
from sampler_contract import SamplerContract, open_engine

from stepkto_fast import ranks
from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.sampler import open_sampler
from stepkto_fast.weight_parts import parts

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
needs_engines = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "vllm")), reason="Ray or vLLM is not installed"
)


JOIN = """
import sys, ray
from stepkto_fast.recipe import Recipe
from stepkto_fast.sampler_ray import _join
assert _join(Recipe(vllm_mode="ray", ray_address=sys.argv[1]), sys.argv[2], 0) == sys.argv[1]
print("answered", ray.get(ray.get_actor("engine_1", namespace=sys.argv[2]).done.remote()))
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("policy")
    found = open_engine(tokenizer, folder, vllm_mode="ray", ray_engines=2, vllm_timeout=300)
    yield found
    found[2].close()


@needs_engines
class TestRay(SamplerContract):
    def test_prompts_are_split_over_all_engines_and_come_back_in_order(self, engine):
        """Fewer prompts than engines, and prompts that do not divide; greedy completions are those of one engine."""
        _, model, sampler = engine
        sampler.sync(model)
        draw = {"n": 1, "temperature": 0.0, "max_tokens": 5, "seed": 0}
        prompts = [[5 + k, 6, 7] for k in range(7)]
        alone = [sampler.sample([p], **draw)[0] for p in prompts]
        assert sampler.sample(prompts, **draw) == alone
        assert len({tuple(row[0].token_ids) for row in alone}) > 1
        assert sampler.sample([], **draw) == []

    def test_every_engine_has_the_weights(self, engine):
        """The same prompt on either engine; log-probs of both after a sync that changes them."""
        _, model, sampler = engine
        found = []
        for _ in range(2):
            sampler.sync(model)
            first, second = sampler.sample([[5, 6, 7]] * 2, n=1, temperature=0.01, max_tokens=4, seed=0)
            assert first[0].token_ids == second[0].token_ids
            found.append(first[0].logps)
            assert found[-1] == second[0].logps
            with torch.no_grad():
                model.lm_head.weight.mul_(1.3)
        assert found[0] != found[1]
        sampler.sync(model)

    def test_parts_draw_other_samples(self, engine):
        """Equal prompts on two engines must not be equal samples."""
        first, second = engine[2].sample([[5, 6, 7]] * 2, n=8, temperature=1.5, max_tokens=8, seed=0)
        assert [s.token_ids for s in first] != [s.token_ids for s in second]

    def test_another_rank_finds_the_engines_of_rank_0s_ray(self, engine):
        """Ray gives a cluster of its own a token, and takes it from other processes only where they are told so."""
        import ray

        context = ray.get_runtime_context()
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, context.gcs_address, context.namespace],
            env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert joined.stdout.endswith("answered 0\n"), joined.stderr[-2000:]

    def test_an_engine_that_hangs_is_not_waited_for(self, engine, monkeypatch):
        import ray

        sampler = engine[2]

        class Stuck:
            """In the place of an engine: never finishes."""

            def __init__(self):
                @ray.remote(num_cpus=0)
                def hang(*args, **arguments):
                    time.sleep(60)

                self.sample = self.done = hang

        monkeypatch.setattr(sampler, "_engines", [sampler._engines[0], Stuck()])
        monkeypatch.setattr(sampler, "_recipe", Recipe(vllm_mode="ray", vllm_timeout=2))
        with pytest.raises(RunError, match=r"\(number .*1\) have finished no sample for 2 s.*or raise vllm_timeout"):
            sampler.sample([[5], [6]], n=1, temperature=1.0, max_tokens=3, seed=0)

    def test_a_killed_engine_ends_the_run_and_is_named(self, engine):
        """The last test of the class: the engine is not started again."""
        import ray

        _, model, sampler = engine
        ray.kill(sampler._engines[1])
        for call in (
            lambda: sampler.sample([[5], [6]], n=1, temperature=1.0, max_tokens=3, seed=0),
            lambda: sampler.sync(model),
        ):
            with pytest.raises(RunError, match=r"vLLM engine 1 under Ray has failed .*killed.*--resume true"):
                call()


@pytest.mark.parametrize(
    ("main", "address", "mode"), [(False, None, "token"), (True, None, None), (False, "head:6379", None)]
)
def test_only_ranks_that_join_rank_0s_ray_are_told_of_its_token(
    monkeypatch, model, tokenizer, tmp_path, main, address, mode
):
    seen = []
    stand_in = types.ModuleType("stepkto_fast.sampler_ray")
    stand_in.RaySampler = lambda *args, **arguments: seen.append(os.environ.get("RAY_AUTH_MODE"))
    monkeypatch.setitem(sys.modules, "stepkto_fast.sampler_ray", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ranks, "is_main", lambda: main)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    open_sampler(Recipe(vllm_mode="ray", ray_address=address), model, tokenizer, tmp_path, tmp_path / "engine.log")
    assert seen == [mode]


@needs_ray
def test_each_rank_needs_an_engine(monkeypatch, model, tokenizer, tmp_path):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(RunError, match="ray_engines is 2 for 3 ranks: give at least one a rank"):
        open_sampler(Recipe(vllm_mode="ray"), model, tokenizer, tmp_path, tmp_path / "engine.log")


@needs_ray
def test_a_cluster_that_is_not_there_is_named(monkeypatch, model, tokenizer, tmp_path):
    from stepkto_fast import sampler_ray

    def absent(*args, **arguments):
        raise ConnectionError("Failed to connect to\nnode-7:6379")

    monkeypatch.setattr(sampler_ray.ray, "init", absent)
    monkeypatch.setattr(sampler_ray.ray, "is_initialized", lambda: False)
    recipe = Recipe(vllm_mode="ray", ray_address="node-7:6379")
    with pytest.raises(RunError, match=r"Ray does not start or answer \(node-7:6379\): ray_address is 'node-7:6379'"):
        open_sampler(recipe, model, tokenizer, tmp_path, tmp_path / "engine.log")


def test_weights_are_cut_into_parts_of_bounded_size_and_no_two_share_memory():
    one, two = torch.arange(6.0), torch.ones(4, 2, dtype=torch.bfloat16).t()
    named = [("a", one), ("tied", one), ("b", two), ("large", torch.zeros(100)), ("c", torch.tensor(3))]
    found = list(parts(named, limit=48))
    assert [list(part) for part in found] == [["a", "tied"], ["b"], ["large"], ["c"]]
    assert found[0]["a"].data_ptr() != found[0]["tied"].data_ptr()
    assert found[1]["b"].is_contiguous()
    for name, tensor in named:
        (value,) = [part[name] for part in found if name in part]
        assert torch.equal(value, tensor)
        assert value.dtype == tensor.dtype
    assert list(parts([])) == []
