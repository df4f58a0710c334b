"""The sections of the study's page, in their order. Prose is fixed; numbers, and words that judge, are computed."""

import math

from .findings import ASKED, NARROW, QUESTIONS, Page, answer, compare, narrow, pairs, sentence
from .form import lost_form
from .heads import drift_of, heads
from .searched import searched
from .sections_method import failed_runs, method, rerun, search, what_ran
from .sections_results import (
    ablations,
    against_the_paper,
    difference_cells,
    difference_titles,
    drift,
    longer_chains,
    results,
)
from .statistics import METRICS, Estimate
from .variants import Variant, all_differences, failed_variants, noise_of, variants
from .words import (
    bullets,
    capital,
    counted,
    fixed,
    gap,
    judged,
    listed,
    paragraph,
    table,
)  # fmt: skip


def in_short(page: Page) -> list[str]:
    lines = paragraph(
        "Step-KTO (arXiv 2501.10799) tells a language model of each step of a solution whether it is right, beside "
        "whether the answer is. Does that win over feedback on answers alone, and does it still when a process reward "
        "model (PRM) takes the place of an exact checker? Tried on a synthetic arithmetic task with a small model."
    )
    lines += ["## In short", "", *paragraph(f"**{answer(page, 'step_kto', 'kto')}**")]
    lines += paragraph(f"With the step labels of a PRM head? {answer(page, 'step_kto_prm', 'kto')}")
    if both := compare(page, "step_kto", "step_only"):
        lines += paragraph(
            f"And the step loss alone (`step_only`)? {capital(sentence(both, 'step_kto', 'step_only'))}."
        )
    lines += page.picture("main")
    difficulties = page.difficulties()
    rows = [
        (f"{text}: `{a}` - `{b}`", *difference_cells(page, a, b, ASKED))
        for text, a, b in QUESTIONS
        if any(difference_cells(page, a, b, ASKED))
    ]
    if rows:
        lines += table(("last model, points", *difference_titles(page, ASKED)), rows)
        single = all(e.seeds < 2 for d in difficulties for a, b in pairs(page)
                     for e in [page.difference(d, a, b, "pass@1")] if e)  # fmt: skip
        intervals = "one seed has no interval" if single else "in brackets what holds 95 %, over seeds and problems"
        lines += paragraph(
            f"The first arm minus the second, in percentage points; {intervals}. Bold, and words such as *higher* in "
            "this page, stand only where the interval excludes 0. *Flawed* is a right answer with a wrong step; fewer "
            f"are better. Finished seeds, of {len(page.family.seeds)} planned: "
            f"{', '.join(f'{d} {page.seeds(d)}' for d in difficulties)}; where fewer enter, their number stands. The "
            "arms are described under [Method](#method)."
        )
    return lines


# What is to be decided, between which arms, and for each metric what follows where the first is better, where it is
# worse, and where no difference is shown and a large one excluded.
ADVICE: tuple[tuple[str, str, str, dict[str, tuple[str, str, str]]], ...] = (
    ("Step labels beside outcomes", "step_kto", "kto", {
        "pass@1": ("label steps where they can be checked", "watch Pass@1 when you label steps", "they hardly matter"),
        "flawed_correct": ("label steps: fewer right answers have a wrong step",
                           "do not count on step labels: more right answers have a wrong step", "they hardly matter"),
    }),
    ("A PRM head's labels instead of exact ones", "step_kto_prm", "step_kto", {
        "pass@1": ("they reach more", "they cost Pass@1", "they cost little"),
        "flawed_correct": ("they leave fewer flawed answers", "prefer exact labels", "they cost little"),
    }),
    ("A seed set for a PRM head, or as many checked solutions of more prompts", "step_kto_prm", "kto_more", {
        "pass@1": ("take the seed set", "take more prompts", "either will do"),
        "flawed_correct": ("take the seed set", "take more prompts", "either will do"),
    }),
    ("The outcome loss beside the step loss", "step_kto", "step_only",
     {"pass@1": ("keep it", "with exact labels try the step loss alone", "it hardly matters"),
      "flawed_correct": ("keep it", "with exact labels try the step loss alone", "it hardly matters")}),
    ("KTO or fine-tuning on right answers", "kto", "rft",
     {"pass@1": ("learn from wrong answers too", "start with fine-tuning on right answers", "either will do")}),
    ("Step-KTO or DPO", "step_kto", "dpo", {"pass@1": ("prefer Step-KTO", "prefer DPO", "either will do")}),
)  # fmt: skip
WIDE = "too wide, or of too few seeds, to say"


