"""vLLM in this process: sleep and wake, adapters, failures, and an engine for each rank."""

import functools
import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from on_ranks import on_ranks

from stepkto_fast import ranks
from stepkto_fast.adapters import attach_adapters
from stepkto_fast.collect import check_sync
from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_policy, load_policy
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.run_directory import save_pretrained
from stepkto_fast.sampler import open_sampler
from stepkto_fast.sharding import shard

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("vllm", "peft"))), reason="vLLM or peft is not installed"
)

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
LORA = {"lora_rank": 3, "lora_alpha": 6, "lora_merge": "end", "lora_target": ".*(q_proj|down_proj|lm_head)"}


def recipe_of(**settings):
    return Recipe(engine="vllm", vllm_sleep=True, temperature=0.8, vllm_timeout=300.0, **settings)


# ---- the order of calls ----


class Recorder:
    """In the place of vllm.LLM: what it was asked for, refusing what vLLM would spoil."""

    def __init__(self, **settings):
        self.settings, self.calls, self.asleep = settings, [], set()
        self.llm_engine = SimpleNamespace(step=lambda: None, add_lora=self.add_lora)

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")
        self.asleep -= set(tags)

    def collective_rpc(self, method, kwargs):
        assert "weights" not in self.asleep
        self.calls.append(f"{method} {len(list(kwargs['weights_iterator']))}")

    def add_lora(self, request):
        assert "weights" not in self.asleep
        self.calls.append(f"adapters {request.lora_int_id}")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def generate(self, prompts, parameters, use_tqdm, lora_request):
        assert not self.asleep
        self.calls.append("generate" + (f" {lora_request.lora_int_id}" if lora_request else ""))
        return []


@pytest.fixture
def start(model, tokenizer, monkeypatch, tmp_path):
    """start(**settings): a sampler whose vLLM is a Recorder, and that Recorder."""
    from stepkto_fast import sampler_vllm

    monkeypatch.setattr(sampler_vllm.vllm, "LLM", Recorder)

    def started(**settings):
        sampler = open_sampler(recipe_of(**settings), model, tokenizer, tmp_path, tmp_path / "engine.log")
        return sampler, sampler._llm

    return started


def sample(sampler, **others):
    return sampler.sample(PROMPTS, **{"n": 2, "temperature": 0.8, "max_tokens": 9, "seed": 4} | others)


def test_weights_are_written_into_an_engine_that_is_awake(start, model):
    sampler, engine = start()
    write = f"reload_weights {len(model.state_dict())}"
    sampler.sync(model)
    sample(sampler)
    assert engine.calls == [write, "reset", "generate"], "awake from the start"
    engine.calls.clear()
    sampler.sleep()
    sampler.sleep()
    with pytest.raises(RuntimeError, match="the engine sleeps: sync must come before sample"):
        sample(sampler)
    assert engine.calls == ["sleep 2"], "vLLM sees nothing of a sample from a sleeping engine"
    engine.calls.clear()
    sampler.sync(model)
    sample(sampler)
    sampler.sync(model)
    assert engine.calls == ["wake ['weights']", write, "reset", "wake ['kv_cache']", "generate", write, "reset"]
    assert not {"enable_lora", "enable_sleep_mode", "distributed_executor_backend"} & engine.settings.keys()


def test_adapters_come_to_weights_that_are_kept(start, model):
    sampler, engine = start(**LORA, lora_sync="adapters")
    attach_adapters(model, recipe_of(**LORA), seed=0)
    sample(sampler)
    sampler.sync(model)
    sampler.sleep()
    sampler.sync(model)
    sample(sampler)
    assert engine.calls == [
        "generate", "adapters 1", "reset", "sleep 1", "wake ['weights']", "adapters 2", "reset", "wake ['kv_cache']",
        "generate 2",
    ]  # fmt: skip
    assert engine.settings["max_lora_rank"] == 8


def test_an_engine_that_may_not_sleep_stays_awake(start, model):
    sampler, engine = start()
    sampler._recipe.vllm_sleep = False
    sampler.sleep()
    sample(sampler)
    assert engine.calls == ["generate"]


