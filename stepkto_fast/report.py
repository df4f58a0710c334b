"""The report of a run: one self-contained HTML page, `report.html`, written from the files of a run directory.

`python -m stepkto_fast.report RUN_DIR` writes it again at any time; the same files give the same bytes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from . import report_figures as figures
from .atomic import replacing
from .errors import RunError
from .report_data import Run, Solution, mapping, number, read_run

STATES = ("clean", "flawed", "wrong")

# Kinds of held-out problems shown, as (state under M_0, state under the last model) -> (title, how many).
# Problems of a kind are taken in file order; places a kind cannot fill go to the kinds in this order.
SHOWN_PAIRS = {
    ("wrong", "clean"): ("Fixed: wrong before, every step right now", 2),
    ("flawed", "clean"): ("Reasoning repaired: right both times, but before with a wrong step", 2),
    ("wrong", "wrong"): ("Still wrong", 1),
    ("clean", "wrong"): ("Unlearned: right before, wrong now", 1),
    ("wrong", "flawed"): ("Right now, but for a wrong reason", 1),
    ("flawed", "wrong"): ("A wrong step that used to get away with it", 0),
    ("clean", "flawed"): ("Right both times, now with a wrong step", 0),
    ("flawed", "flawed"): ("Right both times, with a wrong step both times", 1),
    ("clean", "clean"): ("Every step right both times", 0),
}
SHOWN_ALONE = {
    ("flawed", "flawed"): ("Right answer with a wrong step", 3),
    ("wrong", "wrong"): ("Wrong answer", 3),
    ("clean", "clean"): ("Every step right", 2),
}
# The same where nobody judged steps.
UNJUDGED_PAIRS = {
    ("wrong", "clean"): ("Fixed: wrong before, right now", 3),
    ("wrong", "wrong"): ("Still wrong", 2),
    ("clean", "wrong"): ("Unlearned: right before, wrong now", 2),
    ("clean", "clean"): ("Right both times", 1),
}
UNJUDGED_ALONE = {("wrong", "wrong"): ("Wrong answer", 4), ("clean", "clean"): ("Right answer", 4)}
SHOWN = 8

# Who judged the steps (summary.json's steps_judged_by) -> its name, and what it is.
JUDGES = {
    "checker": (
        "the exact checker",
        "the exact checker, a program that does the arithmetic, finds right. It judges each step by itself: one that "
        "goes on correctly from an earlier mistake is right.",
    ),
    "head": (
        "the process-reward head",
        "the process-reward head finds right. It is a learned judge and can be wrong: the task has no exact checker "
        "of steps.",
    ),
}
# Key in summary.json's `steps` -> title in the table of steps.
STEP_COLUMNS = {
    "steps_mean": "Steps a solution, mean",
    "steps_median": "median",
    "steps_max": "most",
    "step_tokens_mean": "Tokens a step, mean",
    "step_tokens_p95": "95th percentile",
}

# Key in summary.json -> title in the table of the PRM head.
HEAD_COLUMNS = {
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "auroc": "AUROC",
    "ece": "Calibration error",
    "threshold": "Threshold",
}
# Key in summary.json's `step_label_agreement` -> title in the table of the two label sources.
AGREEMENT_COLUMNS = {
    "kept": "Agree on",
    "kappa": "Cohen's kappa",
    "both_right": "Both: right",
    "both_wrong": "Both: wrong",
    "only_monte_carlo_right": "Right by continuations alone",
    "only_head_right": "Right by the head alone",
    "unlabelled": "Not both labelled",
}
# What summary.json names in one word, in words; a name that is not here is shown as it is.
PHASES = {
    "warm_start": "making M₀ from demonstrations",
    "engine": "starting the sampling engine",
    "seed_set": "sampling solutions to fit the head on",
    "prm": "fitting the head, judging steps",
    "evaluation": "evaluating on held-out problems",
    "rollout": "sampling solutions to train on",
    "monte_carlo": "continuing solutions from their steps",
    "reference": "log-probabilities of the reference",
    "update": "training",
}
SPEEDS = {"rollout": "sampled", "train": "trained on"}
COUNTS = {
    "skipped_rows": "Unusable rows of data files",
    "skipped_held-out_prompts": "Held-out problems left out: prompt too long or not readable for the model",
    "skipped_training_prompts": "Training problems left out for that",
    "skipped_seed_prompts": "Problems to fit the head on left out for that",
    "skipped_prm_rows": "Unusable rows of the head's dataset",
    "cut_prm_rows": "Rows of the head's dataset that were cut off at context_length",
    "unverified_continuations": "Continuations whose answers could not be compared",
    "rollouts_without_steps": "Sampled solutions without text",
    "unverified_rollouts": "Sampled solutions whose answers could not be compared",
}


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction of 1 in percent, with a narrow space before the sign; a dash when undefined."""
    return "\u2013" if value is None else f"{100 * value:.{digits}f}\u202f%"


