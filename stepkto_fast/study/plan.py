"""What the study runs: its two difficulties, its arms, the search for their settings, and the ablations.

A family is a whole study at one scale. `ready` says which runs can start, given the results that are there: those of
the search first, then, seed by seed, every arm with the settings that the search chose, and the ablations.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RunError
from ..recipe import Recipe
from .results import STAGES

Overrides = dict[str, Any]
Pair = tuple[float, float | None]  # learning rate and beta; no beta for RFT

# What the arms learn from the same rollouts. Step labels are the exact checker's unless an arm says otherwise.
ARMS: dict[str, Overrides] = {
    "rft": {"objective": "rft"},
    "kto": {"step_weight": 0.0},
    "kto_more": {"step_weight": 0.0},
    "dpo": {"objective": "dpo"},
    "step_only": {"outcome_weight": 0.0},
    "step_kto": {},
    "step_kto_prm": {"label_source": "head"},
}
# Arms with the loss of another one take what the search chose for that.
TUNED_AS = {"kto_more": "kto", "step_kto_prm": "step_kto"}
# Variants of an arm, each with one thing changed. A number in `TIMES` multiplies the tuned value.
ABLATIONS: dict[str, tuple[str, Overrides]] = {
    "points_lagged": ("step_kto", {"reference_points": "lagged"}),
    "points_exact": ("step_kto", {"reference_points": "exact"}),
    "points_mismatched": ("step_kto", {"reference_points": "mismatched"}),
    "step_weight_0.3": ("step_kto", {"step_weight": 0.3}),
    "step_weight_3": ("step_kto", {"step_weight": 3.0}),
    "step_beta_quarter": ("step_kto", {}),
    "step_beta_times_4": ("step_kto", {}),
    "step_sum": ("step_kto", {"step_reduction": "sum"}),
    "after_mask": ("step_kto", {"after_first_error": "mask"}),
    "reference_initial": ("step_kto", {"reference": "initial"}),
    "outcome_none": ("step_kto", {"outcome_weight": 0.0}),
    "classes_unweighted": ("step_kto", {"class_weights": "none"}),
    "outcome_right": ("step_kto", {"class_weights": "none", "undesirable_weight": 0.0}),
    "outcome_wrong": ("step_kto", {"class_weights": "none", "desirable_weight": 0.0}),
    "unweighted_outcome_none": ("step_kto", {"class_weights": "none", "outcome_weight": 0.0}),
    "noise_05": ("step_kto", {"step_label_noise": 0.05}),
    "noise_10": ("step_kto", {"step_label_noise": 0.10}),
    "noise_20": ("step_kto", {"step_label_noise": 0.20}),
    "kto_points_mismatched": ("kto", {"reference_points": "mismatched"}),
    "trunk_policy": ("step_kto_prm", {"prm_trunk": "policy"}),
    "trunk_trained": ("step_kto_prm", {"prm_trunk": "trained"}),
}
TIMES = {"step_beta_quarter": ("step_beta", 0.25), "step_beta_times_4": ("step_beta", 4.0)}


@dataclass(frozen=True)
class Difficulty:
    """Chains of `trained` operations are trained and tested on, those of `shifted` only tested on. M_0 has seen
    demonstrations of both; only the former get feedback. `settings` differ from the family's."""

    trained: tuple[int, int]
    shifted: tuple[int, int]
    settings: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A study at one scale. `settings` are those of all its runs, where they differ from the package's defaults."""

    name: str
    settings: Overrides
    difficulties: dict[str, Difficulty]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search_seeds: tuple[int, ...] = (100,)
    ablation_seeds: tuple[int, ...] = (2, 3, 4)
    ablation_difficulty: str = "hard"
    arms: tuple[str, ...] = tuple(ARMS)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    start: Pair = (1e-4, 0.5)  # of the search at the first difficulty
    rft_start: Pair = (1e-4, None)
    rate_limits: tuple[float, float] = (1e-5, 2e-3)
    rft_rate_limits: tuple[float, float] = (1e-5, 2e-3)
    beta_limits: tuple[float, float] = (0.02, 100.0)
    test_problems: int = 1000
    validation_problems: int = 500
    shifted_problems: int = 500
    samples: int = 8  # of each test problem, for Maj@k and Pass@k

    def count(self, kind: str) -> int:
        """How many problems there are of a kind: test, validation or shifted."""
        return {"test": self.test_problems, "validation": self.validation_problems, "shifted": self.shifted_problems}[
            kind
        ]

    def base(self, difficulty: str) -> Overrides:
        """The settings of every run of a difficulty."""
        d = self.difficulties[difficulty]
        lengths = {"min_operations": d.trained[0], "max_operations": d.trained[1]}
        return BASE | self.settings | lengths | d.settings

    def initial(self, difficulty: str) -> Overrides:
        """The settings that M_0 is made with: demonstrations of all lengths, from the shortest of the family on."""
        shortest = min(d.trained[0] for d in self.difficulties.values())
        lengths = {"min_operations": shortest, "max_operations": self.difficulties[difficulty].shifted[1]}
        return self.base(difficulty) | lengths


