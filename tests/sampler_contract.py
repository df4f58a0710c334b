"""What every sampler keeps, whatever engine is behind it: the tests of a class with a fixture `engine` of its own.

`engine` is (recipe, model, sampler): a recipe with max_completion_length 24 and temperature 0.8, and a model whose
weights the tests may change.
"""

import pytest
import torch

from stepkto_fast.collect import ask, check_sync, sample_rollouts
from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_policy
from stepkto_fast.recipe import Recipe
from stepkto_fast.run_directory import save_pretrained
from stepkto_fast.sampler import open_sampler
from stepkto_fast.task import ArithmeticTask


def tiny_model(tokenizer, folder):
    """A random model that vLLM runs on a CPU (head_dim 32), also saved in `folder`."""
    model = build_policy(tokenizer, hidden_size=64, layers=2, heads=2, max_length=96, seed=1).eval()
    save_pretrained(model, tokenizer, folder)
    return model


def open_engine(tokenizer, folder, **settings):
    """(recipe, model, sampler) for the contract."""
    model = tiny_model(tokenizer, folder)
    recipe = Recipe(max_completion_length=24, temperature=0.8, **settings)
    return recipe, model, open_sampler(recipe, model, tokenizer, folder, folder / "engine.log")


def draw(engine, problems, tokenizer, n=3, temperature=0.8, seed=5):
    recipe, model, sampler = engine
    task = ArithmeticTask(recipe)
    asked, _ = ask(task, problems[:6], tokenizer, model, recipe)
    return sample_rollouts(sampler, task, asked, tokenizer, recipe, n=n, temperature=temperature, seed=seed)


