"""The study's page on results made by hand: it finds what was planted and nothing else, whatever is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from stepkto_fast.errors import RunError
from stepkto_fast.study import page
from stepkto_fast.study.findings import ARMS
from stepkto_fast.study.pictures import pictures
from stepkto_fast.study.results import DIGITS, VERSION, load
from stepkto_fast.study.statistics import Study

ITERATIONS = 3
# What an arm adds to M_0's logits after three iterations: of right answers, and of answers without a flaw.
PLANTED = {
    "rft": (0.6, 0.2), "kto": (0.8, 0.3), "kto_more": (0.9, 0.3), "dpo": (0.7, 0.2), "step_only": (0.9, 1.6),
    "step_kto": (2.4, 2.4), "step_kto_prm": (2.4, 2.4),
}  # fmt: skip
NULL = dict.fromkeys(PLANTED, (0.8, 0.3))


class Maker:
    """Writes result files below `folder`: solutions of `problems` problems with effects of seeds and of problems."""

    def __init__(self, folder, problems=250, effects=None):
        self.folder, self.problems, self.effects = folder, problems, effects or PLANTED
        self.hardness = np.random.default_rng(7).normal(size=problems)

    def evaluation(self, rng, right, clean, problems):
        def happens(logit):
            return rng.random(problems) < 1 / (1 + np.exp(self.hardness[:problems] - logit))

        steps = rng.integers(4, 8, problems)
        solved, flawless = happens(right), happens(clean)
        first = np.where(flawless & solved, 0, rng.integers(1, steps + 1))
        return {
            "right": "".join(str(int(x)) for x in solved), "first_error": "".join(DIGITS[x] for x in first),
            "steps": "".join(DIGITS[x] for x in steps), "tokens": 40.0 + right,
        }  # fmt: skip

    def samples(self, rng, right, clean, problems):
        chance = 1 / (1 + np.exp(self.hardness[:problems] - right))
        hits = rng.binomial(8, chance)
        return {
            "greedy": self.evaluation(rng, right, clean, problems), "k": 8,
            "samples_right": "".join(map(str, hits)), "majority_right": "".join(str(int(x > 4)) for x in hits),
        }  # fmt: skip

    def run(self, stage, difficulty, name, seed, arm=None, effect=None, **more):
        arm = arm or name
        right, clean = effect or self.effects[arm]
        level = 0.6 if difficulty == "easy" else -0.2
        of_run = np.random.default_rng([seed, sum(map(ord, stage + difficulty + name))])
        first = np.random.default_rng([seed, 99])
        start = level + 0.1 * first.normal()
        noise = 0.05 * of_run.normal(size=2)
        greedy, head = [self.evaluation(first, start, 0.5, self.problems)], arm == "step_kto_prm"
        for t in range(1, ITERATIONS + 1):
            share = t / ITERATIONS
            logits = start + share * right + noise[0], 0.5 + share * clean + noise[1]
            greedy.append(self.evaluation(of_run, *logits, self.problems))
        iterations = [
            {"iteration": t, "pass@1": greedy[t]["right"].count("1") / self.problems, "flawed_correct": 0.1,
             "step_accuracy": 0.9 + 0.02 * t, "prm_f1": 0.9 - 0.04 * t + 0.01 * of_run.random() if head else None,
             "kl_from_initial": 0.5 * t, "completion_length": 40.0, "truncated": 0.0}
            for t in range(ITERATIONS + 1)
        ]  # fmt: skip
        rollouts = [
            {"accuracy": 0.5, "truncated": 0.0, "step_labels/right": 0.9, "step_labels/labelled": 1.0,
             "prm/f1": 0.8 if head else None, "prm/precision": 0.85 if head else None,
             "prm/recall": 0.75 if head else None, "completions/mean_length": 40.0, "completions/mean_steps": 6.0}
            for _ in range(ITERATIONS)
        ]  # fmt: skip
        overrides = {"learning_rate": 1e-4, "beta": 0.5, "step_beta": 0.5}
        record = {
            "stage": stage, "difficulty": difficulty, "name": name, "arm": arm, "seed": seed, "overrides": overrides,
            "recipe": {"num_prompts": 300, "max_operations": 6 if difficulty == "easy" else 9, "hidden_size": 64},
            "versions": {"torch": "2.13"}, "machine": "Test CPU, 1 thread", "cpu_seconds": 200.0,
            "train_cpu_seconds": 100.0 if stage == "main" else 130.0, "seconds": 210.0, "initial_weights": f"w{seed}",
            "iterations": iterations, "rollouts": rollouts, "greedy": greedy,
        }  # fmt: skip
        if stage == "main":
            shorter = self.problems - 20
            record["final"] = {
                "test": self.samples(of_run, *logits, self.problems) | {"greedy": greedy[-1]},
                "shifted": self.samples(of_run, logits[0] - 1, logits[1] - 1, shorter),
            }
        return self.write(record | more)

    def initial(self, difficulty, seed):
        rng = np.random.default_rng([seed, 3])
        record = {
            "difficulty": difficulty, "seed": seed, "recipe": {}, "seconds": 9.0, "cpu_seconds": 9.0,
            "weights": f"w{seed}",
            "test": self.samples(rng, 0.2, 0.5, self.problems),
            "shifted": self.samples(rng, -0.8, -0.5, self.problems - 20),
        }  # fmt: skip
        return self.write(record)

    def write(self, record):
        place = [record["difficulty"], f"seed_{record['seed']}.json"]
        place = ["initial", *place] if "stage" not in record else [record["stage"], place[0], record["name"], place[1]]
        path = self.folder.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION} | record))
        if "stage" in record and not (self.folder / "initial" / record["difficulty"] / place[-1]).exists():
            self.initial(record["difficulty"], record["seed"])  # as the study does before any run
        return path

    def study(self, difficulties=("easy", "hard"), seeds=5):
        for difficulty in difficulties:
            for seed in range(seeds):
                self.initial(difficulty, seed)
                for arm in self.effects:
                    self.run("main", difficulty, arm, seed)
        return self

    def search(self, difficulty="hard", arm="kto"):
        for rate, right in ((5e-5, 0.2), (1e-4, 1.5), (2e-4, 0.4)):
            overrides = {"learning_rate": rate, "beta": 0.5, "step_beta": 0.5}
            name = f"{arm}-rate_{rate:g}-beta_0.5"
            self.run("search", difficulty, name, 100, arm, (right, 0.3), overrides=overrides)
        return self

    def ablations(self, names=("points_exact", "noise_20", "after_mask"), seeds=3):
        effects = {"noise_20": (0.3, 0.2), "points_exact": PLANTED["step_kto"]}
        for seed in range(seeds):
            for name in names:
                overrides = {"learning_rate": 1e-4, "beta": 0.5, "step_beta": 0.5, "reference_points": "exact"}
                effect = effects.get(name, PLANTED["step_kto"])
                self.run("ablations", "hard", name, seed, "step_kto", effect, overrides=overrides)
        return self


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Maker(folder).study().search().ablations()
    return folder


def text_of(folder: Path, **options) -> str:
    return page.page_text(Study(load(folder), 500), {}, **options)


def part(text: str, title: str) -> str:
    """A section's text on one line."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return " ".join(found[1].split())


