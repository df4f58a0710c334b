"""Every script in examples/ runs as a user would run it, without arguments and without a network."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = {"head_call", "lm_head", "packed_forward", "trl_config"}  # what integrations are made of
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def requires(path):
    """The example's REQUIRES: distributions, without which there is nothing to run."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["REQUIRES"]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} lacks REQUIRES, the distributions that it needs")


def installed(distribution):
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    missing = [name for name in requires(path) if not installed(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example says what it shows"


def test_the_page_names_every_integration_and_every_example():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "stepkto_fast" / "integrations").glob("[a-z]*.py")}
    assert modules >= SHARED
    for name in modules - SHARED:
        assert f"stepkto_fast.integrations.{name}" in page, f"docs/integrations.md does not mention {name}"
    for path in EXAMPLES:
        assert ast.get_docstring(parsed(path)), f"{path.name} does not say what it shows"
        assert f"examples/{path.name}" in page, f"docs/integrations.md does not mention {path.name}"
