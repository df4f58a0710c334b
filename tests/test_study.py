"""The study's command on its smallest family: killed, continued, and what its result files hold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.study.__main__ import main
from stepkto_fast.study.plan import FAMILIES, Spec, left
from stepkto_fast.study.results import INITIAL, STAGES, counting, load
from stepkto_fast.study.run import has_initial, metric_lines, run

pytestmark = pytest.mark.loop
SMOKE = FAMILIES["smoke"]


def command(folder: Path) -> list[str]:
    places = ["--output_dir", str(folder / "work"), "--results", str(folder / "results")]
    return [sys.executable, "-m", "stepkto_fast.study", "--family", "smoke", *places]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A whole study that was killed once some of it was done."""
    folder = tmp_path_factory.mktemp("study")
    with open(folder / "first.log", "w") as log:
        process = subprocess.Popen(command(folder), stdout=log, stderr=log)
        while process.poll() is None and not list((folder / "results").glob("search/*/*/*.json")):
            time.sleep(0.1)
        workers = children(process.pid)
        assert workers
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers)), "workers end with the command that started them"
    first = {path: path.stat().st_mtime_ns for path in (folder / "results").glob("*/*/*/*.json")}
    assert 0 < len(first) < sum(left(SMOKE, []).values()), (folder / "first.log").read_text()
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left: 0 search, 0 main, 0 ablations" in done.stdout
    assert all(path.stat().st_mtime_ns == before for path, before in first.items()), "what was done is not done again"
    return folder


def results(folder: Path) -> list[dict]:
    counts, stale = counting(load(folder / "results"))
    assert not stale
    return [r for r in counts if r["stage"] != INITIAL]


def test_every_run_leaves_a_result_from_the_m_0_of_its_seed(study):
    found = results(study)
    assert left(SMOKE, found) == dict.fromkeys(STAGES, 0)
    assert {r["difficulty"] for r in found} == {"short"}
    weights = {r["seed"]: r["weights"] for r in load(study / "results") if r["stage"] == INITIAL}
    assert set(weights) == {*SMOKE.seeds, *SMOKE.search_seeds}
    assert len(set(weights.values())) == len(weights)
    assert all(r["initial_weights"] == weights[r["seed"]] for r in found)


def test_a_result_holds_what_the_page_needs(study):
    for r in results(study):
        assert not r.get("failed")
        problems = SMOKE.validation_problems if r["stage"] == "search" else SMOKE.test_problems
        assert [record["iteration"] for record in r["iterations"]] == [0, 1, 2]
        assert len(r["greedy"]) == 3
        assert len(r["rollouts"]) == 2
        for record, greedy in zip(r["iterations"], r["greedy"], strict=True):
            assert {len(greedy[name]) for name in ("right", "first_error", "steps")} == {problems}
            assert greedy["right"].count("1") / problems == pytest.approx(record["pass@1"])
            flawed = sum(x == "1" and e != "0" for x, e in zip(greedy["right"], greedy["first_error"], strict=True))
            share = flawed / greedy["right"].count("1") if "1" in greedy["right"] else None
            assert share == pytest.approx(record["flawed_correct"])
        assert ("final" in r) == (r["stage"] == "main")
        for name, final in r.get("final", {}).items():
            assert name in ("test", "shifted")
            assert len(final["samples_right"]) == len(final["majority_right"]) == SMOKE.test_problems
            assert max(map(int, final["samples_right"])) <= SMOKE.samples == final["k"]
        f1 = [record["prm_f1"] for record in r["iterations"]]
        assert all((x is not None) == (r["arm"] == "step_kto_prm") for x in f1)
        assert 0 < r["train_cpu_seconds"] <= r["cpu_seconds"]


def test_m_3_of_the_run_is_what_is_measured_in_the_end(study):
    for r in results(study):
        if r["stage"] == "main":
            assert r["final"]["test"]["greedy"] == r["greedy"][-1]
            assert r["final"]["shifted"]["greedy"]["steps"] != r["greedy"][-1]["steps"]


def test_the_settings_of_a_result_are_a_recipe(study):
    for r in results(study):
        recipe = Recipe(**r["recipe"])
        assert all(getattr(recipe, key) == value for key, value in r["overrides"].items())
        assert not {"model", "output_dir", "test_dataset"} & set(r["recipe"]), "no place of this machine"


