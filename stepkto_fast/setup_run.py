"""What a run starts from: problems, the policy M_0, the sampler, and its progress, fresh or from a checkpoint."""

import random
import zlib
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .collect import Asked, ask
from .errors import RunError
from .policy import build_policy, build_tokenizer, load_policy
from .recipe import Recipe
from .recorder import Recorder, require_report
from .run_directory import Progress, RunDirectory
from .sampler import Sampler, open_sampler, require_engine
from .tasks import arithmetic
from .warm_start import demonstrations, fine_tune


def derived_seed(recipe: Recipe, *purpose: object) -> int:
    """A seed for one purpose: the same in a resumed run, another for every purpose."""
    return zlib.crc32(repr((recipe.seed, *purpose)).encode())


@dataclass(frozen=True)
class Problems:
    """The problems of a run: fresh training problems for each iteration, none of them among the held-out ones."""

    test: list[arithmetic.Problem]
    seed: list[arithmetic.Problem]
    train: list[list[arithmetic.Problem]]
    complaints: list[str]


def load_problems(recipe: Recipe) -> Problems:
    """Generated problems, or those of the recipe's files; training problems that are held out are left out."""
    operations = range(recipe.min_operations, recipe.max_operations + 1)
    complaints: list[str] = []
    if recipe.test_file:
        test, complaints = arithmetic.read_problems(recipe.test_file)
        test = list(dict.fromkeys(test))
    else:
        # The held-out problems do not depend on the seed, so that runs can be compared on them.
        test = arithmetic.problems(recipe.num_test_problems, "test", recipe.level, operations)
    held_out = frozenset(p.prompt for p in test)
    if recipe.train_file:
        pool, more = arithmetic.read_problems(recipe.train_file)
        complaints += more
        pool = [p for p in dict.fromkeys(pool) if p.prompt not in held_out]
        if len(pool) < 10:
            raise RunError(
                f"{recipe.train_file!r} has {len(pool)} different problems that are not held out: give at least 10"
            )
        rng = random.Random(f"train_file {recipe.seed}")
        rng.shuffle(pool)
        # The head must not be fitted on the problems whose steps it will label.
        cut = min(recipe.prm_seed_problems, len(pool) // 2)
        seed, rest = pool[:cut], pool[cut:]
        train = [rng.sample(rest, min(recipe.num_prompts, len(rest))) for _ in range(recipe.iterations)]
    else:
        count = recipe.prm_seed_problems + recipe.iterations * recipe.num_prompts
        pool = arithmetic.problems(count, f"train {recipe.seed}", recipe.level, operations, exclude=held_out)
        seed, rest = pool[: recipe.prm_seed_problems], pool[recipe.prm_seed_problems :]
        train = [rest[t * recipe.num_prompts : (t + 1) * recipe.num_prompts] for t in range(recipe.iterations)]
    return Problems(test, seed, train, complaints)


def make_initial_policy(
    recipe: Recipe, problems: Problems, recorder: Recorder
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """M_0 where the recipe names no model: a small Llama fine-tuned on demonstrations with wrong steps in them."""
    operations = range(recipe.min_operations, recipe.max_operations + 1)
    held_out = frozenset(p.prompt for p in problems.test)
    stream = arithmetic.random_problems(f"demonstrations {recipe.seed}", recipe.level, operations, exclude=held_out)
    asked = list(islice(stream, min(recipe.warm_start_steps * recipe.warm_start_batch_size, 20_000)))
    teacher = arithmetic.Misconceptions.draw(
        str(recipe.seed), recipe.misconceptions, recipe.misconception_rate, recipe.slip_rate
    )
    every = [*asked, *problems.test, *problems.seed, *(p for train in problems.train for p in train)]
    texts = [p.prompt + arithmetic.demonstration(random.Random(0), p) for p in every]
    tokenizer = build_tokenizer(texts)
    model = build_policy(
        tokenizer, hidden_size=recipe.hidden_size, layers=recipe.num_layers, heads=recipe.num_heads,
        max_length=recipe.context_length, seed=derived_seed(recipe, "policy"),
    ).to(device_of(recipe))  # fmt: skip
    with recorder.bar("warm_start", "making M_0 from demonstrations") as advance:
        fine_tune(
            model, demonstrations(asked, teacher, tokenizer, str(recipe.seed)), steps=recipe.warm_start_steps,
            batch_size=recipe.warm_start_batch_size, learning_rate=recipe.warm_start_learning_rate,
            seed=str(recipe.seed),
            on_step=lambda step, loss: advance(step, recipe.warm_start_steps, f"loss {loss:.3f}"),
        )  # fmt: skip
    return model, tokenizer


def device_of(recipe: Recipe) -> torch.device:
    """The recipe's device; RunError when it is not there."""
    name = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}); use --device cpu"
        ) from error


def say_skipped(which: str, complaints: list[str], progress: Progress, recorder: Recorder) -> None:
    """Counts the prompts that were left out, and says why of the first few."""
    progress.counts[f"skipped_{which}_prompts"] = progress.counts.get(f"skipped_{which}_prompts", 0) + len(complaints)
    for complaint in complaints[:3]:
        recorder.say(f"skipped {which} {complaint}")
    if len(complaints) > 3:
        recorder.say(f"skipped {len(complaints) - 3} more {which} prompts")


@dataclass
class Session:
    """An open run: what every phase of the loop needs besides the policy it works on."""

    recipe: Recipe
    run: RunDirectory
    progress: Progress
    recorder: Recorder
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    initial: PreTrainedModel  # M_0
    problems: Problems
    test: list[Asked]


def open_session(recipe: Recipe) -> tuple[Session, PreTrainedModel]:
    """Opens the run directory, makes or loads M_0, starts the sampler. Also returns the policy to go on with: M_0, or
    with `resume` the M_t of the newest checkpoint."""
    # Whatever can be wrong is found out before anything on the disk is touched.
    device, problems = device_of(recipe), load_problems(recipe)
    require_engine(recipe)
    require_report(recipe)
    given = load_policy(recipe.model) if recipe.model is not None else None
    run = RunDirectory(recipe)
    newest = run.newest_checkpoint()
    progress = run.load_progress(newest) if newest else Progress()
    recorder = Recorder(recipe, run, progress)
    for complaint in problems.complaints:
        recorder.say(f"skipped {complaint}")
    if newest is None:
        run.save_policy(*(given or make_initial_policy(recipe, problems, recorder)), progress)
    initial, tokenizer = run.load_model(0, device)
    policy, _ = run.load_model(progress.iteration, device)
    progress.counts |= {"skipped_rows": len(problems.complaints), "skipped_held-out_prompts": 0}
    test, complaints = ask(problems.test, tokenizer, policy, recipe)
    say_skipped("held-out", complaints, progress, recorder)
    with recorder.phase("engine", "starting the sampler"):
        sampler = open_sampler(recipe, policy, tokenizer, run.policy_of(0), run.path / "engine.log")
    at = f"M_{progress.iteration}" + (f" (update step {progress.step})" if progress.step else "")
    recorder.say(
        f"{recipe.name}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters on {device}, sampled by "
        f"{sampler.name}, from {at} to M_{recipe.iterations}, in {run.path}"
    )
    return Session(recipe, run, progress, recorder, sampler, tokenizer, initial, problems, test), policy