def test_the_planted_winner_is_found(whole):
    text = text_of(whole)
    short = part(text, "In short")
    assert (
        "Yes: `step_kto` is ahead of `kto` in Pass@1 (easy and hard) and flawed right answers (easy and hard)." in short
    )
    assert "Pass@1: `step_kto` is ahead of `kto` on easy (+" in short
    assert "The lead of `step_kto` over `kto` in Pass@1 grows on easy" in short
    assert "Self-labelling drifts: the F1 of the PRM head falls with `step_kto_prm` on easy" in short
    assert "no difference could be shown between `step_kto_prm` and `step_kto`" in short
    assert "If steps can be checked, label them" in part(text, "Advice")
    assert "the paper's sign at M_1, M_2 and M_3, shown at" in part(text, "Against the paper")
    for section in ("What has been run", "Results", "Longer chains", "Ablations", "Search", "Limits"):
        assert part(text, section)
    assert "nan" not in text
    assert "None" not in text


def test_a_null_shows_nothing(tmp_path):
    Maker(tmp_path, effects=NULL).study()
    text = text_of(tmp_path)
    assert "Not shown: no difference between `step_kto` and `kto` in Pass@1 (easy and hard)" in part(text, "In short")
    assert "is ahead of" not in part(text, "In short")
    assert "is behind" not in part(text, "In short")
    assert "no effect could be shown" in part(text, "Advice")
    assert "could not be shown to change" in part(text, "Results")


def test_a_planted_loser_is_behind(tmp_path):
    Maker(tmp_path, effects={"kto": (2.0, 2.0), "step_kto": (0.4, 0.2)}).study()
    text = text_of(tmp_path)
    assert "No: `step_kto` is behind `kto` in" in part(text, "In short")
    assert "Watch Pass@1 when you add step labels: it falls" in part(text, "Advice")
    assert "the opposite is shown at" in part(text, "Against the paper")