def advice(page: Page) -> list[str]:
    if not page.difficulties():
        return []
    lines, unsaid = [], []
    for lead, a, b, metrics in ADVICE:
        said = [text for m, words in metrics.items() if (text := advised(page, a, b, m, words))]
        if said:
            lines.append(f"**{lead}.** {'. '.join(said)}.")
        elif any(page.difference(d, a, b, m) for d in page.difficulties() for m in metrics):
            unsaid.append(f"`{a}` - `{b}`")
    lines += ablation_advice(page)
    if any(run[0] == "main" and (x := drift_of(page, run)) and x[0].sign < 0 for run in heads(page)):
        lines.append(
            "Check the PRM head as the policy moves: its AUROC falls over the iterations. Refitting it was not tried."
        )
    if lost_form(page):
        lines.append(
            "Watch the length of solutions and KL from M_0, and keep earlier checkpoints: some runs lost the form of "
            "solutions, see [Results](#results)."
        )
    text = "In points; each holds for this task and this scale." if lines else "Nothing yet: too little has been shown."
    if unsaid:
        text += f" {capital(WIDE)}: {listed(unsaid)}."
    return ["## Advice", "", *bullets(lines), *paragraph(text)]


def advised(page: Page, a: str, b: str, metric: str, words: tuple[str, str, str]) -> str | None:
    """What follows of a - b at each difficulty; None where nothing does."""
    groups: dict[str, list[tuple[str, Estimate]]] = {}
    for d in page.difficulties():
        if (e := page.difference(d, a, b, metric)) is not None:
            kind = judged(e, METRICS[metric].good)
            if kind in ("no difference", "too few seeds"):
                kind = "narrow" if narrow(e, len(page.family.seeds)) else "unsaid"
            groups.setdefault(kind, []).append((d, e))
    if not set(groups) - {"unsaid"}:
        return None
    better, worse, same = words
    texts = {"better": better, "worse": worse, "narrow": f"{same}, within {100 * NARROW:g} points", "unsaid": WIDE}
    parts = []
    for kind, text in texts.items():
        if of := groups.get(kind):
            values = ", ".join(fixed(100 * e.value, 1, True) for _, e in of)
            parts.append(f"{listed(d for d, _ in of)}: {text} ({values})")
    return f"{capital(METRICS[metric].title)}, {'; '.join(parts)}"


