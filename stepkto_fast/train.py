"""The training loop: `python -m stepkto_fast.train [recipe.yaml] [--key value ...]`.

For M_0, M_1, ...: hand the weights to the sampler, fit the PRM head, evaluate; sample rollouts and label them; update
by Step-KTO. `_iterate` is the whole loop; every line of it is a phase in `labelling.py`, `phases.py` or `update.py`.
On labelled data (`label_source: dataset`) there are no rollouts: `offline.py`.
"""

import sys
import time
from contextlib import closing

from . import planner
from .adapters import add_adapters
from .ahead import while_updating
from .command import run_command
from .determinism import make_deterministic
from .labelling import fit_head
from .offline import train_offline
from .phases import collect, finish, judge, reference_model
from .ranks import close_ranks, is_main, open_ranks
from .recipe import Recipe, parse_recipe
from .rollout import read_rollouts
from .sampling_shards import SHARDS, drop_shards
from .setup_run import derived_seed, open_session
from .task import Task, open_task
from .update import update


def train(recipe: Recipe) -> dict:
    """Runs the recipe and returns what summary.json holds. Raises RunError for everything the user can mend."""
    if recipe.label_source == "dataset":
        return train_offline(recipe)
    with closing(open_task(recipe)) as task:
        return _iterate(recipe, task)


def _iterate(recipe: Recipe, task: Task) -> dict:
    s, policy = open_session(recipe, task)
    prm = None
    while True:
        t = s.progress.iteration
        rollouts_file = s.run.rollouts / f"iteration_{t}.parquet"
        if s.progress.step == 0:
            s.sampler.sync(policy)
            prm = fit_head(s, policy, prm)
            judge(s, policy, prm)
            if t == recipe.iterations:
                return finish(s, policy, prm)
            collect(s, policy, prm, rollouts_file)
        elif recipe.max_staleness:
            s.sampler.sync(policy)
        merge = add_adapters(policy, recipe, derived_seed(recipe, "adapters", t))
        reference = reference_model(s, policy)
        with while_updating(s, policy):
            update(policy, reference, read_rollouts(rollouts_file), s.recipe, s.run, s.progress, s.recorder)
        merge()
        s.progress.next_iteration()
        s.run.save_policy(policy, s.tokenizer, s.progress)
        drop_shards(s.run.rollouts / SHARDS / f"iteration_{t}")


def main(argv: list[str]) -> int:
    """The command line. 0 when the run ended well, 1 with one message where the user can mend something.

    With `--plan` nothing runs: what the recipe needs is computed and printed.
    """
    if "--plan" in argv:
        return planner.main([word for word in argv if word != "--plan"])
    start = time.monotonic()

    def action() -> None:
        recipe = parse_recipe(argv)
        if recipe.deterministic:
            make_deterministic()
        open_ranks(recipe.distributed_timeout)
        train(recipe)
        if is_main():
            print(f"done in {time.monotonic() - start:.0f} s")
        close_ranks()

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