def test_levels_and_counts_are_those_of_the_files(whole):
    records = [r for r in load(whole) if (r["stage"], r["difficulty"], r["name"]) == ("main", "easy", "kto")]
    right = "".join(r["final"]["test"]["greedy"]["right"] for r in records)
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
    labels = {line.split(" | ")[1]: line for line in text.splitlines() if "300 x 8" in line and "| easy" in line}
    assert f"| {outcomes} | {steps} | no | 100 [" in labels["`step_kto`"]
    assert f"| {outcomes} | no | 2,400 completions | 100 [" in labels["`step_kto_prm`"]
    assert f"| no | {steps} | no | 100 [" in labels["`step_only`"]
    assert "250 |" in part(text, "Method")


def test_ablations_are_beside_their_base_over_common_seeds(whole, tmp_path):
    found = part(text_of(whole), "Ablations")
    rows = {
        line[0]: line for line in re.findall(r"(`[a-z_0-9]+`) \| (.*?) \| hard \| (.*?) \| (\d) \| (.*?) \|", found)
    }
    assert rows["`points_exact`"][2:4] == ("`step_kto`", "3")
    assert rows["`points_exact`"][1] == "reference points: exact KL"
    assert rows["`noise_20`"][4].endswith("worse**")
    assert "better" not in rows["`points_exact`"][4]
    assert found.count("1.30x") == 3
    Maker(tmp_path).study(("hard",), seeds=2).ablations(("a_name_of_its_own",))
    found = part(text_of(tmp_path), "Ablations")
    assert "| `a_name_of_its_own` | `reference_points: exact` | hard | `step_kto` | 2 |" in found


def test_the_search_marks_what_was_chosen(whole, tmp_path):
    found = part(text_of(whole), "Search")
    assert "| **hard** | **`kto`** | **`beta: 0.5`, `learning_rate: 0.0001`, `step_beta: 0.5`** | **1** |" in found
    assert found.count("| **hard**") == 1
    assert "edge" not in found
    Maker(tmp_path).search()
    assert "`kto`, hard: none of these is in the results above (yet)." in part(text_of(tmp_path), "Search")


def test_the_search_says_when_the_best_was_not_chosen(tmp_path):
    maker = Maker(tmp_path, effects={"kto": PLANTED["kto"]}).study(("hard",), 1)
    for rate, right in ((1e-4, 0.0), (2e-4, 2.0)):
        overrides = {"learning_rate": rate, "beta": 0.5, "step_beta": 0.5}
        maker.run("search", "hard", f"kto-rate_{rate:g}", 100, "kto", (right, 0.3), overrides=overrides)
    found = part(text_of(tmp_path), "Search")
    assert "`kto`, hard: the chosen setting is not the one with the highest Pass@1." in found
    assert "`kto`, hard: the chosen `learning_rate` lies at the edge of what was tried." in found


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
    text = page.write_page(tmp_path / "results", docs, docs / "images", resamples=100).read_text()
    assert "Not answered yet: `step_kto` and `kto` have too few seeds in common." in " ".join(text.split())
    assert "Not run yet, main, easy" in text
    assert "nan" not in text
    assert "is ahead of" not in text
    for image in re.findall(r"\]\((.*?\.png)\)", text):
        assert (docs / image).is_file()


def test_what_is_missing_is_named(tmp_path):
    maker = Maker(tmp_path).study(("easy",), 2)
    maker.run("main", "easy", "kto", 2)
    maker.run("main", "easy", "kto", 3, failed="it diverged", greedy=[], iterations=[], rollouts=[], final={})
    found = part(text_of(tmp_path), "What has been run")
    assert "`step_kto` (2 of 5 seeds)" in found
    assert "| easy | 4 to 6 | 7 to 9 | 250 | 230 | 30 |" in part(text_of(tmp_path), "Method")
    assert "`kto` (4 of 5 seeds)" in found
    assert "| main | easy | `kto` | 4 of 5 seeds | 1 failed |" in found
    assert "Not run yet, main, hard: all 7 arms." in found
    assert "Failed, and in no comparison beyond where it came to: kto (easy, seed 3)" in found