class SamplerContract:
    def test_sampled_log_probs_are_the_models_after_every_sync(self, engine, problems, tokenizer):
        recipe, model, sampler = engine
        for _ in range(2):
            sampler.sync(model)
            rollouts = draw(engine, problems, tokenizer)
            _, difference = check_sync(model, rollouts, recipe)
            assert difference < 1e-4
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))

    def test_stale_weights_are_caught(self, engine, problems, tokenizer):
        recipe, model, sampler = engine
        if sampler.name == "transformers":
            pytest.skip("samples from the trainer's own model object: its weights cannot be stale")
        sampler.sync(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        rollouts = draw(engine, problems, tokenizer)
        with pytest.raises(RunError, match="weight sync failed"):
            check_sync(model, rollouts, recipe)
        sampler.sync(model)
        check_sync(model, draw(engine, problems, tokenizer), recipe)

    def test_a_log_prob_that_is_not_a_number_is_caught_wherever_it_is(self, engine, problems, tokenizer):
        recipe, model, sampler = engine
        sampler.sync(model)
        rollouts = draw(engine, problems, tokenizer)
        rollouts[1].logps[0] = float("nan")
        with pytest.raises(RunError, match="weight sync failed"):
            check_sync(model, rollouts, recipe)

    def test_a_models_own_sampling_defaults_are_not_used(self, engine, problems, tokenizer):
        """A repetition penalty in generation_config.json would change the distribution that is sampled from."""
        recipe, model, sampler = engine
        model.generation_config.repetition_penalty = 5.0
        sampler.sync(model)
        check_sync(model, draw(engine, problems, tokenizer), recipe)
        assert model.generation_config.repetition_penalty == 5.0
        model.generation_config.repetition_penalty = None

    def test_the_wrong_temperature_is_caught(self, engine, problems, tokenizer):
        recipe, model, sampler = engine
        sampler.sync(model)
        with pytest.raises(RunError, match="weight sync failed"):
            check_sync(model, draw(engine, problems, tokenizer, temperature=1.0), recipe)

    def test_the_same_seed_gives_the_same_samples_and_draws_nothing_of_the_trainers(self, engine, problems, tokenizer):
        engine[2].sync(engine[1])
        torch.manual_seed(3)
        state = torch.get_rng_state()
        one, two = draw(engine, problems, tokenizer, seed=11), draw(engine, problems, tokenizer, seed=11)
        assert torch.equal(torch.get_rng_state(), state)
        assert one == two
        other = draw(engine, problems, tokenizer, seed=12)
        assert [r.completion_ids for r in other] != [r.completion_ids for r in one]

    def test_greedy_takes_the_most_likely_token(self, engine, problems, tokenizer):
        _, model, sampler = engine
        sampler.sync(model)
        for r in draw(engine, problems, tokenizer, n=1, temperature=0.0):
            ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
            model.set_attn_implementation("sdpa")
            best = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].topk(2).values
            picked = (
                model(ids).logits[0, len(r.prompt_ids) - 1 : -1].gather(-1, torch.tensor(r.completion_ids)[:, None])
            )
            model.set_attn_implementation("stepkto_packed")
            assert (picked[:, 0] >= best[:, 0] - 1e-5).all()

    def test_completions_end_with_eos_or_at_the_limit(self, engine, problems, tokenizer):
        engine[2].sync(engine[1])
        rollouts = draw(engine, problems, tokenizer, n=20)
        for r in rollouts:
            assert 1 <= len(r.completion_ids) <= 24
            assert r.finished == (r.completion_ids[-1] == tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in r.completion_ids[:-1]
            assert r.finished or len(r.completion_ids) == 24
            assert len(r.logps) == len(r.completion_ids)
            assert max(r.logps) <= 0
        assert {r.finished for r in rollouts} == {True, False}

    def test_each_prompt_has_a_limit_of_its_own(self, engine, problems, tokenizer):
        """Greedy completions are those of one large limit, cut; prompts and limits are in no order."""
        _, model, sampler = engine
        sampler.sync(model)
        prompts = [tokenizer(p.prompt)["input_ids"] for p in problems[:8]]
        limits = [24, 3, 11, 1, 24, 7, 2, 16]
        draw = {"n": 1, "temperature": 0.0, "seed": 0}
        cut = sampler.sample(prompts, max_tokens=limits, **draw)
        for (whole,), (part,), limit in zip(sampler.sample(prompts, max_tokens=24, **draw), cut, limits, strict=True):
            assert part.token_ids == whole.token_ids[:limit]
            assert part.finished == (whole.finished and len(whole.token_ids) <= limit)
        seen = set()
        sampled = sampler.sample(prompts, n=20, temperature=1.2, max_tokens=limits, seed=3)
        for row, limit in zip(sampled, limits, strict=True):
            assert len(row) == 20
            for s in row:
                assert 1 <= len(s.token_ids) == len(s.logps) <= limit
                assert s.finished == (s.token_ids[-1] == tokenizer.eos_token_id)
                assert s.finished or len(s.token_ids) == limit
                seen.add((s.finished, len(s.token_ids) == limit))
        assert seen == {(True, False), (True, True), (False, True)}

    def test_one_limit_for_all_is_the_same_as_one_for_each(self, engine, problems, tokenizer):
        _, model, sampler = engine
        sampler.sync(model)
        prompts = [tokenizer(p.prompt)["input_ids"] for p in problems[:6]]
        draw = {"n": 2, "temperature": 1.0, "seed": 8}
        assert sampler.sample(prompts, max_tokens=[9] * 6, **draw) == sampler.sample(prompts, max_tokens=9, **draw)

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ([5], "max_tokens has 1 entries for 2 prompts"),
            ([5, 0], r"max_tokens\[1\] is 0"),
            (0, r"max_tokens\[0\] is 0"),
        ],
    )
    def test_limits_that_cannot_be_kept_are_refused(self, engine, limits, message):
        with pytest.raises(ValueError, match=message):
            engine[2].sample([[5], [6]], n=1, temperature=1.0, max_tokens=limits, seed=0)

    def test_progress_counts_every_sample(self, engine, problems, tokenizer):
        recipe, model, sampler = engine
        sampler.sync(model)
        task, seen = ArithmeticTask(recipe), []
        asked, _ = ask(task, problems[:6], tokenizer, model, recipe)
        sample_rollouts(
            sampler, task, asked, tokenizer, recipe, n=3, temperature=0.8, seed=0, on_progress=lambda *x: seen.append(x)
        )
        assert seen[-1] == (18, 18)
        assert seen == sorted(seen)
