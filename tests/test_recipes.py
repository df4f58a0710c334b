"""The recipe files: each parses and can be planned, and the figures in its comment are what the planner says today."""

import re
from pathlib import Path

import pytest

from stepkto_fast.hardware import Rates
from stepkto_fast.planner import plan, summary
from stepkto_fast.recipe import Recipe, parse_recipe
from stepkto_fast.settings import parse_settings
from stepkto_fast.setup_run import require_labels
from stepkto_fast.task import MathTask
from stepkto_fast.tasks.math import KNOWN

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
FOR_REAL_MODELS = [
    "llama-3.1-8b-math", "llama-3.1-8b-math-lora", "llama-3.1-8b-math-8gpu", "qwen2.5-1.5b-gsm8k",
    "qwen2.5-1.5b-gsm8k-lora", "qwen2.5-1.5b-math-32k",
]  # fmt: skip
QUOTED = re.compile(r"^# python -m stepkto_fast\.train (\S+) --plan((?: --\w+ \S+)+)\n((?:#   .*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_can_be_planned(path):
    recipe = parse_recipe([str(path)])
    assert recipe.name == path.stem
    assert recipe.output_dir == f"runs/{path.stem}"
    assert plan(recipe, Rates()).complaint is None or not recipe.lora_rank


@pytest.mark.parametrize("name", FOR_REAL_MODELS)
def test_figures_in_the_comment_are_current(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe([str(ROOT / "recipes" / f"{name}.yaml")])
    quoted = QUOTED.findall(text)
    assert quoted
    for path, words, lines in quoted:
        assert path == f"recipes/{name}.yaml"
        rates = parse_settings(Rates, words.split(), "plan")
        assert [line.removeprefix("#   ") for line in lines.splitlines()] == summary(plan(recipe, rates))
    assert ": fits" in quoted[0][2], "the first device named is one that the run fits on"
    assert "Never run" in text


@pytest.mark.parametrize("name", FOR_REAL_MODELS)
def test_recipes_for_real_models_can_be_labelled(name):
    """Their data have no step labels: the run must not stop for want of a label source."""
    recipe = parse_recipe([str(ROOT / "recipes" / f"{name}.yaml")])
    assert {recipe.train_dataset, recipe.test_dataset} <= set(KNOWN)
    assert recipe.context_length >= recipe.max_completion_length + Rates().prompt_tokens
    task = MathTask(recipe)
    try:
        require_labels(recipe, task)
    finally:
        task.close()


def test_the_recipe_for_eight_gpus_differs_where_it_says():
    one, eight = (parse_recipe([str(ROOT / "recipes" / f"llama-3.1-8b-math{end}.yaml")]) for end in ("", "-8gpu"))
    assert {key for key in Recipe.__dataclass_fields__ if getattr(one, key) != getattr(eight, key)} == {
        "name", "output_dir", "vllm_memory", "vllm_sleep", "max_tokens_per_micro_batch", "gradient_checkpointing"
    }  # fmt: skip


def test_the_recipe_for_long_context_is_long():
    recipe = parse_recipe([str(ROOT / "recipes" / "qwen2.5-1.5b-math-32k.yaml")])
    assert recipe.context_length == 32768 == recipe.max_tokens_per_micro_batch
    assert recipe.gradient_checkpointing


@pytest.mark.parametrize("name", ["llama-3.1-8b-math", "qwen2.5-1.5b-gsm8k"])
def test_lora_variants_differ_where_they_say(name):
    full, lora = (parse_recipe([str(ROOT / "recipes" / f"{name}{end}.yaml")]) for end in ("", "-lora"))
    different = {key for key in Recipe.__dataclass_fields__ if getattr(full, key) != getattr(lora, key)}
    allowed = {
        "name", "output_dir", "lora_rank", "learning_rate", "max_tokens_per_micro_batch", "vllm_memory", "save_steps"
    }  # fmt: skip
    assert {"name", "output_dir", "lora_rank", "learning_rate"} <= different <= allowed
