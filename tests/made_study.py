"""Results of a study, made by hand with planted effects, and what reads the page that is written from them."""

import json
import re
from pathlib import Path

import numpy as np

from stepkto_fast.study import page
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

    def __init__(self, folder, problems=250, effects=None, drift=0.04):
        self.folder, self.problems, self.effects, self.drift = folder, problems, effects or PLANTED, drift
        self.hardness = np.random.default_rng(7).normal(size=problems)
        self.steps = np.random.default_rng(8).integers(4, 8, problems)

    def evaluation(self, rng, right, clean, problems):
        def happens(logit):
            return rng.random(problems) < 1 / (1 + np.exp(self.hardness[:problems] - logit))

        steps = self.steps[:problems]
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

    def start(self, difficulty, seed):
        """M_0's logit of right answers, and its greedy solutions."""
        rng = np.random.default_rng([seed, 99])
        logit = (0.6 if difficulty == "easy" else -0.2) + 0.1 * rng.normal()
        return logit, self.evaluation(rng, logit, 0.5, self.problems)

    def head(self, t, chance):
        """The head's figures of M_t: by default AUROC falls."""
        auroc = 0.95 - self.drift * t + 0.01 * chance
        return {"f1": 0.9 - 0.1 * t, "precision": 0.8, "recall": 0.85, "auroc": auroc, "ece": 0.1, "threshold": 0.5}

    def run(self, stage, difficulty, name, seed, arm=None, effect=None, **more):
        arm = arm or name
        right, clean = effect or self.effects[arm]
        of_run = np.random.default_rng([seed, sum(map(ord, stage + difficulty + name))])
        start, first = self.start(difficulty, seed)
        noise = 0.05 * of_run.normal(size=2)
        greedy, head = [first], arm == "step_kto_prm"
        for t in range(1, ITERATIONS + 1):
            share = t / ITERATIONS
            logits = start + share * right + noise[0], 0.5 + share * clean + noise[1]
            greedy.append(self.evaluation(of_run, *logits, self.problems))
        iterations = [
            {"iteration": t, "pass@1": greedy[t]["right"].count("1") / self.problems, "flawed_correct": 0.1,
             "step_accuracy": 0.9 + 0.02 * t, "kl_from_initial": 0.5 * t, "completion_length": 40.0, "truncated": 0.0,
             "prm": self.head(t, of_run.random()) if head else {}}
            for t in range(ITERATIONS + 1)
        ]  # fmt: skip
        rollouts = [
            {"accuracy": 0.5, "truncated": 0.0, "step_labels/right": 0.9, "step_labels/labelled": 1.0,
             "prm/auroc": 0.85 if head else None, "completions/mean_length": 40.0, "completions/mean_steps": 6.0}
            for _ in range(ITERATIONS)
        ]  # fmt: skip
        overrides = {"learning_rate": 1e-4, "beta": 0.5, "step_beta": 0.5}
        record = {
            "stage": stage, "difficulty": difficulty, "name": name, "arm": arm, "seed": seed, "overrides": overrides,
            "recipe": {
                "num_prompts": 300, "engine": "transformers", "max_operations": 6 if difficulty == "easy" else 9,
                "hidden_size": 64,
            },
            "versions": {"torch": "2.13"}, "machine": "Test CPU, 1 thread", "cpu_seconds": 200.0, "seconds": 210.0,
            "train_cpu_seconds": (100.0 if stage == "main" else 130.0) + 7 * seed, "initial_weights": f"w{seed}",
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
            "test": self.samples(rng, 0.2, 0.5, self.problems) | {"greedy": self.start(difficulty, seed)[1]},
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


def fail(path, models):
    """Makes a run one that failed after so many evaluations."""
    record = json.loads(path.read_text())
    kept = {"greedy": record["greedy"][:models], "iterations": record["iterations"][:models]}
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "final"} | kept | {"failed": "it diverged"}))


def text_of(folder: Path, **options) -> str:
    return page.page_text(Study(load(folder), 500), {}, **options)


def part(text: str, title: str) -> str:
    """A section's text on one line."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return " ".join(found[1].split())


def table_of(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a section's tables: first cell -> the others."""
    lines = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0]: row[1:] for row in rows}
