"""The study's page on results made by hand: it finds what was planted and nothing else, whatever is missing."""

import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from made_study import NULL, PLANTED, Maker, fail, part, text_of

from stepkto_fast.errors import RunError
from stepkto_fast.study import findings, heads, page, pictures
from stepkto_fast.study.findings import ARMS
from stepkto_fast.study.results import load
from stepkto_fast.study.statistics import METRICS, Estimate, Study
from stepkto_fast.study.words import gap

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Maker(folder).study().search().ablations()
    return folder


def test_the_planted_winner_is_found(whole):
    text = text_of(whole)
    short = part(text, "In short")
    assert re.match(
        r"\*\*Yes: `step_kto` has a higher Pass@1 \(easy \+[\d.]+ points \[.*?\], hard \+.*?\) and fewer flawed right "
        r"answers \(easy -.*?\) than `kto`\. Finished seeds: easy 5 of 5 and hard 5 of 5\.\*\*",
        short,
    )
    assert "With the step labels of a PRM head? Yes: `step_kto_prm` has a higher Pass@1" in short
    rows = {line.split(":")[0]: line for line in text.splitlines() if line.startswith(("| Step", "| A PRM"))}
    assert rows["| Step labels or none"].count("better**") == 4
    assert "**" not in rows["| A PRM's labels or exact ones"]
    found = part(text, "Results")
    assert "`step_kto` minus `kto` from M_1 on: in Pass@1 it moves in favour of `step_kto` on hard (+" in found
    assert "; in flawed right answers it moves in favour of `step_kto` on easy (-" in found
    assert "Lost form" not in found
    assert "Pass@1, easy and hard: label steps where they can be checked (+" in part(text, "Advice")
    assert "the paper's sign at M_1, M_2 and M_3, shown at" in part(text, "Against the paper")
    for section in ("What has been run", "Results", "Longer chains", "Ablations", "Search", "Limits"):
        assert part(text, section)
    assert "nan" not in text
    assert "None" not in text


def test_a_null_shows_nothing(tmp_path):
    Maker(tmp_path, effects=NULL).study()
    text = text_of(tmp_path)
    short = part(text, "In short")
    assert "Not shown either way: no difference could be shown between `step_kto` and `kto` in Pass@1 (easy" in short
    for word in ("a higher", "a lower", "fewer flawed", "more flawed", "better**", "worse**"):
        assert word not in short
    assert "label steps" not in part(text, "Advice")
    assert "could not be shown to change" in part(text, "Results")
    assert "flawed right answers could not be shown to change with `kto` (" in part(text, "Against the paper")
    assert "show no change" not in text


def test_a_planted_loser_is_behind(tmp_path):
    Maker(tmp_path, effects={"kto": (2.0, 2.0), "step_kto": (0.4, 0.2)}).study()
    text = text_of(tmp_path)
    assert "No: `step_kto` has a lower Pass@1 (easy -" in part(text, "In short")
    assert " and more flawed right answers (easy +" in part(text, "In short")
    assert "Pass@1, easy and hard: watch Pass@1 when you label steps (-" in part(text, "Advice")
    assert "the opposite is shown at" in part(text, "Against the paper")


def test_levels_and_counts_are_those_of_the_files(whole):
    records = [r for r in load(whole) if (r["stage"], r["difficulty"], r["name"]) == ("main", "easy", "kto")]
    right = "".join(r["greedy"][-1]["right"] for r in records)
    flawed = sum(
        x == "1" and first != "0"
        for r in records
        for x, first in zip(r["greedy"][-1]["right"], r["greedy"][-1]["first_error"], strict=True)
    )
    text = text_of(whole)
    row = next(line for line in text.splitlines() if line.startswith("| `kto` | ") and "seeds" not in line)
    assert f"| `kto` | {100 * right.count('1') / len(right):.1f} [" in row
    assert f"| {100 * flawed / right.count('1'):.1f} [" in row
    # 300 prompts of 8 completions, 3 iterations, 6 steps each; the checker's labels only where the arm has them.
    outcomes, steps = f"{300 * 8 * 3:,}", f"{300 * 8 * 3 * 6:,}"
    labels = {line.split(" | ")[0]: line for line in text.splitlines() if "300 x 8" in line}
    assert f"| {outcomes} | {steps} | no | 100 |" in labels["| `step_kto`"]
    assert f"| {outcomes} | no | 2,400 solutions, about 14,400 step labels | 100 |" in labels["| `step_kto_prm`"]
    assert f"| no | {steps} | no | 100 |" in labels["| `step_only`"]
    assert "250 |" in part(text, "Method")
    assert "matched with more prompts by checked solutions, not by labels" in part(text, "Method")
    assert "`engine: transformers`: for a model this small on one core faster than vLLM" in part(text, "Method")


