"""One run of the study, and the M_0 that the runs of a seed start from."""

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from ..atomic import replacing, replacing_folder
from ..checkpoint import save_pretrained
from ..collect import ask, sample_rollouts
from ..command import open_device
from ..errors import RunError, TrainingError
from ..evaluation import judge_steps, majority_hits
from ..policy import load_policy
from ..recipe import Recipe
from ..rollout import Rollout
from ..sampler import open_sampler
from ..sampling_shards import weights_digest
from ..setup_run import derived_seed, make_initial_policy
from ..task import open_task
from ..tasks import arithmetic
from ..train import train
from .plan import Family, Spec, family_of, recorded, run_settings, same_settings
from .results import INITIAL, greedy_record, samples_record, write_result

TOKENS_A_STEP = 7  # of a written step, the answer line included
PROBLEMS = ("test", "validation", "shifted")


def problem_files(work: Path, difficulty: str) -> dict[str, Path]:
    """Where the problems of a difficulty lie that are never trained on: a JSONL file for each of `PROBLEMS`."""
    return {name: work / "problems" / difficulty / f"{name}.jsonl" for name in PROBLEMS}


def prepare_problems(family: Family, work: Path) -> None:
    """Writes those files of all difficulties, before any worker reads one."""
    for difficulty, d in family.difficulties.items():
        level = Recipe(**family.base(difficulty)).level
        for name, path in problem_files(work, difficulty).items():
            first, last = d.shifted if name == "shifted" else d.trained
            rows = arithmetic.problems(family.count(name), f"study {name}", level, range(first, last + 1))
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                text = "".join(json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) + "\n" for p in rows)
                unfinished.write_text(text, "utf-8")