def ablation_advice(page: Page) -> list[str]:
    every, planned = variants(page), len(page.family.ablation_seeds)
    found: dict[str, list[str]] = {}
    noise: list[str] = []
    same: list[str] = []
    for v in every:
        verdicts = {m: judged(e, METRICS[m].good) for m, e in v.differences.items()}
        moved = [m for m, x in verdicts.items() if x in ("better", "worse")]
        text = ", ".join(f"{METRICS[m].title} {gap(v.differences[m], METRICS[m])}" for m in moved)
        if share := noise_of(v.name):
            if v.seeds > 1:
                text = ", ".join(filter(None, (_by_model(v), text)))
                noise.append(f"{100 * share:g} %: {text or 'no cost could be shown'}")
            continue
        if v.same:
            same.append(f"`{v.name}`")
            continue
        kinds = {verdicts[m] for m in moved}
        kind = "both" if len(kinds) == 2 else next(iter(kinds), "wide")
        if kind == "wide" and verdicts and all(narrow(e, planned) for e in v.differences.values()):
            kind = "same"
        early = {judged(e, METRICS["pass@1"].good) for e in v.earlier.values()} & {"better", "worse"}
        if kind == "wide" and len(early) == 1:
            kind, text = f"{early.pop()} early", _by_model(v)
        found.setdefault(kind if verdicts else "", []).append(f"`{v.name}`" + (f" ({text})" if text else ""))
    words = {
        "better": "Ablations worth trying, better than the base",
        "worse": "To be left alone, worse than the base",
        "better early": "Ahead of the base before the last model, with which nothing is shown",
        "worse early": "Behind the base before the last model, with which nothing is shown",
        "both": "A trade, better in one measure and worse in the other",
        "same": f"Hardly matter, within {100 * NARROW:g} points",
        "wide": capital(WIDE),
    }
    lines = [f"{word}: {listed(found[kind])}." for kind, word in words.items() if kind in found]
    if same:
        lines.append(f"Without any effect, the base's very solutions: {listed(same)}.")
    return lines + ([f"Step labels turned over, {'; '.join(noise)}."] if noise else []) + failed_variants(every)


def _by_model(v: Variant) -> str:
    """Those of a variant's differences in Pass@1 before the last model that are shown."""
    metric = METRICS["pass@1"]
    shown = {t: e for t, e in v.earlier.items() if judged(e, metric.good) in ("better", "worse")}
    gaps = ", ".join(f"M_{t} {gap(e, metric)}" for t, e in sorted(shown.items()))
    return f"{metric.title} of {gaps}" if gaps else ""


def limits(page: Page) -> list[str]:
    every = [e for e in all_differences(page) if e.seeds > 1]
    found = sum(e.sign != 0 for e in every)
    lines = [
        "One synthetic task with an exact checker of steps, and a small model made here from scratch. Nothing here "
        "says how large an effect is with a large model on mathematics, nor with labels that have other errors.",
    ]
    if every:
        verb, chance = "is" if found == 1 else "are", math.ceil(0.05 * len(every))
        lines.append(
            f"The tables judge {counted(len(every), 'difference')}; {found} of them {verb} shown. "
            f"Nothing is corrected for their number: if none were real, about {chance} at most would be expected."
        )
    levels = [page.study.level(("main", d, n), "test", "pass@1") for d in page.difficulties() for n in page.arms(d)]
    if seeds := sorted({e.seeds for e in levels if e}):
        many = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {counted(seeds[-1], 'seed')}"
        lines.append(f"{many} an arm. What is not shown may still be there: read the interval, not the word.")
    if failed := [f"`{r['name']}` ({r['difficulty']}, seed {r['seed']})" for r in failed_runs(page, "main")]:
        lines.append(
            f"Failed, and in no comparison: {listed(failed)}. What is left out for failing favours the arm that failed."
        )
    if tried := searched(page):
        most = max(t.seeds for t in tried)
        text = (
            f"The search has {counted(most, 'seed')} a setting and covers learning rate and beta alone: an arm may be "
            "better with settings that were not tried. Arms are compared as tuned, with learning rates and betas of "
            "their own."
        )
        fell = []
        for t in tried:
            reached = page.study.level(("main", t.difficulty, t.arm), "test", "pass@1")
            if t.chosen and reached and t.rate - reached.value > NARROW:
                fell.append(f"`{t.arm}` on {t.difficulty} {100 * t.rate:.1f} and {100 * reached.value:.1f}")
        if fell:
            text += f" What was chosen promised more than it kept (Pass@1 in search and results): {listed(fell)}."
        lines.append(text)
    return ["## Limits", "", *bullets(lines)]


SECTIONS = (
    in_short, advice, limits, results, longer_chains, drift, ablations, method, search, against_the_paper, what_ran,
    rerun,
)  # fmt: skip