@dataclass(frozen=True)
class Spec:
    """One run. `overrides`: what it changes in its difficulty's `Family.base`."""

    stage: str
    difficulty: str
    name: str
    arm: str
    seed: int
    overrides: Overrides = field(compare=False)

    @property
    def place(self) -> str:
        """Where its files lie, below the folders of runs and of results."""
        return f"{self.stage}/{self.difficulty}/{self.name}/seed_{self.seed}"


# Of all families: the exact checker labels steps, no head is fitted where none is needed, one sample a problem serves
# the KL from M_0 and the audit of the head. The betas are those of an arm that the search chooses none for.
BASE: Overrides = {
    "beta": 0.5, "step_beta": 0.5,
    "label_source": "checker", "prm_audit": False, "num_eval_generations": 1, "report_to": "none",
    "save_steps": 1_000_000, "logging_steps": 10,
}  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "cpu",
            # As many supervised steps as it takes until M_0 copies operands without mistakes: what is wrong with it is
            # its facts. Fewer rollouts than the demo has, with which RFT and KTO came to 97 to 98 % on the easy chains.
            {
                "engine": "transformers", "device": "cpu", "warm_start_steps": 800, "max_completion_length": 96,
                "num_prompts": 200, "prm_seed_problems": 200,
            },
            {
                "easy": Difficulty((4, 6), (7, 9), {"misconceptions": 0.3, "max_completion_length": 64}),
                "hard": Difficulty((7, 9), (10, 12), {"misconceptions": 0.4, "warm_start_steps": 1000}),
            },
        ),
        # 71 million parameters. The times of a run are estimates (docs/study.md): nothing of it ran on a GPU.
        Family(
            "large",
            {
                "hidden_size": 768, "num_layers": 12, "num_heads": 12, "warm_start_steps": 1500,
                "warm_start_learning_rate": 6e-4, "context_length": 512, "max_completion_length": 192,
                "num_prompts": 1000, "train_batch_size": 128, "max_tokens_per_micro_batch": 65536, "bf16": True,
                "weight_sync_tolerance": 0.1, "misconceptions": 0.35,
            },
            {"long": Difficulty((12, 16), (17, 20))},
            seeds=(0, 1, 2),
            ablations=(),
            ablation_difficulty="long",
            arms=("rft", "kto", "step_kto", "step_kto_prm"),
            start=(2e-5, 2.5),
            rft_start=(2e-5, None),
            rate_limits=(1e-5, 4e-5),
            rft_rate_limits=(1e-5, 8e-5),
            beta_limits=(2.5, 2.5),
        ),
        # Every part of a study in a few minutes on a CPU; what it finds means nothing.
        Family(
            "smoke",
            {
                "engine": "transformers", "device": "cpu", "hidden_size": 64, "num_layers": 2, "num_heads": 2,
                "warm_start_steps": 120, "warm_start_learning_rate": 4e-3, "num_prompts": 16, "num_generations": 4,
                "prm_seed_problems": 20, "prm_seed_generations": 2, "prm_epochs": 2, "iterations": 2,
                "max_completion_length": 48, "train_batch_size": 16, "warmup_steps": 1,
            },
            {"short": Difficulty((2, 3), (4, 5))},
            seeds=(0, 1),
            ablation_seeds=(0,),
            ablation_difficulty="short",
            arms=("rft", "kto", "dpo", "step_kto", "step_kto_prm"),
            ablations=("points_lagged", "step_beta_times_4", "noise_20", "trunk_policy"),
            start=(1e-4, 0.5),
            rate_limits=(1e-4, 1e-4),
            rft_rate_limits=(1e-4, 1e-4),
            beta_limits=(0.5, 0.5),
            test_problems=20,
            validation_problems=20,
            shifted_problems=20,
            samples=4,
        ),
    )
}  # fmt: skip