def end_with(parent: int) -> None:
    """Makes this process, a worker, end when the process `parent`, which started it, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def logged(logs: Path, call: Callable[..., str], spec: Spec, *rest: object) -> tuple[float, str]:
    """`call(spec, ...)` with what it prints in a log file; its seconds, and what it says of its result."""
    log, start = logs / f"{spec.place}.log", time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        note = call(spec, *rest)
    return time.monotonic() - start, note


def initial_recipe(spec: Spec, family: Family, work: Path) -> Recipe:
    """What the M_0 that `spec` starts from is made with."""
    every = work / "problems" / spec.difficulty / f"held_out_{spec.seed}.jsonl"
    count = sum(map(family.count, PROBLEMS))
    places = {"seed": spec.seed, "test_dataset": str(every), "num_test_problems": count}
    return Recipe(**family.initial(spec.difficulty) | places)


def initial_places(spec: Spec, work: Path, results: Path) -> tuple[Path, Path]:
    """The folder of that M_0, and its result file."""
    place = Path(INITIAL) / spec.difficulty / f"seed_{spec.seed}"
    return work / place, results / place.with_suffix(".json")


def has_initial(spec: Spec, family: Family, work: Path, results: Path) -> bool:
    """Whether that M_0 is there, made and measured by the family as it is now."""
    folder, result = initial_places(spec, work, results)
    if not (folder.exists() and result.exists()):
        return False
    return same_settings(json.loads(result.read_text("utf-8"))["recipe"], initial_recipe(spec, family, work))


def prepare_initial(spec: Spec, of_family: str, work: Path, results: Path) -> str:
    """Makes the M_0 that `spec` starts from under `work`, anew if there is one, and measures it; returns a word on
    it."""
    start, cpu = time.monotonic(), time.process_time()
    family = family_of(of_family)
    folder, result = initial_places(spec, work, results)
    problems, recipe = problem_files(work, spec.difficulty), initial_recipe(spec, family, work)
    assert recipe.test_dataset is not None
    with replacing(Path(recipe.test_dataset)) as unfinished:  # nothing is demonstrated that anything is measured on
        unfinished.write_text("".join(path.read_text("utf-8") for path in problems.values()), "utf-8")
    before = json.loads(result.read_text("utf-8")).get("weights") if result.exists() else None
    with closing(open_task(recipe)) as task:
        model, tokenizer = make_initial_policy(recipe, task, task.problems(), lambda step, loss: None)
    with replacing_folder(folder) as unfinished:
        save_pretrained(model, tokenizer, unfinished)
    found = {kind: measure(folder, kind, family, spec, work) for kind in ("test", "shifted")}
    write_result(
        {
            "difficulty": spec.difficulty, "seed": spec.seed, **found, "recipe": recorded(recipe),
            "weights": weights(folder), **surroundings(), "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - cpu,
        },
        result,
    )  # fmt: skip
    solved = found["test"]["greedy"]["right"]
    note = f"{solved.count('1') / len(solved):.1%}"
    return note if before in (None, weights(folder)) else f"{note}; other weights than before: its runs start anew"


def weights(folder: Path) -> str:
    """What tells a saved model from another one."""
    return weights_digest(load_policy(str(folder))[0])


def run(spec: Spec, of_family: str, work: Path, results: Path, keep: bool) -> str:
    """Runs `spec`, or continues it, and writes its result file; returns a word on it. What a run says whose policy
    cannot be trained on (TrainingError) is a result, too: `failed`. Its directory stays with `keep`."""
    family = family_of(of_family)
    start, cpu = time.monotonic(), time.process_time()
    folder, (initial, _) = work / "runs" / spec.place, initial_places(spec, work, results)
    problems = problem_files(work, spec.difficulty)["validation" if spec.stage == "search" else "test"]
    settings = run_settings(family, spec) | {
        "model": str(initial), "output_dir": str(folder), "test_dataset": str(problems)
    }  # fmt: skip
    resume = (folder / "config.yaml").exists() and any(folder.glob("checkpoints/iteration_*"))
    recipe = Recipe(**settings, resume=resume, overwrite=not resume)
    result: dict[str, Any] = {
        "stage": spec.stage, "difficulty": spec.difficulty, "name": spec.name, "arm": spec.arm, "seed": spec.seed,
        "overrides": spec.overrides, "recipe": recorded(recipe), "initial_weights": weights(initial), **surroundings(),
    }  # fmt: skip
    try:
        summary = train(recipe)
        records, seconds = summary["iterations"], summary["phase_seconds"]
    except TrainingError as error:
        records, seconds = metric_lines(folder, "step_accuracy"), {}
        result["failed"] = str(error).replace(str(folder), "RUN")
    result |= {
        "iterations": [without_bins(record) for record in records],
        "rollouts": metric_lines(folder, "completions/mean_length"),
        "greedy": [greedy_of(folder / "evaluations" / f"iteration_{t}.parquet") for t in range(len(records))],
        "phase_seconds": seconds,
    }
    result |= {"train_cpu_seconds": time.process_time() - cpu}
    if spec.stage == "main" and "failed" not in result:
        result["final"] = {kind: measure(folder / "model", kind, family, spec, work) for kind in ("test", "shifted")}
    result |= {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu, "resumed": resume}
    write_result(result, results / f"{spec.place}.json")
    if not keep:
        shutil.rmtree(folder)
    if "failed" in result:
        return f"failed: {result['failed']}"
    return " -> ".join(f"{record['pass@1']:.1%}" for record in result["iterations"])


def measure(model: Path, kind: str, family: Family, spec: Spec, work: Path) -> dict[str, Any]:
    """A saved model on the problems of a `kind`: greedy solutions and `family.samples` samples of each (schema of
    `results.py`)."""
    longest, problems = max(family.difficulties[spec.difficulty].shifted), problem_files(work, spec.difficulty)[kind]
    settings = family.base(spec.difficulty) | {
        "seed": spec.seed, "model": str(model), "test_dataset": str(problems), "num_test_problems": family.count(kind),
        "max_completion_length": TOKENS_A_STEP * (longest + 2),
    }  # fmt: skip
    recipe = Recipe(**settings)
    policy, tokenizer = load_policy(str(model))
    policy.to(open_device(recipe.device)).eval()
    with closing(open_task(recipe)) as task:
        asked, complaints = ask(task, task.held_out()[0], tokenizer, policy, recipe)
        if complaints:
            raise RunError(f"{problems}: {len(complaints)} problems cannot be asked, such as {complaints[0]}")
        sampler = open_sampler(recipe, policy, tokenizer, model, model.with_suffix(".engine.log"))
        greedy, sampled = (
            sample_rollouts(
                sampler, task, asked, tokenizer, recipe, n=n, temperature=temperature,
                seed=derived_seed(recipe, "study", purpose),
            )
            for n, temperature, purpose in ((1, 0.0, "greedy"), (family.samples, recipe.temperature, "samples"))
        )  # fmt: skip
        sampler.close()
        judge_steps(greedy, task, None, recipe)
        k = family.samples
        right = [sum(r.label for r in sampled[n : n + k]) for n in range(0, len(sampled), k)]
        return {"greedy": greedy_record(greedy), **samples_record(right, majority_hits(sampled, task, k), k)}


def greedy_of(path: Path) -> dict[str, Any]:
    """The greedy solutions that a run stored, as `results.greedy_record`."""
    rows = pq.read_table(path, columns=["label", "step_labels", "completion_tokens"]).to_pylist()
    solutions = [
        Rollout(0, 0, "", [], "", [0] * row["completion_tokens"], [], True, label=row["label"],
                step_labels=row["step_labels"])
        for row in rows
    ]  # fmt: skip
    return greedy_record(solutions)


def metric_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that have the metric `name`."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if name in line]


def without_bins(record: dict[str, Any]) -> dict[str, Any]:
    """A record of M_t without the curves of the head's calibration."""
    return {k: v for k, v in record.items() if k != "prm"} | {
        "prm": {k: v for k, v in record.get("prm", {}).items() if k != "bins"}
    }


def surroundings() -> dict[str, Any]:
    """What a result depends on besides its settings: versions and the machine."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "stepkto-fast")},
        "machine": f"{processor()}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1),
    }


def processor() -> str:
    """The processor's or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
