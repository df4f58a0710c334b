"""Imports point one way: torch -> stepkto_kernels -> objective -> trainer -> command line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "stepkto_fast"
KERNELS = ROOT / "kernels" / "torch-ext" / "stepkto_kernels"

# Lower layers first. A module may import from its own layer and those above it in this list.
LAYERS = [
    {"__init__", "errors", "atomic", "estimators", "rows", "answer_text", "tasks", "settings"},
    {"recipe", "rollout", "attention", "answer_worker", "answer_pool", "ranks", "determinism", "sharding", "watchdog"},
    {
        "packing",
        "baselines",
        "policy",
        "segmentation",
        "answers",
        "model_shape",
        "hardware",
        "prm_metrics",
        "command",
        "checkpointing",
    },
    {
        "objective",
        "task",
        "sampler",
        "sampler_vllm",
        "sampler_server",
        "sampler_ray",
        "vllm_server",
        "weight_parts",
        "weight_transfer",
        "sampler_transformers",
        "sampling_shards",
        "adapters",
        "policy_views",
    },
    {"checkpoint", "importance"},
    {"prm_head", "warm_start", "stepwise_rows", "labelled_formats", "monte_carlo"},
    {"prm", "labelled", "collect"},
    {"prm_files", "prm_export", "run_directory", "plan_memory", "token_budget"},
    {"recorder", "evaluation", "report_data", "watch"},
    {"update", "setup_run", "report_figures"},
    {"report"},
    {"labelling", "ahead"},
    {"phases", "offline"},
    {"plan_time"},
    {"planner"},
    {"train", "train_prm", "eval", "eval_prm", "scaling_page"},
    {"study"},
    {"settings_page"},
    {"integrations"},
]
# Each optional package is imported in exactly one module; vLLM also where its weight transfer is, which a trainer that
# samples on a server needs without an engine of its own.
ONE_PLACE = {
    "vllm": {"sampler_vllm", "weight_transfer"},
    "ray": {"sampler_ray"},
    "aiohttp": {"vllm_server"},
    "flash_attn": {"attention"},
    "wandb": {"recorder"},
    "matplotlib": {"report_figures", "study"},
    "math_verify": {"answer_worker"},
}
# And these only in the adapter that has their name.
STACKS = ("verl", "openrlhf", "llamafactory", "torchtune", "torchtitan")


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports; relative ones start with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} if node.module else {base + alias.name for alias in node.names}
    return names


def layer(name: str) -> int:
    return next(n for n, names in enumerate(LAYERS) if name.split(".")[0] in names)


def test_every_module_has_a_layer():
    modules = {p.stem for p in ENGINE.glob("*.py")} | {p.name for p in ENGINE.iterdir() if (p / "__init__.py").exists()}
    assert modules == set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda p: str(p.relative_to(ENGINE)))
def test_the_engine_imports_downwards(path):
    mine = path.relative_to(ENGINE).parts[0].removesuffix(".py")
    for name in imported(path):
        if name.startswith("."):
            target = name.lstrip(".")
            if path.parent == ENGINE or name.startswith(".."):
                assert layer(target) <= layer(mine), f"{mine} imports {target}, which is above it"
        package = name.split(".")[0]
        if package in ONE_PLACE:
            assert mine in ONE_PLACE[package], f"{package} belongs into {ONE_PLACE[package]} alone"
        if package in STACKS:
            assert path == ENGINE / "integrations" / f"{package}.py", f"{package} belongs into its integration alone"
        assert package != "kernels", "that name belongs to another package"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_the_kernels_know_nothing_of_training(path):
    outside = {name.split(".")[0] for name in imported(path) if not name.startswith(".")}
    import sys

    assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}


def test_nothing_shadows_the_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not (ROOT / "bench" / "kernels").exists()