def test_an_advantage_that_shrinks_moves_in_favour_of_the_other(tmp_path):
    Maker(tmp_path).study()
    # Between M_1 and M_3, step_kto has an advantage with one of them alone: first on easy chains, last on hard ones.
    for difficulty, same in (("easy", 3), ("hard", 1)):
        for seed in range(5):
            paths = [tmp_path / "main" / difficulty / arm / f"seed_{seed}.json" for arm in ("kto", "step_kto")]
            kto, step_kto = (json.loads(path.read_text()) for path in paths)
            kto["greedy"][4 - same], step_kto["greedy"][4 - same] = kto["greedy"][0], step_kto["greedy"][3]
            kto["greedy"][same] = step_kto["greedy"][same]
            paths[0].write_text(json.dumps(kto))
            paths[1].write_text(json.dumps(step_kto))
    made = findings.Page(Study(load(tmp_path), 500), findings.FAMILY, {})
    for metric, signs in (("pass@1", "-+"), ("flawed_correct", "+-")):
        told = findings.growth(made, "step_kto", "kto", metric)
        assert told is not None
        assert re.search(rf"in favour of `kto` on easy \({re.escape(signs[0])}", told)
        assert re.search(rf"in favour of `step_kto` on hard \({re.escape(signs[1])}", told)


def test_no_bound_that_is_not_0_reads_0():
    told = gap(Estimate(-0.0144, -0.0286, -0.00002, 5), METRICS["flawed_correct"])
    assert told == "-1.440 points [-2.860, -0.002]"


def test_the_drift_figure_has_no_share_above_1(tmp_path):
    Maker(tmp_path, drift=-0.016).study(("hard",), 2)
    made = findings.Page(Study(load(tmp_path), 500), findings.FAMILY, {})
    run = ("main", "hard", "step_kto_prm")
    assert max(heads.head(made, run, t).high for t in range(4)) > 1
    (panel,) = pictures._drift_panels(made)
    assert max(e.high for e in panel.lines["step_kto_prm"]) == 1.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: [fail(m.run("main", "easy", "step_kto", s), 2) for s in (1, 3)],
         "So far: `step_kto` has a higher Pass@1 (easy +.*Finished seeds: easy 3 of 5; hard not answered yet; 2 runs "
         "of `step_kto` failed."),
        (lambda m: m.study(("hard",)) and fail(m.run("main", "hard", "kto", 2), 2),
         "Yes: `step_kto` has .*Finished seeds: easy 5 of 5 and hard 4 of 5; 1 run of `kto` failed."),
        (lambda m: m.study(("hard",), 1),
         "So far: `step_kto` has .*too few seeds for a verdict on `step_kto` minus `kto`, so far Pass@1 (hard +.*"
         "Finished seeds: easy 5 of 5 and hard 1 of 5."),
    ],
    ids=["failed runs and a difficulty missing", "complete, one failed", "one seed of a difficulty"],
)  # fmt: skip
def test_the_answer_says_what_it_rests_on(tmp_path, change, expected):
    maker = Maker(tmp_path, effects={name: PLANTED[name] for name in ("kto", "step_kto")}).study(("easy",))
    change(maker)
    pattern = ".*".join(map(re.escape, expected.split(".*")))
    study = Study([r for r in load(tmp_path)], 500)
    for text in (part(page.page_text(study, {}), "In short"), " ".join(page.readme_block(study).split())):
        assert re.search(pattern, text), text
    assert ("1 failed" in page.readme_block(study)) == ("1 run of" in expected)


