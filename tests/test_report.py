"""The report: every text escaped, nothing loaded, absent parts said to be absent, broken files named with a remedy."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepkto_fast import report
from stepkto_fast.errors import RunError
from stepkto_fast.evaluation import write_solutions
from stepkto_fast.prm_metrics import auroc
from stepkto_fast.report import (
    auroc_chance,
    choose_samples,
    duration,
    headline,
    points,
    significant,
    wilson,
    write_report,
)
from stepkto_fast.report_data import Solution

HOSTILE = "</pre></title></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}&lt;\u202e "


def solution(row, iteration, text=""):
    """A row as evaluation.write_solutions stores it; the more iterations, the more is right."""
    right = (row + iteration) % 4 > 0
    return {
        "problem_id": row, "prompt": f"{text}What is {row} + 1?", "answer": f"{text}{row + 1}", "completion": "unused",
        "steps": [f"{text}1. {row} + 1 = {row + 1}\n", f"{text}Answer: {row + 1}"], "label": right,
        "step_labels": [int(row % 3 > 0), int(right)], "step_probs": [0.75, 0.25], "completion_tokens": 12,
    }  # fmt: skip


def write_parquet(path, rows, schema=None):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_run(root, iterations=3, steps=4, text=""):
    """A run directory of M_0 ... M_{iterations - 1} with `steps` optimizer steps between two; `text` is put before
    every text in it."""
    (root / "evaluations").mkdir(parents=True)
    records, lines = [], []
    for t in range(iterations):
        rates = {"pass@1": 0.25 + 0.25 * t, "maj@8": 0.3125 + 0.25 * t, "step_accuracy": 0.625 + 0.125 * t}
        audit = {"f1": 0.875 - 0.0625 * t, "precision": 0.91, "recall": 0.84, "auroc": 0.973, "ece": 0.011}
        bins = [{"probability": 0.1, "correct": 0.2, "count": 9}, {"probability": 0.9, "correct": 0.875, "count": 80}]
        records.append(
            {
                "iteration": t, **rates, "flawed_correct": 0.4375 - 0.125 * t, "prm_f1": audit["f1"],
                "weight_sync_max_abs_logp_diff": 1.25e-5, "completion_length": 40.0 - t, "kl_from_initial": 1.5 * t,
                "prm": {**audit, "threshold": 0.6, "bins": bins},
            }
        )  # fmt: skip
        lines.append({"step": steps * t, "iteration": t, "pass@1": 0.5})  # an evaluation: not a training step
        for k in range(steps if t < iterations - 1 else 0):
            pair = {"rewards/chosen": 0.1 * k, "rewards/rejected": -0.2 * k, "rewards/margins": 0.3 * k}
            losses = {"loss": 1 - 0.01 * k, "loss/outcome": 0.5, "loss/step": 0.5}
            steps_too = {f"step_{key}": value for key, value in pair.items()}
            lines.append({"step": steps * t + k + 1, "iteration": t, **losses, **pair, **steps_too})
        write_parquet(root / f"evaluations/iteration_{t}.parquet", [solution(row, t, text) for row in range(12)])
    summary = {
        "recipe": f"{text}tiny", "engine": f"{text}transformers", "seconds": 200.0, "seed": 7,
        "tokens_per_second": {"rollout": 1234.0, f"{text}other": 4321.0}, "iterations": records,
        "phase_seconds": {"rollout": 150.0, f"{text}other": 50.0}, "model_parameters": 654321,
        "held_out_problems": 160, "counts": {"skipped_rows": 3, f"{text}other": f"{text}7"},
    }  # fmt: skip
    (root / "summary.json").write_text(json.dumps(summary))
    (root / "config.yaml").write_text(f"name: {text}tiny\nseed: 7\n")
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def edit_summary(run, change):
    summary = json.loads((run / "summary.json").read_text())
    change(summary)
    (run / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """What a browser sees: elements, attributes, all text, the rows of the tables, the captions of the figures."""

    def __init__(self, run):
        super().__init__()
        self.elements, self.attributes, self.text, self.rows, self.captions = Counter(), [], "", [], []
        self._open = None
        self.source = write_report(run).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._open = self.rows[-1]
        elif tag == "figcaption":
            self._open = self.captions
        if tag in ("td", "th", "figcaption"):
            self._open.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th", "figcaption"):
            self._open = None

    def handle_data(self, data):
        self.text += data
        if self._open is not None:
            self._open[-1] += data

    def row(self, name):
        return next(cells[1:] for cells in self.rows if cells[0] == name)


# ---- escaping and self-containment ----


def test_every_text_is_escaped(tmp_path):
    plain, hostile = Page(write_run(tmp_path / "plain")), Page(write_run(tmp_path / "hostile", text=HOSTILE))
    assert hostile.elements == plain.elements
    assert not [name for name, _ in hostile.attributes if name.startswith("on") or name == "src"]
    # Problem 4 is among the solutions that the page shows.
    tails = ("tiny", "tiny\nseed", "transformers", "What is 4 + 1?", "5", "1. 4 + 1 = 5", "Answer: 5", "other", "7")
    for tail in tails:
        assert HOSTILE + tail in hostile.text, tail


def test_the_page_loads_nothing(run):
    page = Page(run)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.elements)
    assert not {"src", "srcset", "data", "action", "poster", "background"} & {name for name, _ in page.attributes}
    assert [value for name, value in page.attributes if name.endswith("href")] == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|//\w", page.source)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


# ---- what is there, and what is not ----


def test_the_numbers_are_the_summarys(run):
    page, space = Page(run), "\u202f"
    assert page.row("M₀, before training") == [f"{x}{space}%" for x in ("25.0", "31.2", "62.5", "43.8")]
    assert page.row("M₂") == [f"{x}{space}%" for x in ("75.0", "81.2", "87.5", "18.8")]
    assert page.row("M₂ minus M₀, points") == ["+50.0", "+50.0", "+25.0", "\u221225.0"]
    heads = [cells for cells in page.rows if len(cells) == 7]
    assert heads[1] == ["M₀", "0.875", "0.910", "0.840", "0.973", "0.011", "0.600"]
    assert [cells[1] for cells in heads[1:]] == ["0.875", "0.812", "0.750"]
    assert f"Pass@1 rose from 25{space}% to 75{space}%" in page.text
    shares = (f"2 min 30 s, 75{space}%", f"50 s, 25{space}%")
    for fact in ("654,321", "1,234", "4,321", "3 min 20 s", *shares, "1.3e\u22125"):
        assert fact in page.text, fact
    labels = dict(re.findall(r'aria-label="([^":]+) by iteration: ([^"]+)"', page.source))
    assert labels["Pass@1"] == f"M₀ 25{space}%, M₁ 50{space}%, M₂ 75{space}%"
    assert labels["KL from the first model, nats a completion"] == "M₀ 0, M₁ 1.5, M₂ 3"
    counts = [Counter(state_of(row, t) for row in range(12)) for t in (0, 2)]
    for state in ("clean", "flawed", "wrong"):
        for count in counts:
            assert f">{count[state]} {state}</text>" in page.source


def state_of(row, iteration):
    made = solution(row, iteration)
    return "wrong" if not made["label"] else "clean" if all(made["step_labels"]) else "flawed"


def test_the_training_curves_stand_where_the_metrics_are(run):
    """One line for each stretch, and the stretches named after their models even when the first is not recorded."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(x for x in lines if json.loads(x)["iteration"] == 1))
    page = Page(run)
    assert page.captions[5:9] == ["Loss", "Reward margin, right minus wrong", "Outcome reward", "Step reward"]
    assert ">M₁ → M₂<" in page.source
    assert ">M₀ → M₁<" not in page.source
    assert "Loss over optimizer steps 5 to 8" in page.source