def test_a_failed_run_counts_as_far_as_it_came(tmp_path):
    maker = Maker(tmp_path, effects={"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 3)
    path = maker.run("main", "easy", "kto", 3)
    maker.run("main", "easy", "step_kto", 3)
    record = json.loads(path.read_text())
    del record["final"]
    path.write_text(
        json.dumps(record | {"failed": "x", "greedy": record["greedy"][:2], "iterations": record["iterations"][:2]})
    )
    study, runs = Study(load(tmp_path), 200), [("main", "easy", name) for name in ("step_kto", "kto")]
    assert study.difference(*runs, 1, "pass@1").seeds == 4
    assert study.difference(*runs, 3, "pass@1").seeds == 3
    assert study.difference(*runs, "test", "pass@1").seeds == 3


def test_another_start_is_found_out(tmp_path):
    maker = Maker(tmp_path, effects={"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 2)
    assert "The result files confirm the common start." in part(text_of(tmp_path), "Method")
    maker.run("main", "easy", "kto", 1, initial_weights="others")
    assert "The files contradict this: runs start from different models in easy, seed 1." in part(
        text_of(tmp_path), "Method"
    )


def test_everything_is_drawn_and_written(whole, tmp_path):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text("# A\n\n<!-- study: start -->\nold\n<!-- study: end -->\n\nend\n")
    (docs / "images").mkdir(parents=True)
    (docs / "images" / "study-gone.png").write_bytes(b"")
    path = page.write_page(whole, docs, docs / "images", resamples=50)
    names = ("main", "arms", "differences", "shifted", "drift", "ablations")
    assert {p.name for p in (docs / "images").iterdir()} == {f"study-{name}.png" for name in names}
    assert all((docs / "images" / f"study-{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    section = readme.read_text()
    assert section.startswith("# A\n\n<!-- study: start -->\n![")
    assert section.endswith("<!-- study: end -->\n\nend\n")
    assert "(docs/images/study-main.png)" in section
    assert "[study](docs/study.md)" in section
    assert "Yes: `step_kto` is ahead of `kto` in" in section.replace("\n", " ")
    assert "old" not in section
    text = path.read_text()
    assert all(f"images/study-{name}.png" in text for name in names)
    # Wrapped, but for tables and links.
    assert all(len(line) <= 120 or line.startswith(("|", "!", "    ")) for line in text.splitlines())


def test_texts_and_figures_are_the_same_each_time(tmp_path):
    Maker(tmp_path, 60, {"kto": (0.8, 0.3), "step_kto": (2.0, 2.0)}).study(("easy",), 3)
    first, second = (Study(load(tmp_path), 100) for _ in range(2))
    assert page.page_text(first, {}) == page.page_text(second, {})
    assert page.readme_block(first) == page.readme_block(second)
    assert pictures(first)["main"]() == pictures(second)["main"]()


def test_a_readme_without_both_markers_in_order(tmp_path):
    Maker(tmp_path / "results", 40).initial("easy", 0)
    readme, study = tmp_path / "README.md", Study(load(tmp_path / "results"), 50)
    readme.write_text("no markers\n")
    assert readme not in page.texts(study, tmp_path / "docs", tmp_path / "images")
    readme.write_text("<!-- study: end --> <!-- study: start -->\n")
    with pytest.raises(RunError, match="once each"):
        page.texts(study, tmp_path / "docs", tmp_path / "images")


def damage_version(record):
    return record | {"version": 2}


def damage_key(record):
    return {k: v for k, v in record.items() if k != "greedy"}


def damage_digit(record):
    record["greedy"][1]["right"] = "2" + record["greedy"][1]["right"][1:]
    return record


def damage_length(record):
    record["greedy"][1]["steps"] += "4"
    return record


def damage_samples(record):
    record["final"]["test"]["samples_right"] = "9" * 40
    return record


def damage_place(record):
    return record | {"seed": 3}


def damage_problems(record):
    for greedy in record["greedy"]:
        greedy |= {key: greedy[key][:-1] for key in ("right", "first_error", "steps")}
    return record | {"final": {}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "its version is 2"), (damage_key, "'greedy' is missing"),
        (damage_digit, "digit that is out of range"), (damage_length, "40, 40 and 41 problems"),
        (damage_samples, "samples with a digit"), (damage_place, "says that it is main/easy/kto/seed_3"),
        (damage_problems, "has 39 test problems"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, damage, message):
    maker = Maker(tmp_path, problems=40)
    maker.run("main", "easy", "kto", 0)
    path = maker.run("main", "easy", "kto", 1)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = Maker(tmp_path, problems=40).run("main", "easy", "kto", 0)
    path.write_text(path.read_text()[:500])
    with pytest.raises(RunError, match=re.escape(str(path))):
        load(tmp_path)


def test_the_command(whole, tmp_path, capsys):
    assert page.main([str(tmp_path / "nothing")]) == 1
    assert "holds no result of the study" in capsys.readouterr().err
    assert page.main(["--results", "x"]) == 2


def test_every_planned_arm_and_variant_is_described():
    from stepkto_fast.study import findings, plan

    assert set(plan.ARMS) <= set(ARMS)
    assert set(plan.ABLATIONS) <= set(findings.VARIANTS)