def test_memory_that_sleep_frees_is_asked_for_on_a_gpu_alone(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start()[1].settings["enable_sleep_mode"] is True


def test_ranks_share_a_process_group_with_vllm(start, monkeypatch):
    from stepkto_fast import sampler_vllm

    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(sampler_vllm.vllm.v1.engine.core, "cleanup_dist_env_and_memory", None)
    assert start()[1].settings["distributed_executor_backend"] == "external_launcher"


def test_adapters_larger_than_vllms_are_refused(start):
    with pytest.raises(RunError, match="lora_rank 513 is above what vLLM's adapters may have: set lora_sync to merged"):
        start(lora_rank=513, lora_merge="end", lora_sync="adapters")


# ---- failures ----


def test_what_fails_in_vllm_names_the_log_and_the_remedy(start, model, monkeypatch, tmp_path):
    from vllm.v1.engine.exceptions import EngineDeadError

    sampler, engine = start()

    def fail(*_, **__):
        raise EngineDeadError

    monkeypatch.setattr(engine, "collective_rpc", fail)
    with pytest.raises(RunError, match=r"vLLM failed while taking the policy's weights \(EngineDeadError: .*--resume"):
        sampler.sync(model)
    monkeypatch.setattr(engine, "generate", lambda *_, **__: 1 // 0)
    log = tmp_path / "engine.log"
    with pytest.raises(RunError, match=rf"vLLM failed while sampling \(ZeroDivisionError: .*{log} says more"):
        sample(sampler)
    assert log.read_text().count("Traceback (most recent call last)") == 2
    assert "1 // 0" in log.read_text()


def test_adapters_that_vllm_does_not_take_are_explained(start, model, monkeypatch):
    sampler, engine = start(**LORA, lora_sync="adapters")
    attach_adapters(model, recipe_of(**LORA), seed=0)

    def refuse(request):
        raise ValueError("no such module")

    monkeypatch.setattr(engine.llm_engine, "add_lora", refuse)
    with pytest.raises(
        RunError, match=r"vLLM does not take these adapters \(no such module\): set lora_sync to merged"
    ):
        sampler.sync(model)


def test_every_step_of_the_engine_is_a_sign_of_life(start, monkeypatch):
    """However long completions are: vLLM itself reports those that are finished, and no others."""
    from stepkto_fast import sampler_vllm

    sampler, engine = start()
    signs = []
    monkeypatch.setattr(sampler_vllm, "watchdog", lambda *given: nullcontext(lambda: signs.append(given)))
    step = engine.llm_engine.step
    monkeypatch.setattr(engine, "generate", lambda *_, **__: [engine.llm_engine.step() for _ in range(7)] and [])
    sample(sampler)
    assert len(signs) == 7
    assert {given[:2] for given in signs} == {(300.0, "vLLM, while sampling")}
    assert engine.llm_engine.step is step


def test_what_the_caller_stops_with_passes_through(start, monkeypatch):
    sampler, engine = start()

    def generate(*_, use_tqdm, **__):
        use_tqdm(total=4).update(1)

    def stop(done, total):
        raise RunError(f"stopped at {done} of {total}")

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(RunError, match=r"^stopped at 1 of 4$"):
        sample(sampler, on_progress=stop)


# ---- engines ----


def policy_of(folder, seed):
    """M_0 of `folder` with adapters that have learnt something."""
    policy, _ = load_policy(str(folder))
    attach_adapters(policy.eval(), Recipe(**LORA), seed=0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def differences(policy, sampler, **others):
    """The largest |difference| of the engine's log-probs to the policy's own; RunError above the tolerance."""
    rollouts = [
        Rollout(n, k, "", prompt, "", s.token_ids, s.logps, s.finished, step_ends=[len(s.token_ids)])
        for n, (prompt, drawn) in enumerate(zip(PROMPTS, sample(sampler, **others), strict=True))
        for k, s in enumerate(drawn)
    ]
    return check_sync(policy, rollouts, recipe_of())[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=96, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("policy")
    save_pretrained(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def sync_kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(sync_kind, folder):
    """One engine for all tests of a kind of sync: it takes seconds to start."""
    policy, tokenizer = load_policy(str(folder))
    sampler = open_sampler(recipe_of(**LORA, lora_sync=sync_kind), policy, tokenizer, folder, folder / "engine.log")
    yield sampler
    sampler.close()
    sampler.close()
    assert not torch.distributed.is_initialized(), "vLLM's own process group ends with it"


both = pytest.mark.parametrize("sync_kind", ["merged", "adapters"], indirect=True)


@both
def test_the_engine_has_the_policys_log_probs_through_sleep_and_sync(engine, folder):
    initial, _ = load_policy(str(folder))
    policies = [policy_of(folder, seed) for seed in (1, 2)]
    for policy in policies:
        engine.sync(policy)
        assert differences(policy, engine) < 1e-4
        with pytest.raises(RunError, match="weight sync failed"):
            differences(initial, engine)
        engine.sleep()
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            sample(engine)
    engine.sync(policies[0])
    with pytest.raises(RunError, match="weight sync failed"):
        differences(policies[1], engine)


@both
def test_the_trainer_keeps_its_threads_and_its_generator(engine, folder):
    engine.sync(policy_of(folder, 1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert sample(engine) == sample(engine)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2, "vLLM replaces set_num_threads by what does nothing"
    torch.set_num_threads(1)


TURNS = [(0, 11), (0, 12), (1, 11), (1, 13)]  # who samples, with which seed


def sampled_in_turn(rank, folder):
    """Samples of this rank's turns, from a policy that both hold together. While one samples, the other is far away."""
    policy, tokenizer = load_policy(str(folder))
    # A log of its own: what a rank says while it starts would be mixed up with what the other says.
    sampler = open_sampler(recipe_of(**LORA), policy, tokenizer, folder, folder / f"engine_{rank}.log")
    found = {}
    for turn in range(2):
        policy = policy_of(folder, turn)
        shard(policy, bf16=False)
        sampler.sync(policy)
        ranks.barrier()
        for who, seed in TURNS:
            if who == rank:
                found[turn, who, seed] = sample(sampler, seed=seed)
            ranks.barrier()
        sampler.sleep()
    sampler.close()
    assert ranks.size() == 2, "the ranks outlive their engines"
    ranks.barrier()
    return found


@pytest.mark.parametrize("sync_kind", ["merged"], indirect=True)
def test_each_rank_has_an_engine_that_samples_as_one_process_would(engine, folder):
    alone = {}
    for turn in range(2):
        policy = policy_of(folder, turn)
        engine.sync(policy)
        for who, seed in TURNS:
            alone[turn, who, seed] = sample(engine, seed=seed)
            assert differences(policy, engine, seed=seed) < 1e-4
    first, second = on_ranks(2, sampled_in_turn, folder, join=functools.partial(ranks.open_ranks, 120.0))
    assert first | second == alone
    assert first[0, 0, 11] != first[1, 0, 11]