def drop(*keys):
    def change(summary):
        for key in keys:
            summary.pop(key, None)
            for record in summary["iterations"]:
                record.pop(key, None)

    return change


@pytest.mark.parametrize(
    ("file", "note", "gone"),
    [
        ("metrics.jsonl", "No training curves", "Loss over optimizer steps"),
        ("evaluations", "No sample solutions", "What became of every held-out problem"),
        ("config.yaml", "No config.yaml", "Configuration as resolved"),
    ],
)
def test_a_missing_file_leaves_its_section_out(run, file, note, gone):
    before = Page(run)
    assert note not in before.text
    assert gone in before.source
    (run / file).rename(run.parent / "elsewhere")
    after = Page(run)
    assert note in after.text
    assert gone not in after.source


@pytest.mark.parametrize(
    ("keys", "note", "gone"),
    [
        (["prm", "prm_f1"], "No measurements of the process-reward head", "AUROC"),
        (["completion_length", "kl_from_initial"], "No lengths or KL", "nats a completion"),
        (["phase_seconds"], 'No "phase_seconds"', "sampling solutions to train on"),
        (["maj@8"], "", "Maj@"),
        (["held_out_problems"], "", "95 % interval"),
        (["model_parameters"], "", "654,321"),
        (["seconds"], "", "3 min 20 s"),
        (["recipe"], "", "tiny ·"),
        (["engine"], "", "transformers"),
        (["seed"], "", "seed 7"),
        (["counts"], "", "Unusable rows"),
        (["tokens_per_second"], "", "1,234"),
        (["weight_sync_max_abs_logp_diff"], "", "1.3e\u22125"),
    ],
)
def test_a_missing_key_leaves_its_part_out(run, keys, note, gone):
    assert gone in Page(run).text
    edit_summary(run, drop(*keys))
    after = Page(run)
    assert note in after.text
    assert gone not in after.text