def test_drift_is_that_of_auroc_not_of_f1(tmp_path):
    # F1 falls in both, as fewer steps are wrong.
    Maker(tmp_path / "a", 60, drift=0.04).study(("easy",), 3)
    Maker(tmp_path / "b", 60, drift=0.0).study(("easy",), 3)
    falling, flat = (text_of(tmp_path / name) for name in "ab")
    title = "Does self-labelling drift?"
    assert "Self-labelling drifts: the PRM head tells right from wrong steps less well" in part(falling, title)
    assert "its AUROC falls over the iterations" in part(falling, "Advice")
    assert "No drift could be shown" in part(flat, title)
    assert "Self-labelling drifts" not in flat
    assert "AUROC" not in part(flat, "Advice")
    assert "| `step_kto_prm`, easy: F1, test | 90.0 [90.0, 90.0] | 80.0" in part(flat, title)
    assert "| `step_kto_prm`, easy: wrong steps, test | 10.0 [10.0, 10.0] | 8.0" in part(flat, title)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.01, -0.04, 0.05, 5), "Pass@1, easy: they hardly matter, within 5 points (+1.0)"),
        (Estimate(0.01, -0.04, 0.051, 5), None),
        (Estimate(0.01, -0.04, 0.05, 4), None),
        (Estimate(0.04, 0.03, 0.05, 2), "Pass@1, easy: label steps where they can be checked (+4.0)"),
        (Estimate(0.04, math.nan, math.nan, 1), None),
    ],
    ids=["narrow", "wide", "seeds missing", "shown", "one seed"],
)
def test_advice_needs_a_difference_or_a_narrow_interval(tmp_path, monkeypatch, estimate, expected):
    Maker(tmp_path, 40, {"kto": (0.8, 0.3), "step_kto": (0.8, 0.3)}).study(("easy",), 1)
    study = Study(load(tmp_path), 50)
    monkeypatch.setattr(study, "difference", lambda a, b, where, metric: estimate if metric == "pass@1" else None)
    found = part(page.page_text(study, {}), "Advice")
    if expected:
        assert expected in found
    else:
        assert (
            "Nothing yet: too little has been shown. Too wide, or of too few seeds, to say: `step_kto` - `kto`" in found
        )


def test_difficulties_are_told_apart_in_one_advice(tmp_path):
    maker = Maker(tmp_path, effects={"kto": (0.4, 0.2), "step_kto": (2.4, 2.4)}).study(("easy",))
    maker.effects = {"kto": (2.4, 2.4), "step_kto": (0.4, 0.2)}
    text = text_of(maker.study(("hard",)).folder)
    assert "Mixed: `step_kto` has a higher Pass@1 (easy +" in part(text, "In short")
    advice = part(text, "Advice")
    assert re.search(r"easy: label steps where they can be checked \(\+.*?\); hard: watch Pass@1", advice)


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    text = text_of(Maker(tmp_path, 60).study(("easy",), 1).ablations(seeds=1).folder)
    short = part(text, "In short")
    assert "Not answered yet: too few seeds for a verdict on `step_kto` minus `kto`, so far Pass@1 (easy +" in short
    assert "one seed has no interval" in short
    assert not re.search(r"\[[-+]?\d", text)
    assert "1 seed an arm" in part(text, "Limits")
    assert "From M_0 to M_3" not in part(text, "Against the paper")


def test_differences_of_fewer_seeds_are_marked(tmp_path):
    maker = Maker(tmp_path, 60).study(("easy",), 2)
    for arm in ("kto", "step_kto"):
        maker.run("main", "easy", arm, 2)
    rows = [line for line in text_of(tmp_path).splitlines() if line.startswith(("| Step labels or", "| Both losses"))]
    assert "seeds)" not in rows[0]
    assert rows[1].count("(2 seeds)") == 2
    assert "Finished seeds, of 5 planned: easy 3" in " ".join(text_of(tmp_path).split())