def climb(family: Family, start: Pair, tried: Mapping[Pair, float]) -> tuple[Pair, list[Pair]]:
    """Where a search stands: the pair that it has come to, and those that it has to try before it can go on.

    `tried` holds the Pass@1 of pairs. From a pair the search looks at all neighbours, twice and half its learning rate,
    five times and a fifth of its beta, within the family's limits, and goes to the best of them if that is better. It
    ends where none is, and its way does not depend on the order in which runs end.
    """
    here = start
    while True:
        around = [here, *_neighbours(family, here)]
        if missing := [pair for pair in around if pair not in tried]:
            return here, missing
        there = max(around, key=lambda pair: tried[pair])  # of equally good ones the first: stay, or lower the rate
        if there == here:
            return here, []
        here = there


def _neighbours(family: Family, pair: Pair) -> list[Pair]:
    rate, beta = pair
    low, high = family.rate_limits if beta is not None else family.rft_rate_limits
    found: list[Pair] = [(r, beta) for r in (_rounded(rate / 2), _rounded(rate * 2)) if low <= r <= high]
    if beta is not None:
        low, high = family.beta_limits
        found += [(rate, b) for b in (_rounded(beta / 5), _rounded(beta * 5)) if low <= b <= high]
    return found


def _rounded(x: float) -> float:
    return float(f"{x:.3g}")


def settings_of(pair: Pair) -> Overrides:
    """A pair of the grid as settings: beta serves outcomes and steps."""
    rate, beta = pair
    return {"learning_rate": rate} | ({} if beta is None else {"beta": beta, "step_beta": beta})


def tried(family: Family, difficulty: str, arm: str, results: Iterable[dict]) -> dict[Pair, float]:
    """What the search found for an arm: (learning rate, beta) -> mean Pass@1 of M_3 on the validation problems, where
    every search seed has been run. A run that failed counts as 0."""
    found: dict[Pair, dict[int, float]] = {}
    for result in results:
        if (result["stage"], result["difficulty"], result["arm"]) == ("search", difficulty, arm):
            overrides = result["overrides"]
            pair = overrides["learning_rate"], overrides.get("beta")
            value = 0.0 if result.get("failed") else result["iterations"][-1]["pass@1"]
            found.setdefault(pair, {})[result["seed"]] = value
    seeds = family.search_seeds
    return {pair: sum(of[s] for s in seeds) / len(seeds) for pair, of in found.items() if all(s in of for s in seeds)}


def tuned(family: Family, difficulty: str, arm: str, results: Iterable[dict]) -> Overrides | None:
    """The settings that the search chose for an arm, or None while it is not over."""
    searched, results = TUNED_AS.get(arm, arm), list(results)
    start = start_of(family, difficulty, searched, results)
    if start is None:
        return None
    chosen, missing = climb(family, start, tried(family, difficulty, searched, results))
    return None if missing else settings_of(chosen)


def start_of(family: Family, difficulty: str, arm: str, results: Iterable[dict]) -> Pair | None:
    """Where the search of an arm begins: the family's pair, or what was chosen at the difficulty before this one; None
    while that is not known."""
    before = list(family.difficulties)[: list(family.difficulties).index(difficulty)]
    if not before:
        return family.rft_start if arm == "rft" else family.start
    chosen = tuned(family, before[-1], arm, results)
    return None if chosen is None else (chosen["learning_rate"], chosen.get("beta"))


def ready(family: Family, results: Iterable[dict], stages: Iterable[str] = STAGES) -> list[Spec]:
    """The runs that can start now, in the order in which they should, those with a result left out."""
    results = list(results)
    done = {(r["stage"], r["difficulty"], r["name"], r["seed"]): r["overrides"] for r in results}
    specs: list[Spec] = []
    if "search" in stages:
        specs += [s for d in family.difficulties for arm in family.arms for s in _search(family, d, arm, results)]
    for seed in family.seeds:
        for difficulty in family.difficulties:
            if "main" in stages:
                specs += _main(family, difficulty, seed, results)
            if "ablations" in stages and difficulty == family.ablation_difficulty and seed in family.ablation_seeds:
                specs += _ablations(family, difficulty, seed, results)
    # A result with other settings (the search chose others since, or the plan was changed) is done again.
    return [s for s in specs if done.get((s.stage, s.difficulty, s.name, s.seed)) != s.overrides]