def test_the_least_summary_makes_a_page_of_notes(tmp_path):
    (tmp_path / "summary.json").write_text('{"iterations": [{"iteration": 0}]}')
    page = Page(tmp_path)
    assert "A run without a defined result." in page.text
    assert page.source.count('class="absent"') == 6


def test_null_is_shown_as_undefined(run):
    def nothing(value):
        if isinstance(value, dict):
            return {k: v if k == "iteration" else nothing(v) for k, v in value.items()}
        return [nothing(v) for v in value] if isinstance(value, list) else None

    edit_summary(run, lambda summary: summary.update(nothing(summary)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    empty = [{k: v if k in ("step", "iteration") else None for k, v in line.items()} for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, empty)))
    rows = [{**solution(row, 0), "prompt": None, "answer": None, "step_probs": None} for row in range(12)]
    for t in range(3):
        write_parquet(run / f"evaluations/iteration_{t}.parquet", rows, schema=solutions_schema())
    page = Page(run)
    assert page.row("M₀, before training") == ["\u2013"] * 4
    assert page.source.count(">undefined</text>") == 3 * 4  # three models, four rates
    assert "No training curves" in page.text
    assert not re.search(r"\b(None|null|nan|inf)\b", re.sub(r"or null|<style>.*</style>", "", page.text))


def solutions_schema():
    numbers = {"step_labels": pa.list_(pa.int8()), "step_probs": pa.list_(pa.float32())}
    numbers["completion_tokens"] = pa.int32()
    texts = {"prompt": pa.string(), "answer": pa.string(), "completion": pa.string(), "steps": pa.list_(pa.string())}
    return pa.schema({"problem_id": pa.int64(), "label": pa.bool_(), **texts, **numbers})


def test_one_undefined_rate_is_not_a_zero(run):
    edit_summary(run, lambda summary: summary["iterations"][0].update(flawed_correct=None))
    page = Page(run)
    assert page.row("M₀, before training")[3] == "\u2013"
    assert page.row("M₂ minus M₀, points")[3] == "\u2013"
    assert re.search(r"Right with a wrong step by iteration: M₀ undefined, M₁ 31", page.source)