def test_the_last_greedy_evaluation_of_a_run_is_that_of_its_last_model(tmp_path):
    path = Maker(tmp_path, 40, {"kto": (0.8, 0.3)}).run("main", "easy", "kto", 0)
    record = json.loads(path.read_text())
    record["final"]["test"]["greedy"] |= {"right": "0" * 40}
    path.write_text(json.dumps(record))
    study, run = Study(load(tmp_path), 50), ("main", "easy", "kto")
    assert study.level(run, "test", "pass@1").value == study.level(run, 3, "pass@1").value > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.search(),
        lambda m: m.initial("easy", 0),
        lambda m: m.run("main", "easy", "kto", 0),
        lambda m: (m.run("main", "easy", "kto", 0), m.run("main", "easy", "step_kto", 1)),
        lambda m: (m.run("main", "hard", "step_kto", 0), m.run("main", "hard", "kto", 0)),
        lambda m: m.ablations(),
        lambda m: m.run("main", "easy", "an_arm_of_its_own", 0, "kto"),
    ],
    ids=["search alone", "M_0 alone", "one arm", "no common seed", "one seed", "ablations without base", "unknown arm"],
)
def test_partial_results_make_a_page(tmp_path, make):
    make(Maker(tmp_path / "results", problems=40))
    docs = tmp_path / "docs"
    text = page.write_page(tmp_path / "results", docs, docs / "images", resamples=100, every=True).read_text()
    assert "Not answered yet: " in part(text, "In short")
    assert "Not run yet, main, easy" in text
    assert not re.search(r"\bnan\b|None|\*\*[-+]", text)
    assert "a higher Pass@1" not in text
    for image in re.findall(r"\]\((.*?\.png)\)", text):
        assert (docs / image).is_file()


def test_what_is_missing_is_named(tmp_path):
    maker = Maker(tmp_path).study(("easy",), 2)
    maker.run("main", "easy", "kto", 2)
    maker.run("main", "easy", "kto", 3, failed="it diverged", greedy=[], iterations=[], rollouts=[], final={})
    found = part(text_of(tmp_path), "What has been run")
    assert "`kto` (4 of 5 seeds); `rft`, `kto_more`, `dpo`, `step_only`, `step_kto` and `step_kto_prm` (2 of 5" in found
    assert "Not run yet, main, hard: all 7 arms." in found
    assert "Failed: 1 of arms." in found
    assert "Failed, and in no comparison: `kto` (easy, seed 3)." in part(text_of(tmp_path), "Limits")
    assert "| easy | 4 to 6 | 7 to 9 | 250 | 230 | 30 |" in part(text_of(tmp_path), "Method")
    row = next(line for line in text_of(tmp_path).splitlines() if line.startswith("| `kto` | "))
    assert row.endswith("| 3 |")  # those that finished


