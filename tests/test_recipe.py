"""Recipes: file, command line, defaults, and what is said when something is wrong."""

from dataclasses import asdict

import pytest
import yaml

from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe, parse_recipe, write_recipe


def test_no_arguments_are_the_embedded_recipe():
    assert parse_recipe([]) == Recipe()


def test_command_line_over_file_over_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 3e-4\nbeta: 0.25\nbf16: true\nmodel: null\nfilter_eps: 0.001\n")
    recipe = parse_recipe([str(path), "--beta", "0.75", "--seed=3"])
    assert (recipe.learning_rate, recipe.beta, recipe.seed, recipe.bf16) == (3e-4, 0.75, 3, True)
    assert (recipe.model, recipe.filter_eps) == (None, 0.001)


@pytest.mark.parametrize("name", ["plain", "größer 数学", "a\x85b", "a\u2028b", "'\"\n#: -"])
def test_what_is_written_reads_back(tmp_path, name):
    recipe = Recipe(seed=5, beta=0.123456789, model="a/b", filter_eps=None, resume=True, name=name)
    write_recipe(recipe, tmp_path / "config.yaml")
    assert parse_recipe([str(tmp_path / "config.yaml")]) == recipe
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == asdict(recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1e-4", r"bad\.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ("zzz: 1", "unknown key 'zzz'; --help lists the keys"),
        ("- a list", "holds a list: write one 'key: value' a line"),
        ("beta: [1, 2]", "key 'beta' holds a list, expected one value"),
        ("a: b: c", "is not YAML"),
        ("iterations: 0", "iterations is 0: give at least 1"),
        ("temperature: 0", "temperature is 0.0: give a positive one"),
        ("max_operations: 1", "max_operations 1 is below min_operations 4"),
        ("loss_type: apo_zero_unpaired\nreference_points: exact", "set reference_points to zero"),
        ("reference_points: mismatched\ntrain_batch_size: 8", "raise train_batch_size"),
        ("misconceptions: 1.5", "misconceptions is 1.5: give a share from 0 to 1"),
        ("hidden_size: 100\nnum_heads: 3", "hidden_size 100 must be a multiple of twice num_heads"),
        ("max_tokens_per_micro_batch: -1", "give at least 1, or 0 for as many as fit"),
        ("rollout_shard_size: 0", "rollout_shard_size is 0: give at least 1"),
        ("vllm_mode: server", "a server takes both, vllm_mode server and its address"),
        ("vllm_server_url: http://a:1", "a server takes both"),
        ("vllm_mode: ray\nengine: transformers", "vllm_mode ray is vLLM's, and engine is transformers"),
        ("vllm_sync: nccl", "vllm_sync nccl sends weights to a server, and vllm_mode is 'colocate': set server"),
        ("lora_sync: adapters", "set lora_rank, and lora_merge to end"),
        ("lora_sync: adapters\nlora_rank: 4", "set lora_rank, and lora_merge to end"),
        ("lora_sync: adapters\nlora_rank: 4\nlora_merge: end\nlora_train_head: true", "set lora_sync to merged"),
        ("lora_merge: end", "lora_rank 0 trains all weights"),
        ("lora_train_head: true", "lora_rank 0 trains all weights"),
        ("lora_merge: end\nlora_rank: 4\nprm_trunk: trained", "set it to initial"),
        ("lora_merge: end\nlora_rank: 4\nlora_sync: adapters\nmax_staleness: 1", "max_staleness to 0"),
        ("ray_address: a:1", "is for vllm_mode ray, not colocate"),
        ("label_source: dataset\nlabelled_dataset: a\nmax_staleness: 1", "no engine sampled"),
        ("label_source: dataset\nlabelled_dataset: a\nimportance_correction: token", "no engine sampled"),
        ("importance_cap: 0", "importance_cap is 0.0: give a positive one"),
        ("max_staleness: 2", "invalid choice"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("loss_type: dpo", "invalid choice"),
    ],
)
def test_bad_files_are_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        parse_recipe([str(path)])


def test_bad_options_and_missing_files():
    with pytest.raises(RunError, match=r"unknown option --sed; did you mean 'seed'"):
        parse_recipe(["--sed", "1"])
    for arguments in (["--seed", "1", "extra"], ["-seed", "1"]):
        with pytest.raises(RunError, match="not used by the HfArgumentParser"):
            parse_recipe(arguments)
    with pytest.raises(RunError, match=r"recipe file 'none\.yaml' does not exist"):
        parse_recipe(["none.yaml"])


def test_every_setting_says_what_it_is():
    from dataclasses import fields

    assert all(len(f.metadata["help"]) > 10 for f in fields(Recipe))