def points(change: float | None) -> str:
    """A change of a fraction of 1 in percentage points, signed; a dash when undefined."""
    if change is None:
        return "\u2013"
    rounded = f"{abs(100 * change):.1f}"
    return "0.0" if rounded == "0.0" else ("\u2212" if change < 0 else "+") + rounded


def significant(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, thousands apart; a dash when undefined."""
    if value is None:
        return "\u2013"
    if abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif value == 0 or abs(value) >= 1e-3:
        text = f"{value:.{digits}g}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-")
    return text.replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Seconds as people say them; a dash when undefined."""
    if seconds is None:
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wilson(rate: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate seen in `count` independent trials (count > 0)."""
    z = 1.96
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def auroc_chance(right: float, count: float) -> float | None:
    """How far from 1/2 chance takes the AUROC of scores that tell nothing, in 95 % of cases (Mann-Whitney)."""
    wrong = count - right
    return 1.96 * math.sqrt((count + 1) / (12 * right * wrong)) if right > 0 and wrong > 0 else None


def _moved(name: str, first: float | None, last: float | None) -> str | None:
    if first is None or last is None:
        return None
    digits = 0 if percent(first) != percent(last) else 1
    if percent(first, digits) == percent(last, digits):
        return f"{name} stayed at {percent(last, digits)}"
    verb = "rose" if last > first else "fell"
    return f"{name} {verb} from {percent(first, digits)} to {percent(last, digits)}"


def headline(passed: Sequence[float | None], flawed: Sequence[float | None], told: Sequence[float | None] = ()) -> str:
    """The result in one sentence, from Pass@1 and flawed_correct by iteration, or from what offline training has
    instead, the AUROC of held-out log-ratios; undefined rates are left out."""
    if len(passed) > 1:
        said = [
            _moved("Pass@1", passed[0], passed[-1]),
            _moved("right answers with a wrong step", flawed[0], flawed[-1]),
        ]
        if told and told[0] is not None:
            said.append(_moved("held-out completions told right from wrong", told[0], told[-1]))
    else:
        said = [
            None if passed[0] is None else f"{figures.model(0)} solves {percent(passed[0])} of the held-out problems",
            None if flawed[0] is None else f"{percent(flawed[0])} of its right answers have a wrong step",
        ]
    sentence = "; ".join(part for part in said if part) or "A run without a defined result"
    return sentence[0].upper() + sentence[1:]


@dataclass(frozen=True)
class Sample:
    """A held-out problem to show: why it was chosen, and its solution under each shown model."""

    reason: str
    solutions: list[tuple[int, Solution]]


def choose_samples(solutions: dict[int, list[Solution]]) -> list[Sample]:
    """At most SHOWN problems, by kind of change and in file order: no hand and no chance is in the choice."""
    first, last = min(solutions), max(solutions)
    pairs = list(zip(solutions[first], solutions[last], strict=True))
    if any(right is not None for rows in solutions.values() for s in rows for right in s.step_right):
        kinds = SHOWN_PAIRS if first != last else SHOWN_ALONE
    else:
        kinds = UNJUDGED_PAIRS if first != last else UNJUDGED_ALONE
    rows: dict[tuple[str, str], list[int]] = {kind: [] for kind in kinds}
    for row, (before, after) in enumerate(pairs):
        rows[before.state, after.state].append(row)
    taken = {kind: rows[kind][:count] for kind, (_, count) in kinds.items()}
    for kind in kinds:
        free = SHOWN - sum(map(len, taken.values()))
        taken[kind] = rows[kind][: len(taken[kind]) + free]
    shown = [first, last] if first != last else [first]
    return [
        Sample(title, [(t, solutions[t][row]) for t in shown])
        for kind, (title, _) in kinds.items()
        for row in taken[kind]
    ]


def _majority(run: Run) -> int | None:
    """The k of the Maj@k that the run recorded; None when it recorded none."""
    found = {int(m[1]) for record in run.iterations for key in record if (m := re.fullmatch(r"maj@(\d+)", key))}
    return max(found, default=None)


def _rates(run: Run, problems: float | None, majority: int | None) -> list[dict[str, Any]]:
    steps = [record["iteration"] for record in run.iterations]
    passed = run.rates("pass@1")
    counted = [problems] * len(steps)
    right = [None if p is None or problems is None else float(round(p * problems)) for p in passed]
    # Title, key in summary.json, whether more is better, independent trials behind each value. The steps of a
    # solution depend on each other: their rate gets no interval.
    wanted: list[tuple[str, str, bool, list[float | None] | None]] = [
        ("Pass@1", "pass@1", True, counted),
        ("Step accuracy", "step_accuracy", True, None),
        ("Right with a wrong step", "flawed_correct", False, right),
    ]
    if majority is not None:
        wanted.insert(1, (f"Maj@{majority}", f"maj@{majority}", True, counted))
    offline: list[tuple[str, str, bool, list[float | None] | None]] = [
        ("Completions told apart", "auroc", True, None),
        ("Steps told apart", "step_auroc", True, None),
    ]
    if any(value is not None for _, key, *_ in offline for value in run.rates(key)):
        wanted = offline
    rates = []
    for title, key, more_is_better, trials in wanted:
        values = run.rates(key)
        for index, value in enumerate(values):
            if value is not None and not 0 <= value <= 1:
                where = f"{run.summary_path}, iterations[{index}]"
                raise RunError(f"{where}: {key!r} is {value!r}; write a rate from 0 to 1, or null where undefined")
        intervals = None
        if trials is not None:
            intervals = [wilson(v, n) if v is not None and n else None for v, n in zip(values, trials, strict=True)]
        first, last = values[0], values[-1]
        change = None if first is None or last is None else last - first
        rates.append(
            {
                "title": title,
                "values": values,
                "first": first,
                "last": last,
                "change": change,
                "verdict": None if not change else "better" if (change > 0) == more_is_better else "worse",
                "more_is_better": more_is_better,
                "dumbbell": figures.dumbbell(first, last) if first is not None and last is not None else None,
                "figure": figures.by_iteration(title, steps, values, percent, top=1.0, intervals=intervals),
            }
        )
    return rates


def _training(run: Run) -> list[dict[str, Any]]:
    iterations = sorted({record["iteration"] for record in run.training})

    def trace(label: str, style: str, key: str) -> figures.Trace:
        segments: list[list[figures.Point]] = [[] for _ in iterations]
        for record in run.training:
            value = number(record, key, f"{run.metrics_path}, step {record['step']}")
            if value is not None:
                segments[iterations.index(record["iteration"])].append((float(record["step"]), value))
        return figures.Trace(label, style, segments)

    wanted = [
        (
            "Loss",
            None,
            [
                ("total", "accent", "loss"),
                ("outcome", "second", "loss/outcome"),
                ("step", "third", "loss/step"),
            ],
        ),
        (
            "Reward margin, right minus wrong",
            None,
            [("outcome", "second", "rewards/margins"), ("step", "third", "step_rewards/margins")],
        ),
        (
            "Outcome reward",
            (0, 1),
            [("right", "clean", "rewards/chosen"), ("wrong", "wrong", "rewards/rejected")],
        ),
        (
            "Step reward",
            (0, 1),
            [("right", "clean", "step_rewards/chosen"), ("wrong", "wrong", "step_rewards/rejected")],
        ),
    ]
    drawn = []
    for title, band, lines in wanted:
        traces = [trace(*line) for line in lines]
        if any(segment for each in traces for segment in each.segments):
            drawn.append({"title": title, "figure": figures.training(title, iterations, traces, band=band)})
    return drawn


def _head(run: Run) -> list[dict[str, Any]]:
    heads = []
    for index, record in enumerate(run.iterations):
        where = f"{run.summary_path}, iterations[{index}]"
        prm = mapping(record, "prm", where)
        bins = []
        listed = prm.get("bins") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise RunError(f"{where}, prm: 'bins' is not a list of JSON objects; write one, or leave 'bins' out")
        for place, entry in enumerate(listed):
            values = [number(entry, key, f"{where}, prm.bins[{place}]") for key in ("probability", "correct", "count")]
            p, share, count = values
            if p is not None and share is not None and count:
                bins.append((p, share, count))
        columns = {key: number(prm, key, f"{where}, prm") for key in HEAD_COLUMNS}
        if columns["f1"] is None:
            columns["f1"] = number(record, "prm_f1", where)
        name = figures.model(record["iteration"])
        if bins or any(value is not None for value in columns.values()):
            figure = figures.reliability(name, bins) if bins else None
            heads.append({"name": name, "columns": columns, "figure": figure})
    return heads


def _agreement(run: Run) -> list[dict[str, Any]]:
    """How far continuations and the head agree on the steps of each model's rollouts."""
    rows = []
    for index, record in enumerate(run.iterations):
        where = f"{run.summary_path}, iterations[{index}]"
        both = mapping(record, "step_label_agreement", where)
        if both:
            columns = {key: number(both, key, f"{where}, step_label_agreement") for key in AGREEMENT_COLUMNS}
            rows.append({"name": figures.model(record["iteration"]), "columns": columns})
    return rows


def _drift(run: Run) -> list[dict[str, Any]]:
    steps = [record["iteration"] for record in run.iterations]
    wanted: list[tuple[str, str, Callable[[float], str]]] = [
        ("Completion length, tokens", "completion_length", significant),
        ("KL from the first model, nats a completion", "kl_from_initial", significant),
    ]
    return [
        {"title": title, "figure": figures.by_iteration(title, steps, run.rates(key), form)}
        for title, key, form in wanted
        if any(value is not None for value in run.rates(key))
    ]


def _steps(run: Run) -> list[dict[str, Any]]:
    """How long solutions and their steps are, model by model."""
    rows = []
    for index, record in enumerate(run.iterations):
        where = f"{run.summary_path}, iterations[{index}]"
        steps = mapping(record, "steps", where)
        columns = {key: number(steps, key, f"{where}, steps") for key in STEP_COLUMNS}
        single = number(steps, "single_step_share", f"{where}, steps")
        truncated, unverified = (number(record, key, where) for key in ("truncated", "unverified"))
        if any(value is not None for value in columns.values()):
            rows.append(
                {
                    "name": figures.model(record["iteration"]),
                    "columns": columns,
                    "single": single,
                    "truncated": truncated,
                    "unverified": unverified,
                }
            )
    return rows


def _phases(run: Run) -> list[dict[str, Any]]:
    where = f"{run.summary_path}, phase_seconds"
    recorded = mapping(run.summary, "phase_seconds", str(run.summary_path))
    spent = {name: seconds for name in recorded if (seconds := number(recorded, name, where)) is not None}
    whole = sum(spent.values()) or 1.0
    return [
        {"name": PHASES.get(name, name), "seconds": seconds, "share": seconds / whole}
        for name, seconds in spent.items()
    ]


def _context(run: Run) -> dict[str, Any]:
    where = str(run.summary_path)
    speeds = mapping(run.summary, "tokens_per_second", where)
    evaluated = list(run.solutions)
    states = [[solution.state for solution in rows] for rows in run.solutions.values()]
    samples = choose_samples(run.solutions) if run.solutions else []
    longest = max((len(s) for sample in samples for _, one in sample.solutions for s in one.steps), default=0)
    thresholds = {
        record["iteration"]: number(mapping(record, "prm", where), "threshold", f"{where}, prm")
        for record in run.iterations
    }
    passed = run.rates("pass@1")
    # A run directory from before judges had names was judged by the checker.
    judge = run.iterations[-1].get("steps_judged_by", "checker")
    if judge is not None and judge not in JUDGES:
        raise RunError(f"{where}: 'steps_judged_by' is {judge!r}; write one of {', '.join(JUDGES)}, or null")
    held_out, right = (number(run.summary, f"held_out_{what}", where) for what in ("completions", "right"))
    problems = number(run.summary, "held_out_problems", where)
    majority = _majority(run)
    rates = _rates(run, problems, majority)
    interval = wilson(passed[-1], problems) if passed[-1] is not None and problems else None
    return {
        "recipe": run.summary.get("recipe"),
        "engine": run.summary.get("engine"),
        "facts": {key: number(run.summary, key, where) for key in ("seconds", "model_parameters", "seed")},
        "problems": problems,
        "interval": interval,
        "headline": headline(passed, run.rates("flawed_correct"), run.rates("auroc")),
        "offline": run.summary.get("label_source") == "dataset",
        "judge": judge,
        "judge_text": None if judge is None else JUDGES[judge],
        "steps": _steps(run),
        "step_columns": STEP_COLUMNS,
        "held_out_completions": held_out,
        "chance": None if held_out is None or right is None else auroc_chance(right, held_out),
        "names": [figures.model(record["iteration"]) for record in run.iterations],
        "majority": majority,
        "rates": rates,
        "flow": figures.flow(evaluated, states, STATES) if len(states) > 1 else None,
        "training": _training(run) if run.training else [],
        "truncated_lines": run.truncated_lines,
        "head": _head(run),
        "head_columns": HEAD_COLUMNS,
        "agreement": _agreement(run),
        "agreement_columns": AGREEMENT_COLUMNS,
        "drift": _drift(run),
        "samples": samples,
        "long_steps": longest > 48,
        "thresholds": thresholds,
        "phases": _phases(run),
        "speeds": {SPEEDS.get(name, name): number(speeds, name, f"{where}, tokens_per_second") for name in speeds},
        "sync": run.rates("weight_sync_max_abs_logp_diff"),
        "counts": {COUNTS.get(name, name): count for name, count in mapping(run.summary, "counts", where).items()},
        "config": run.config,
    }


def render(run: Run) -> str:
    """The page as text. Everything that comes from the run is escaped."""
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "significant": significant,
        "duration": duration,
        "model": figures.model,
    }
    return environment.from_string(template).render(_context(run))


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` and return its path; an earlier report stays whole until the new one is complete.

    Raises RunError naming the file, the row or key, and the remedy when the run directory cannot be understood, and
    OSError when the page cannot be written.
    """
    path = Path(run_dir) / "report.html"
    page = render(read_run(run_dir)).encode("utf-8", errors="replace")
    with replacing(path) as unfinished:
        unfinished.write_bytes(page)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one run directory. 0 when the report is written, 1 when not, 2 when called otherwise."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m stepkto_fast.report RUN_DIR", file=sys.stderr)
        return 0 if given in (["-h"], ["--help"]) else 2
    try:
        print(write_report(given[0]))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: the report cannot be written: {error}; mend that path and call again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
