"""What several test files share: tiny models, rollouts, and determinism of torch's threads."""

import os
import random
import shutil
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported; TRL's trainers would call home

import pytest
import torch

from stepkto_fast import update
from stepkto_fast.objective import log_probs
from stepkto_fast.policy import build_policy, build_tokenizer
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.segmentation import step_ends, step_texts
from stepkto_fast.tasks import arithmetic

# These tensors are tiny: on a busy machine two threads that wait for each other are several times slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiler():
    """Skips a test that compiles C++ where no compiler works."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None or not shutil.which("cmake"):
        pytest.skip("needs cmake and a C++ compiler")
    if subprocess.run([found, "-x", "c++", "-fsyntax-only", "-"], input=b"int main() {}", check=False).returncode:
        pytest.skip(f"{found} does not compile an empty program")


@pytest.fixture
def one_rank():
    """The mesh of one process that is a group of its own, for FSDP and DTensors."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def interrupt_update(monkeypatch):
    """interrupt_update(n): the next runs' n-th gradient is a KeyboardInterrupt, all others are as ever."""

    def arrange(nth):
        real, calls = update.accumulate_gradients, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == nth:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(update, "accumulate_gradients", interrupted)

    return arrange


@pytest.fixture(scope="session")
def problems():
    return arithmetic.problems(40, "tests", "chain", range(1, 5))


@pytest.fixture(scope="session")
def tokenizer(problems):
    every = [*problems, *arithmetic.problems(300, "vocabulary", "chain", range(1, 6))]
    return build_tokenizer([p.prompt + arithmetic.demonstration(random.Random(0), p) for p in every])


@pytest.fixture
def model(tokenizer):
    """A tiny random Llama, large enough weights that its distributions are not flat."""
    model = build_policy(tokenizer, hidden_size=32, layers=2, heads=2, max_length=96, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.fixture
def rollouts(problems, tokenizer, model):
    """Worked solutions with wrong steps, two of each problem, labelled by the exact checker."""
    rng = random.Random(7)
    teacher = arithmetic.Misconceptions.draw("tests", share=0.3, rate=0.7, slip=0.05)
    found = []
    for n, p in enumerate(problems[:12]):
        for sample in range(2):
            text = arithmetic.demonstration(rng, p, teacher)
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            r = Rollout(n, sample, p.prompt, tokenizer(p.prompt)["input_ids"], text, ids, [-1.0] * len(ids), True)
            r.step_ends = step_ends(ids, tokenizer)
            r.steps = step_texts(ids, r.step_ends, tokenizer)
            r.label = arithmetic.answer_is_right(p, text)
            r.checker_labels = [int(x) for x in arithmetic.check_steps(p, r.steps)]
            r.step_labels = list(r.checker_labels)
            found.append(r)
    # A reference close to the model: far from it every value function is saturated and hides what it should show.
    for r, logp in zip(found, log_probs(model, found, Recipe()), strict=True):
        r.ref_logps = [x + rng.uniform(-0.3, 0.3) for x in logp.tolist()]
    assert {r.label for r in found} == {True, False}
    return found
