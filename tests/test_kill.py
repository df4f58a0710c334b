"""SIGKILL at chosen moments of every phase: `--resume true` ends with the same weights, rollouts and metrics, all bits.

Twenty random moments: `make soak`.
"""

import pytest
from killed_run import ROOT, Moment, Runner, differences

pytestmark = pytest.mark.loop

# Three shards of rollouts an iteration, two iterations, a checkpoint after every step, and both sources of labels.
TINY = [
    str(ROOT / "recipes" / "smoke.yaml"), "--engine", "transformers", "--report_to", "none", "--num_prompts", "9",
    "--num_test_problems", "10", "--rollout_shard_size", "4", "--prm_seed_problems", "10", "--save_steps", "1",
    "--train_batch_size", "8",
    "--label_source", "consensus", "--mc_continuations", "2", "--prm_labels", "monte_carlo",
]  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with Runner(tmp_path_factory.mktemp("runner")) as runner:
        yield runner


@pytest.fixture(scope="module")
def arguments(runner, tmp_path_factory):
    """TINY with a model, so that only one run has to make it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    done = runner.run(*TINY, "--output_dir", str(folder), moment=Moment(r"os.mkdir .*/evaluations"))
    assert done.killed, done.log
    return [*TINY, "--model", str(folder / "checkpoints" / "iteration_0")]


@pytest.fixture(scope="module")
def undisturbed(runner, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = runner.run(*arguments, "--output_dir", str(folder))
    assert done.code == 0, done.log[-2000:]
    return folder


def at(event, phase, nth=1, **how):
    return Moment(event, nth, **how), phase


# One run is killed at each moment of a list in turn. Between two of them it commits a checkpoint, mostly, so that what
# the first resumption made of the first kill is part of the end.
MOMENTS = {
    "whole": [
        at(r"os.rename .*checkpoints/iteration_0", "start"),
        at(r"os.rename .*/hot/shard_1", "seed_set", halve=True),
        at(r"open .*metrics.jsonl", "update", 4),
        at(r"os.remove model.safetensors", "update", 1),
        at(r"os.rename .*iteration_1/rollouts/shard_1", "rollout", after=True),
        at(r"os.rename .*checkpoints/iteration_1_step_2$", "update", after=True),
        at(r"os.rename .*checkpoints/iteration_2$", "after update", after=True),
        at(r"os.rename .*unfinished-model", "after evaluation"),
    ],
    "labels": [
        at(r"os.rename .*seed.parquet$", "after monte_carlo", after=True),
        at(r"open .*unfinished-iteration_0_step_2/", "update"),
        at(r"os.rename .*checkpoints/iteration_1$", "after update"),
        at(r"os.rename .*monte_carlo_iteration_1/chunk_1", "monte_carlo", halve=True),
        at(r"os.rename .*checkpoints/iteration_2$", "after update"),
        at(r"os.rename .*summary.json$", "after evaluation", halve=True),
    ],
    "evaluation": [
        at(r"os.rename .*monte_carlo_seed/chunk_1", "monte_carlo", after=True),
        at(r"open .*unfinished-iteration_1/", "after update"),
        at(r"os.rename .*iteration_1/sampled/shard_1", "evaluation"),
        at(r"os.rename .*checkpoints/iteration_1_step_4$", "update"),
        at(r"os.rename .*evaluations/iteration_2.parquet$", "evaluation"),
        at(r"open .*unfinished-model/", "after evaluation", 3),
    ],
    "rollouts": [
        at(r"os.rename .*iteration_0/rollouts/shard_2", "rollout", halve=True),
        at(r"os.rename .*checkpoints/iteration_1$", "after update", after=True),
        at(r"os.rename .*rollouts/iteration_1.parquet$", "after reference", after=True),
        at(r"os.remove optimizer.safetensors", "update", 2),
        at(r"os.rename .*summary.json$", "after evaluation", after=True),
        at(r"open .*report.html", "after evaluation"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_run_ends_as_the_undisturbed_one(runner, arguments, undisturbed, tmp_path, name):
    mine = [*arguments, "--output_dir", str(tmp_path / "run")]
    for moment, phase in MOMENTS[name]:
        cut = runner.run(*mine, moment=moment)
        assert (moment, cut.killed, cut.phase) == (moment, True, phase), cut.log[-2000:]
        mine = [*arguments, "--output_dir", str(tmp_path / "run"), "--resume", "true"]
    resumed = runner.run(*mine)
    assert resumed.code == 0, resumed.log[-2000:]
    assert differences(tmp_path / "run", undisturbed) == []