def _search(family: Family, difficulty: str, arm: str, results: list[dict]) -> list[Spec]:
    if arm in TUNED_AS:
        return []
    start = start_of(family, difficulty, arm, results)
    if start is None:
        return []
    found = []
    for pair in climb(family, start, tried(family, difficulty, arm, results))[1]:
        rate, beta = pair
        name = f"{arm}-rate_{rate:g}" + ("" if beta is None else f"-beta_{beta:g}")
        found += [
            Spec("search", difficulty, name, arm, seed, ARMS[arm] | settings_of(pair)) for seed in family.search_seeds
        ]
    return found


def _main(family: Family, difficulty: str, seed: int, results: list[dict]) -> list[Spec]:
    found = []
    for arm in family.arms:
        chosen = tuned(family, difficulty, arm, results)
        if chosen is not None:
            more = {"num_prompts": more_prompts(family, difficulty)} if arm == "kto_more" else {}
            found.append(Spec("main", difficulty, arm, arm, seed, ARMS[arm] | chosen | more))
    return found


def _ablations(family: Family, difficulty: str, seed: int, results: list[dict]) -> list[Spec]:
    found = []
    for name in family.ablations:
        arm, changed = ABLATIONS[name]
        chosen = tuned(family, difficulty, arm, results)
        if chosen is None:
            continue
        if name in TIMES:
            key, factor = TIMES[name]
            changed = {key: _rounded(chosen[key] * factor)}
        found.append(Spec("ablations", difficulty, name, arm, seed, ARMS[arm] | chosen | changed))
    return found


def run_settings(family: Family, spec: Spec) -> Overrides:
    """The settings of a run as the family has them now, but for places on the disk."""
    problems = family.count("validation" if spec.stage == "search" else "test")
    of_run = {"name": spec.place, "seed": spec.seed, "num_test_problems": problems}
    return family.base(spec.difficulty) | spec.overrides | of_run


def recorded(recipe: Recipe) -> Overrides:
    """All settings of a run, those left out that are places of this machine: defaults change."""
    places = {"output_dir", "model", "test_dataset", "resume", "overwrite"}
    return {k: v for k, v in asdict(recipe).items() if k not in places}


def same_settings(record: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a result's `recipe` is this one. A setting that the package has had only since then has to be at its
    default."""
    now = recorded(recipe)
    return record.keys() <= now.keys() and recorded(Recipe()) | dict(record) == now


def is_current(family: Family, result: Mapping[str, Any]) -> bool:
    """Whether a result is of settings that the family still has, whatever it chose for the arm since."""
    if result["difficulty"] not in family.difficulties:
        return False
    spec = Spec(*(result[key] for key in ("stage", "difficulty", "name", "arm", "seed", "overrides")))
    return same_settings(result["recipe"], Recipe(**run_settings(family, spec)))


def more_prompts(family: Family, difficulty: str) -> int:
    """The training prompts of an iteration with which outcome-only KTO sees as many checked completions as the PRM
    head's seed set has besides the rollouts."""
    recipe = Recipe(**family.base(difficulty))
    seed_set = recipe.prm_seed_problems * recipe.prm_seed_generations
    return recipe.num_prompts + -(-seed_set // (recipe.num_generations * recipe.iterations))


def left(family: Family, results: Iterable[dict], stages: Iterable[str] = STAGES) -> dict[str, int]:
    """How many runs of each stage are still to be done, as far as is known: a search may grow."""
    results, counts = list(results), {}
    for stage in stages:
        done = [r for r in results if r["stage"] == stage]
        if stage == "search":
            counts[stage] = len(ready(family, results, ("search",)))
            continue
        difficulties = list(family.difficulties) if stage == "main" else [family.ablation_difficulty]
        names, seeds = (family.arms, family.seeds) if stage == "main" else (family.ablations, family.ablation_seeds)
        every = {(d, n, s) for d in difficulties for n in names for s in seeds}
        counts[stage] = len(every - {(r["difficulty"], r["name"], r["seed"]) for r in done})
    return counts


def family_of(name: str) -> Family:
    """The family of that name; RunError where there is none."""
    if name not in FAMILIES:
        raise RunError(f"family is {name!r}: give one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