def test_arms_start_from_the_same_model_and_then_differ(study):
    main_runs = [r for r in results(study) if r["stage"] == "main" and r["seed"] == 0]
    assert len({json.dumps(r["greedy"][0]) for r in main_runs}) == 1
    assert len({r["iterations"][-1]["kl_from_initial"] for r in main_runs}) == len(main_runs)


def test_an_m_0_of_other_settings_does_not_count(study, tmp_path):
    spec = Spec("main", "short", "kto", "kto", 0, {})
    result = tmp_path / "initial" / "short" / "seed_0.json"
    result.parent.mkdir(parents=True)
    made = json.loads((study / "results" / "initial" / "short" / "seed_0.json").read_text())
    assert not has_initial(spec, SMOKE, study / "work", tmp_path)
    result.write_text(json.dumps(made))
    assert has_initial(spec, SMOKE, study / "work", tmp_path)
    assert not has_initial(spec, SMOKE, tmp_path, tmp_path)
    result.write_text(json.dumps(made | {"recipe": made["recipe"] | {"warm_start_steps": 7}}))
    assert not has_initial(spec, SMOKE, study / "work", tmp_path)


def test_runs_are_deleted_once_they_have_a_result(study):
    assert not list((study / "work" / "runs").glob("**/checkpoints"))


def test_a_policy_that_cannot_be_trained_on_is_a_result(study, tmp_path):
    spec = Spec("main", "short", "dpo_alone", "dpo", 0, {"objective": "dpo", "num_generations": 1})
    note = run(spec, "smoke", study / "work", tmp_path, keep=True)
    (found,) = (json.loads(path.read_text()) for path in tmp_path.glob("main/short/dpo_alone/*.json"))
    assert "no prompt" in note or "none of" in note
    assert found["failed"] == note.removeprefix("failed: ")
    assert [record["iteration"] for record in found["iterations"]] == [0]
    assert "final" not in found
    assert len(found["rollouts"]) == len(metric_lines(study / "work" / "runs" / spec.place, "step_accuracy")) == 1


def test_what_the_user_can_mend_is_no_result(study, tmp_path):
    spec = Spec("main", "short", "broken", "kto", 0, {"device": "cuda:99"})
    with pytest.raises(RunError, match="device 'cuda:99' is not available"):
        run(spec, "smoke", study / "work", tmp_path, keep=False)
    assert not list(tmp_path.glob("**/*.json"))


def test_a_run_that_the_user_has_to_mend_does_not_stop_the_others(study):
    files = [study / "results" / "main" / "short" / name / "seed_0.json" for name in ("kto", "rft")]
    before = [json.loads(path.read_text()) for path in files]
    texts = [path.read_text() for path in files]
    for path in files:
        path.unlink()
    folder = study / "work" / "runs" / "main" / "short" / "kto" / "seed_0"
    folder.mkdir(parents=True)
    held = "import sys, pathlib, stepkto_fast.atomic as a; a.hold(pathlib.Path(sys.argv[1])); print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        done = subprocess.run(command(study), capture_output=True, text=True, timeout=300)
        other.kill()
    again = json.loads(files[1].read_text())
    missing = not files[0].exists()
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)
    assert done.returncode == 1
    assert "error: main/short/kto/seed_0: another process is at work" in done.stdout
    assert "1 of the runs could not be done, such as main/short/kto/seed_0" in done.stderr
    assert missing
    assert again["greedy"] == before[1]["greedy"], "the same run again, to the bit"


def test_one_study_at_a_time_has_a_folder(tmp_path, capsys):
    held = "import sys, pathlib, stepkto_fast.atomic as a; a.hold(pathlib.Path(sys.argv[1])); print(); sys.stdin.read()"
    arguments = [sys.executable, "-c", held, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main(["--family", "smoke", "--output_dir", str(tmp_path)]) == 1
        other.kill()
    assert f"another study is at work in {tmp_path}" in capsys.readouterr().err


def test_what_is_left_is_listed(study, tmp_path, capsys):
    assert main(["--family", "smoke", "--results", str(study / "results"), "--list", "true"]) == 0
    assert capsys.readouterr().out.strip() == "left: 0 search, 0 main, 0 ablations"
    assert main(["--family", "smoke", "--results", str(tmp_path), "--list", "true", "--only", "search/short/kto"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "search/short/kto-rate_0.0001-beta_0.5/seed_100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "tiny"], "family is 'tiny': give one of cpu, large, smoke"),
        (["--stages", "main,mian"], "stages names ['mian']: give some of search, main, ablations"),
        (["--workers", "0"], "workers is 0: give at least 1"),
    ],
)
def test_bad_settings_are_one_message(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