def test_the_engine_writes_what_the_report_reads(tmp_path, problems, rollouts):
    from stepkto_fast.collect import Asked
    from stepkto_fast.recipe import Recipe
    from stepkto_fast.task import ArithmeticTask

    run = write_run(tmp_path / "run", iterations=1)
    for r in rollouts:
        r.step_probs = [0.5 for _ in r.steps]
    asked = [Asked(r.problem_id, problems[r.problem_id], r.prompt, r.prompt_ids) for r in rollouts]
    counts, hits = [3] * len(rollouts), [True] * len(rollouts)
    write_solutions(rollouts, counts, hits, ArithmeticTask(Recipe()), asked, run / "evaluations/iteration_0.parquet")
    page = Page(run)
    shown = next(r for r in rollouts if not r.label)
    assert shown.prompt.strip() in page.text
    assert shown.steps[0].strip() in page.text


def test_a_run_that_has_only_m0(tmp_path):
    page = Page(write_run(tmp_path / "run", iterations=1))
    said = "M₀ solves 25\u202f% of the held-out problems; 44\u202f% of its right answers have a wrong step."
    assert said in page.text
    assert "has not trained it yet" in page.text
    assert "M₁" not in page.text
    assert "No training curves" in page.text
    assert not [cells for cells in page.rows if "minus" in cells[0]]


def test_one_update_step_and_constant_curves(tmp_path):
    page = Page(write_run(tmp_path / "run", iterations=2, steps=1))
    assert "one round of" in page.text
    assert "Loss over optimizer steps 1 to 1" in page.source
    drawn = re.findall(r'<path d="([^"]+)" class="line (?:second|third|accent)"', page.source)
    assert len(drawn) == 4 + 2 + 3 + 2  # rates by iteration, drift by iteration, loss lines, margin lines
    assert all("L" in d for d in drawn), "a path of one point is not drawn"
    assert "nan" not in page.source


def test_the_majority_is_the_runs_own(run):
    def rename(summary):
        for record in summary["iterations"]:
            record["maj@4"] = record.pop("maj@8")

    edit_summary(run, rename)
    page = Page(run)
    assert page.rows[0] == ["Model", "Pass@1", "Maj@4", "Step accuracy", "Right with a wrong step"]
    assert "writes 4 solutions" in page.text
    assert page.row("M₂")[1] == "81.2\u202f%"


# ---- broken files ----


