"""Kills runs of the smoke recipe at random moments until they end, and holds each against an undisturbed one.

    python tests/soak/kill.py [KILLS] [--seed N] [--out FILE.json] [--key value ...]

Other options go to the runs. Prints a table of the kills; --out stores them as JSON, after each run. The exit code is
1 when a run did not end, or ended otherwise than the undisturbed one.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from killed_run import ROOT, Moment, Runner, differences

RECIPE = [str(ROOT / "recipes" / "smoke.yaml"), "--report_to", "none", "--rollout_shard_size", "8"]
KILLS = 8  # of a run, after which it may end


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", nargs="?", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    settings, options = parser.parse_known_args(argv)
    console, rng = Console(highlight=False), random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as folder, Runner(Path(folder) / "runner") as runner:
        whole = Path(folder) / "undisturbed"
        undisturbed = runner.run(*RECIPE, *options, "--output_dir", str(whole))
        if undisturbed.code:
            console.print(undisturbed.log, markup=False)
            return 1
        console.print(f"undisturbed: {undisturbed.seconds:.0f} s")
        found: list[dict[str, list]] = []
        # A run whose moment never comes, since it ended before, counts for nothing.
        while sum(len(run["kills"]) for run in found) < settings.kills:
            number = len(found)
            found.append(killed(runner, options, Path(folder) / f"run_{number}", whole, undisturbed.seconds, rng))
            kills = ", ".join(f"{kill['phase']} {kill['second']:.1f} s" for kill in found[-1]["kills"])
            end = ", ".join(found[-1]["differences"]) or "the same"
            console.print(f"run {number}: killed at {kills or 'no moment'}: {end}", markup=False, soft_wrap=True)
            if settings.out:
                content = {"options": options, "seed": settings.seed, "seconds": undisturbed.seconds, "runs": found}
                settings.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(found, console)
    return int(any(run["differences"] for run in found))


def killed(
    runner: Runner, options: list[str], folder: Path, whole: Path, longest: float, rng: random.Random
) -> dict[str, list]:
    """One run, killed at moments drawn evenly from what an undisturbed one takes, and in what it differs from that."""
    kills: list[dict] = []
    while True:
        arguments = [*RECIPE, *options, "--output_dir", str(folder)]
        if (folder / "config.yaml").exists():
            arguments += ["--resume", "true"]
        moment = Moment(seconds=rng.uniform(0, longest)) if len(kills) < KILLS else Moment()
        # Rarer moments than chance would find: files that are just being put in place.
        if moment.seconds is not None and rng.random() < 0.3:
            moment = replace(moment, event="os.rename", nth=rng.randint(1, 40), after=rng.random() < 0.5)
        outcome = runner.run(*arguments, moment=moment)
        if not outcome.killed:
            break
        kills.append({"second": outcome.seconds, "phase": outcome.phase, **lost(folder)})
    wrong = differences(folder, whole) if outcome.code == 0 else [f"exit code {outcome.code}: {outcome.log[-500:]}"]
    return {"kills": kills, "differences": wrong}


def lost(folder: Path) -> dict[str, int]:
    """What a kill has left to do again: update steps behind the newest checkpoint; and shards that it has kept."""
    newest = max((json.loads(p.read_text()) for p in folder.glob("checkpoints/iteration_*/progress.json")),
                 key=lambda saved: saved["global_step"], default={"metrics_bytes": 0})  # fmt: skip
    metrics = folder / "metrics.jsonl"
    behind = metrics.read_bytes()[newest["metrics_bytes"] :] if metrics.exists() else b""
    return {
        "steps_again": behind.count(b'"loss"'),
        "shards_kept": len(list(folder.glob("rollouts/*/**/[sc]*_*.parquet"))),
    }


def show(found: list[dict], console: Console) -> None:
    table = Table(title=f"{sum(len(run['kills']) for run in found)} kills of {len(found)} runs")
    for column in ("killed during", "times", "update steps done again, at most", "survived", "results lost"):
        table.add_column(column)
    phases = Counter(kill["phase"] for run in found for kill in run["kills"])
    for phase, times in sorted(phases.items()):
        runs = [run for run in found for kill in run["kills"] if kill["phase"] == phase]
        again = max(kill["steps_again"] for run in runs for kill in run["kills"] if kill["phase"] == phase)
        survived = sum(not run["differences"] for run in runs)
        table.add_row(phase, str(times), str(again), str(survived), "none" if survived == times else "see above")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