def test_a_failed_run_counts_at_no_iteration(tmp_path):
    maker = Maker(tmp_path, effects={"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 3)
    fail(maker.run("main", "easy", "kto", 3), 2)
    maker.run("main", "easy", "step_kto", 3)
    study, runs = Study(load(tmp_path), 200), [("main", "easy", name) for name in ("step_kto", "kto")]
    for where in (0, 1, 3, "test", "shifted"):
        assert study.difference(*runs, where, "pass@1").seeds == 3
    assert study.over(runs[1], lambda record: record["iterations"][1]["pass@1"]).seeds == 3


def test_another_start_is_found_out(tmp_path):
    maker = Maker(tmp_path, effects={"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 2)
    confirmed = "The result files confirm the common start."
    assert confirmed in part(text_of(tmp_path), "Method")
    path = maker.run("main", "easy", "kto", 1, initial_weights="others")
    contradicted = "The files contradict this: runs start from different models in easy, seed 1."
    assert contradicted in part(text_of(tmp_path), "Method")
    maker.run("main", "easy", "kto", 1)
    record = json.loads(path.read_text())
    record["greedy"][0]["right"] = record["greedy"][1]["right"]
    path.write_text(json.dumps(record))
    assert contradicted in part(text_of(tmp_path), "Method")
    maker.run("main", "easy", "kto", 1)
    path = maker.initial("easy", 1)
    record = json.loads(path.read_text())
    record["test"]["greedy"]["right"] = record["test"]["greedy"]["right"].translate({48: 49, 49: 48})
    path.write_text(json.dumps(record))
    assert contradicted in part(text_of(tmp_path), "Method")
    alone = Maker(tmp_path / "alone", 40).run("main", "easy", "kto", 0).parents[3]
    assert confirmed not in text_of(alone)  # of one run a seed nothing is common


def test_everything_is_drawn_and_written(whole, tmp_path):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text("# A\n\n<!-- study: start -->\nold\n<!-- study: end -->\n\nend\n")
    (docs / "images").mkdir(parents=True)
    (docs / "images" / "study-gone.png").write_bytes(b"")
    path = page.write_page(whole, docs, docs / "images", resamples=50, every=True)
    names = ("main", "arms", "differences", "shifted", "drift", "ablations")
    assert {p.name for p in (docs / "images").iterdir()} == {f"study-{name}.png" for name in names}
    assert all((docs / "images" / f"study-{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    section = readme.read_text()
    assert section.startswith("# A\n\n<!-- study: start -->\n![")
    assert section.endswith("<!-- study: end -->\n\nend\n")
    assert "(docs/images/study-main.png)" in section
    assert "[study](docs/study.md)" in section
    assert "**Yes: `step_kto` has a higher Pass@1 (easy +" in " ".join(section.split())
    assert "70 runs of arms, 9 runs of ablations and 3 runs of the search for settings" in " ".join(section.split())
    assert "old" not in section
    text = path.read_text()
    assert all(f"images/study-{name}.png" in text for name in names)
    # Wrapped, but for tables and links.
    assert all(len(line) <= 120 or line.startswith(("|", "!", "    ")) for line in text.splitlines())


def test_the_results_tell_the_family(tmp_path):
    maker = Maker(tmp_path / "results", 40, {"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)})
    maker.study(("long",), 2)
    docs = tmp_path / "docs"
    text = page.write_page(tmp_path / "results", docs, docs / "images", 50, every=True).read_text()
    assert "Run in part, main, long: `kto` and `step_kto` (2 of 3 seeds)." in text
    assert "main, easy" not in text
    assert "faster than vLLM" not in text  # on a GPU nobody knows


def test_hours_of_resumed_runs_are_a_bound(tmp_path):
    maker = Maker(tmp_path, 40, {"kto": (0.8, 0.3)}).study(("easy",), 2)
    assert "2 runs of arms and 2 initial models, in 0.1 CPU hours" in part(text_of(tmp_path), "What has been run")
    maker.run("main", "easy", "kto", 1, resumed=True)
    text = text_of(tmp_path)
    assert "in at least 0.1 CPU hours" in part(text, "What has been run")
    assert "| no | 100 |" in part(text, "Method")
    maker.run("main", "easy", "kto", 0, resumed=True)
    maker.run("main", "easy", "kto", 1)
    assert "| no | 107 |" in part(text_of(tmp_path), "Method"), "of a part of a run nobody knows the seconds"


def test_texts_and_figures_are_the_same_each_time(tmp_path):
    Maker(tmp_path, 60, {"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 3)
    first, second = (Study(load(tmp_path), 100) for _ in range(2))
    assert page.page_text(first, {}) == page.page_text(second, {})
    assert page.readme_block(first) == page.readme_block(second)
    assert pictures.pictures(first)["main"]() == pictures.pictures(second)["main"]()


def test_a_readme_without_both_markers_in_order(tmp_path):
    Maker(tmp_path / "results", 40).initial("easy", 0)
    readme, study = tmp_path / "README.md", Study(load(tmp_path / "results"), 50)
    readme.write_text("no markers\n")
    assert readme not in page.texts(study, tmp_path / "docs", tmp_path / "images")
    readme.write_text("<!-- study: end --> <!-- study: start -->\n")
    with pytest.raises(RunError, match="once each"):
        page.texts(study, tmp_path / "docs", tmp_path / "images")


def test_results_of_settings_that_the_study_has_no_more_are_left_out(whole, tmp_path):
    text = page.write_page(whole, tmp_path / "docs", tmp_path / "docs" / "images", resamples=50).read_text()
    assert "Not answered yet" in text, "only the M_0 of these results are current"


def test_the_command(whole, tmp_path, capsys):
    assert page.main([str(tmp_path / "nothing")]) == 1
    assert "holds no result of the study" in capsys.readouterr().err
    assert page.main(["--results", "x"]) == 2


def test_every_planned_arm_and_variant_is_described():
    from stepkto_fast.study import findings, plan

    assert set(plan.ARMS) <= set(ARMS)
    assert set(plan.ABLATIONS) <= set(findings.VARIANTS)


def test_the_documents_are_those_of_the_results(tmp_path):
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    written = page.write_page(ROOT / "docs" / "study" / "results", tmp_path / "docs", tmp_path / "docs" / "images")
    again = "run python -m stepkto_fast.study.page"
    assert written.read_text() == (ROOT / "docs" / "study.md").read_text(), again
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), again
    images = {path.name for path in (ROOT / "docs" / "images").glob("study-*.png")}
    assert {path.name for path in (tmp_path / "docs" / "images").glob("*.png")} == images, again