def damage_metrics(row, line):
    def damage(run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        lines[row] = line
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return damage


def damage_summary(change):
    return lambda run: edit_summary(run, change)


def damage_row(**values):
    def damage(run):
        rows = [solution(row, 1) for row in range(12)]
        rows[5] |= values
        write_parquet(run / "evaluations/iteration_1.parquet", rows)

    return damage


def damage_column(name, values):
    def damage(run):
        path = run / "evaluations/iteration_1.parquet"
        table = pq.read_table(path).drop_columns(name)
        pq.write_table(table if values is None else table.append_column(name, pa.array(values)), path)

    return damage


BROKEN = {
    "no summary": (lambda run: (run / "summary.json").unlink(), r"summary\.json does not exist; give the directory"),
    "no JSON": (lambda run: (run / "summary.json").write_text('{"a": '), r"summary\.json is not JSON .*restore it"),
    "no text": (lambda run: (run / "summary.json").write_bytes(b"\xff\xfe\x00"), r"summary\.json is not JSON"),
    "a list": (lambda run: (run / "summary.json").write_text("[]"), r"summary\.json: 'iterations' must be a list"),
    "no M_0": (damage_summary(lambda s: s.update(iterations=[])), "'iterations' must be a list .*run the training"),
    "which": (damage_summary(lambda s: s["iterations"][1].update(iteration="1")), r"iterations\[1\].*got '1'; set it"),
    "text": (damage_summary(lambda s: s["iterations"][2].update({"pass@1": "x"})), r"\[2\]: 'pass@1' is 'x'.*write a"),
    "rate": (
        damage_summary(lambda s: s["iterations"][0].update({"pass@1": 51.6})),
        r"\[0\]: 'pass@1' is 51.6; write a",
    ),
    "bins": (damage_summary(lambda s: s["iterations"][0]["prm"].update(bins=[3])), "'bins' is not a list.*leave"),
    "bins too": (damage_summary(lambda s: s["iterations"][0]["prm"].update(bins=3)), "'bins' is not a list.*leave"),
    "prm": (damage_summary(lambda s: s["iterations"][0].update(prm=3)), "'prm' is 3, not a JSON object; write"),
    "metrics": (damage_metrics(2, '{"loss": '), r"metrics\.jsonl, line 3 is not JSON .*delete that line"),
    "no step": (damage_metrics(2, '{"loss": 1}'), r"metrics\.jsonl, line 3: .*'step' and 'iteration'; delete it"),
    "loss": (damage_metrics(2, '{"loss": "x", "step": 1, "iteration": 0}'), r"metrics\.jsonl, step 1: 'loss' is 'x'"),
    "garbage": (
        lambda run: (run / "evaluations/iteration_1.parquet").write_bytes(b"PAR1 garbage PAR1"),
        r"iteration_1\.parquet cannot be read .*delete it",
    ),
    "cut off": (
        lambda run: os.truncate(run / "evaluations/iteration_1.parquet", 900),
        r"iteration_1\.parquet cannot be read .*delete it",
    ),
    "no column": (damage_column("steps", None), r"iteration_1\.parquet: no column 'steps'; delete the file"),
    "column": (damage_column("steps", ["text"] * 12), r"iteration_1\.parquet cannot be read .*delete it"),
    "null": (damage_row(steps=None), r"iteration_1\.parquet, row 5: 'steps' is null; delete"),
    "lengths": (damage_row(step_labels=[1]), r"parquet, row 5: 2 'steps', 1 'step_labels' .*delete"),
    "problems": (damage_row(problem_id=99), r"iteration_1\.parquet: its 'problem_id's are not those .*delete"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_a_remedy(run, name, capsys):
    damage, message = BROKEN[name]
    (run / "report.html").write_text("the old report")
    damage(run)
    with pytest.raises(RunError, match=message):
        write_report(run)
    assert report.main([str(run)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert (run / "report.html").read_text() == "the old report"


def test_a_cut_off_last_line_is_left_out_and_counted(run):
    text = (run / "metrics.jsonl").read_text()
    whole = Page(run)
    assert "cut-off line" not in whole.text
    (run / "metrics.jsonl").write_text(text + '{"step": 9, "iteration": 1, "lo')
    cut = Page(run)
    assert "1 cut-off line at the end of metrics.jsonl is left out." in cut.text
    assert cut.source.count("<svg") == whole.source.count("<svg")
    assert "Loss over optimizer steps 1 to 8" in cut.source


def test_a_step_that_was_written_again_counts_once(run):
    once = Page(run).source
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [json.dumps({**json.loads(line), "loss": 100}) for line in lines[1:3]]
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *again, *lines[1:]]))
    assert Page(run).source == once


# ---- writing ----


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_an_old_report_survives_a_failing_write(run, monkeypatch, broken):
    (run / "report.html").write_text("the old report")
    before = sorted(run.iterdir())

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    if broken == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert report.main([str(run)]) == 1
    assert (run / "report.html").read_text() == "the old report"
    assert sorted(run.iterdir()) == before


def command(*arguments, hash_seed="0"):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    called = [sys.executable, "-m", "stepkto_fast.report", *map(str, arguments)]
    return subprocess.run(called, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)


def test_the_command_line_writes_the_same_bytes_from_the_same_files(run):
    pages = []
    for hash_seed in ("1", "2"):
        done = command(run, hash_seed=hash_seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")
        pages.append((run / "report.html").read_bytes())
        (run / "report.html").unlink()
    assert pages[0] == pages[1]


def test_the_command_line_says_what_is_wrong(run):
    done = command(run.parent / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "nowhere/summary.json does not exist" in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["a", "b"], 2), (["--what"], 2), (["--help"], 0)])
def test_the_command_line_has_a_usage(arguments, code, capsys):
    assert report.main(arguments) == code
    said = capsys.readouterr()
    assert "usage: python -m stepkto_fast.report RUN_DIR" in said.err + said.out


def test_a_report_that_cannot_be_written_is_an_error_message(run, capsys):
    (run / "report.html").mkdir()
    assert report.main([str(run)]) == 1
    assert re.fullmatch(r"error: the report cannot be written: .*report\.html.*\n", capsys.readouterr().err)


# ---- parts ----


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (1.5, "1.5"), (39.958, "40"), (999.9, "1,000"), (12345.6, "12,346"), (0.0125, "0.0125"),
     (7.63e-6, "7.6e\u22126"), (-0.25, "\u22120.25"), (None, "\u2013")],
)  # fmt: skip
def test_significant(value, said):
    assert significant(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "\u2013"), (4.79, "4.79 s"), (61, "1 min 1 s"), (119.6, "2 min 0 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_points_have_a_sign_unless_they_are_nothing():
    assert [points(x) for x in (0.123, -0.05, 0.0001, -0.0001, None)] == ["+12.3", "\u22125.0", "0.0", "0.0", "\u2013"]


def test_wilson_is_the_textbooks():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148 and 0 of 20.
    for count, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(count / trials, trials) == pytest.approx((low, high), abs=5e-5)


def test_chance_of_an_auroc_is_mann_whitneys():
    """Against the spread of the AUROC of random scores."""
    rng = np.random.default_rng(0)
    label = np.arange(40) < 15
    drawn = [auroc(rng.random(40), label) for _ in range(4000)]
    # the standard deviation of 4000 draws is known to 1 %
    assert auroc_chance(15, 40) == pytest.approx(1.96 * float(np.std(drawn)), rel=0.05)
    assert auroc_chance(0, 40) is auroc_chance(40, 40) is None


def test_the_headline_says_fell_rose_and_stayed():
    space = "\u202f"
    assert headline([0.5, 0.75], [0.4, 0.1]) == (
        f"Pass@1 rose from 50{space}% to 75{space}%; right answers with a wrong step fell from 40{space}% to 10{space}%"
    )
    assert headline([0.501, 0.503], [None, 0.1]) == f"Pass@1 rose from 50.1{space}% to 50.3{space}%"
    assert headline([0.5, 0.5], [None, None]) == f"Pass@1 stayed at 50.0{space}%"


def test_axis_labels_are_where_they_say(run):
    """Ticks a quarter apart written with one digit would read 0.2, 0.5, 0.8."""
    for low, high in ((0, 1), (0.2, 0.9), (0, 9), (-3.1, 0.4), (0.69, 0.69), (0, 1000)):
        ticks = report.figures._ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        step = ticks[1] - ticks[0]
        assert float(f"{step:.0e}") == pytest.approx(step), "one digit says it"


def of_state(row, state):
    steps = (True, state == "clean")
    return Solution(row, "prompt", "answer", ("a", "b"), state != "wrong", steps, (None, None))


def test_samples_are_the_first_of_each_kind_and_fill_up():
    before = ["wrong"] * 6 + ["flawed"] * 3 + ["clean"] * 3
    after = ["clean"] * 4 + ["wrong"] * 2 + ["clean"] * 3 + ["clean", "wrong", "flawed"]
    columns = {0: before, 2: after}
    samples = choose_samples({t: [of_state(n, s) for n, s in enumerate(x)] for t, x in columns.items()})
    chosen = [sample.solutions[0][1].problem_id for sample in samples]
    assert chosen == [0, 1, 2, 3, 6, 7, 4, 10]
    assert [t for t, _ in samples[0].solutions] == [0, 2]
    assert samples[0].reason.startswith("Fixed")


def test_samples_of_m0_alone():
    samples = choose_samples({0: [of_state(n, s) for n, s in enumerate(["clean", "wrong", "flawed"] * 5)]})
    assert [s.solutions[0][1].state for s in samples] == ["flawed"] * 3 + ["wrong"] * 3 + ["clean"] * 2
    assert all(len(sample.solutions) == 1 for sample in samples)


def test_negative_and_vanishing_values_stay_inside_the_figure():
    for values in ([0.0, -0.3, 2.0], [0.0], [0.0, 0.0], [-1e-5, 0.0]):
        figure = report.figures.by_iteration("KL", range(len(values)), values, significant)
        heights = [float(y) for y in re.findall(r'cy="([^"]+)"', figure)]
        assert all(24 <= y <= 142 for y in heights), values
