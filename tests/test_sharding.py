"""Ranks together are one process: loss, gradients, weights and checkpoints, on gloo processes."""

import random
import shutil
import warnings
from functools import cache

import pytest
import torch
from on_ranks import on_ranks
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast import policy as policy_module
from stepkto_fast.attention import NAME
from stepkto_fast.checkpointing import checkpoint_activations
from stepkto_fast.errors import RunError
from stepkto_fast.objective import LaggedPoints, accumulate_gradients, class_weights, estimate_points, log_probs
from stepkto_fast.ranks import rank, size
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.sharding import clip_gradients, full_state, is_sharded, load_sharded, save_sharded, shard, whole

VOCABULARY = 61  # rows that no number of ranks divides
EXACT = 1e-11  # of the largest entry: sums of some hundred fp64 products in another order


def tiny(tied=False, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.set_attn_implementation(NAME)
    return model


def adapted(target, train_head=False):
    """A tiny model with frozen weights and LoRA adapters of rank 2: fewer rows than there are ranks."""
    from peft import LoraConfig, get_peft_model

    model = tiny(dtype=torch.float32)
    get_peft_model(
        model, LoraConfig(r=2, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM",
                          modules_to_save=["lm_head"] if train_head else None)
    )  # fmt: skip
    return model.double()


MODELS = {
    "untied": tiny,
    "tied": lambda: tiny(tied=True),
    "adapters": lambda: adapted("all-linear"),
    "adapters and an adapted head": lambda: adapted(["q_proj", "lm_head"]),
    "adapters and a trained head": lambda: adapted(["q_proj", "down_proj"], train_head=True),
}
SOME_MODELS = {name: MODELS[name] for name in ("untied", "adapters")}  # of four ranks, which take long to start


def completions(lengths, seed=0, labelled=True):
    rng = random.Random(seed)
    found = []
    for n, length in enumerate(lengths):
        ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        ends = sorted({*rng.sample(range(1, length + 1), min(2, length)), length})
        r = Rollout(n // 2, n % 2, "", [1 + n % 7, 2, 3], "", ids, [], True, [], ends, label=n % 3 != 0)
        r.step_labels = [rng.choice([1, 0, -1]) if labelled else -1 for _ in ends]
        r.ref_logps = [rng.uniform(-5, -3) for _ in ids]
        found.append(r)
    return found


def weighted(rollouts):
    rng = random.Random(1)
    for r in rollouts[::2]:
        r.importance = [rng.uniform(0, 2) for _ in r.completion_ids]
    return rollouts


def one_labelled(rollouts):
    rollouts[0].step_labels[0] = 1
    return rollouts


BATCHES = {
    "many": completions([9, 4, 17, 2, 5, 12, 7, 7, 3, 11, 1, 6]),
    "fewer than ranks": completions([9]),
    "one that is huge": completions([4, 300, 5, 6, 2, 8]),
    "one labelled step": one_labelled(completions([30, 5, 9, 2, 11], labelled=False)),
    "no labelled step": completions([8, 5, 9, 2, 11], labelled=False),
    "importance weights": weighted(completions([9, 4, 17, 2, 5, 12])),
}
ESTIMATORS = {"zero": False, "lagged": False, "exact": True, "mismatched": False}  # and whether embeddings are tied


def recipe(**changes):
    return Recipe(**{"max_tokens_per_micro_batch": 40, "beta": 0.3, "step_beta": 0.5, "train_batch_size": 64} | changes)


def one_batch(model, rollouts, setting):
    """The result, whole gradients of all that has one, and their norm."""
    result = accumulate_gradients(model, rollouts, setting, class_weights(rollouts, setting), (0.1, 0.05))
    found = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = clip_gradients([p for p in model.parameters() if p.requires_grad], 1e9)
    model.zero_grad()
    return vars(result), found, norm


def steps_of_descent(setting, tied):
    """Three steps of plain SGD, with reference points of each step's own estimate."""
    model, reference = tiny(tied), tiny(seed=1)
    for each in (model, reference):
        shard(each, bf16=False)
    reference.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    lagged, found = LaggedPoints(), []
    for step in range(3):
        rollouts = completions([9, 4, 17, 2, 5, 12, 7, 7], seed=step)
        points = estimate_points(model, reference, rollouts, setting, lagged, step)
        result = accumulate_gradients(model, rollouts, setting, class_weights(rollouts, setting), points)
        clip_gradients(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        lagged.update(float(result.log_ratios.mean()), float(result.step_log_ratios.mean()))
        found.append((points, result.loss))
    return found, dict(full_state(model))


def heads_at_a_time(setting):
    """How many gathered heads are in memory when one more is gathered, at most; and the embedding, if it is whole."""
    from torch.multiprocessing.reductions import StorageWeakRef

    most, alive = {}, []
    real = policy_module.whole

    def counted(tensor):
        assert not isinstance(tensor, DTensor) or isinstance(model.get_input_embeddings().weight, DTensor)
        alive[:] = [storage for storage in alive if not storage.expired()]
        most[name] = max(most.get(name, 0), len(alive) + 1)
        gathered = real(tensor)
        alive.append(StorageWeakRef(gathered.untyped_storage()))
        return gathered

    model, reference = tiny(tied=True), tiny(seed=1)
    for each in (model, reference):
        shard(each, bf16=False)
    policy_module.whole = counted
    try:
        rollouts = BATCHES["many"]
        name = "log_probs"
        log_probs(model, rollouts, setting)
        name = "accumulate_gradients"
        one_batch(model, rollouts, setting)
        name = "exact"
        estimate_points(model, reference, rollouts, recipe(reference_points="exact"), LaggedPoints(), 0)
    finally:
        policy_module.whole = real
    return most


IN_BF16 = ("tied", "adapters and an adapted head")


def everything(_, folder):
    """All that is compared, by one start of the processes."""
    # peft says that a tied or adapted head has to be merged with care; nothing is merged here.
    warnings.simplefilter("ignore", UserWarning)
    found = {}
    for name, make in (MODELS if size() < 4 else SOME_MODELS).items():
        model = make()
        shard(model, bf16=False)
        assert is_sharded(model) == (size() > 1)
        batches = BATCHES if name == "untied" else ("many", "fewer than ranks")
        found[name] = {batch: one_batch(model, BATCHES[batch], recipe()) for batch in batches}
        found[name]["log_probs"] = log_probs(model, BATCHES["many"], recipe())
        # What an optimizer that is made now would be given.
        assert all(isinstance(parameter, DTensor) == (size() > 1) for parameter in model.parameters())
        found[name]["state"] = dict(full_state(model))
    for estimator, tied in ESTIMATORS.items():
        found["descent", estimator] = steps_of_descent(recipe(reference_points=estimator), tied)
    if size() < 4:
        found |= of_two_ranks()
    found["checkpoints"] = checkpoints(folder)
    return found


def of_two_ranks():
    model = tiny()
    checkpoint_activations(model)
    shard(model, bf16=False)
    return {
        "replicated": log_probs(tiny(), BATCHES["many"], recipe()),
        "bf16": {name: in_bf16(MODELS[name]) for name in IN_BF16},
        "checkpointed": one_batch(model.train(), BATCHES["many"], recipe()),
        "heads": heads_at_a_time(recipe()),
    }


def in_bf16(make):
    model, setting = make().float(), recipe(bf16=True)
    shard(model, bf16=True)
    result, grads, _ = one_batch(model, BATCHES["many"], setting)
    return result["loss"], grads, {p.dtype for p in model.parameters()}


# ---- checkpoints ----


def training(name):
    model = MODELS[name]()
    shard(model, bf16=False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model, optimizer, steps):
    for _ in range(steps):
        setting = recipe()
        accumulate_gradients(model, BATCHES["many"], setting, class_weights(BATCHES["many"], setting), (0.1, 0.05))
        optimizer.step()
        optimizer.zero_grad()


def everything_of(model, optimizer):
    moments = {
        f"{name}.{key}": whole(value).clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {name: tensor.clone() for name, tensor in full_state(model)} | moments


SAVED = ("tied", "adapters and a trained head")


def checkpoints(folder):
    """Saves after two steps; reads that, and what half as many ranks saved; goes on from there."""
    found = {}
    for name in SAVED:
        model, optimizer = training(name)
        train(model, optimizer, 2)
        place = folder / f"{name} {size()}"
        save_sharded(model, optimizer, place)
        found["saved", name] = everything_of(model, optimizer)
        train(model, optimizer, 1)
        found["went on", name] = everything_of(model, optimizer)
        for ranks in {size(), max(size() // 2, 1)}:
            model, optimizer = training(name)
            load_sharded(model, optimizer, folder / f"{name} {ranks}")
            found["loaded", name, ranks] = everything_of(model, optimizer)
            train(model, optimizer, 1)
            found["resumed", name, ranks] = everything_of(model, optimizer)
    if size() < 4:
        found["complaints"] = {what: complaint(folder, what) for what in DAMAGE}
    return found


def truncate(folder):
    file = max(folder.iterdir())
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 1)


DAMAGE = {
    "truncated": truncate,
    "garbled": lambda folder: min(folder.iterdir()).write_bytes(b"\xff" * 64),
    "without a file": lambda folder: min(folder.iterdir()).unlink(),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "of another model": lambda folder: None,
}


def complaint(folder, what):
    place = folder / f"{what} of {size()}"
    if rank() == 0:
        shutil.copytree(folder / f"tied {size()}", place)
        DAMAGE[what](place)
    if size() > 1:
        torch.distributed.barrier()
    model, optimizer = training("untied" if what == "of another model" else "tied")
    with pytest.raises(RunError) as error:
        load_sharded(model, optimizer, place)
    return str(error.value)


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one_process(folder):
    return everything(0, folder)


@pytest.fixture(scope="module")
def of(one_process, folder):
    """of(ranks): what `everything` found on each of them."""

    @cache
    def found(ranks):
        if ranks == 4:
            found(2)  # whose checkpoints they read
        return on_ranks(ranks, everything, folder)

    return found


def close(found, expected, where=""):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            close(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), where
        for n, pair in enumerate(zip(found, expected, strict=True)):
            close(*pair, f"{where} {n}")
    else:
        a, b = torch.as_tensor(found), torch.as_tensor(expected)
        assert a.shape == b.shape, where
        largest = float(b.abs().max()) if b.numel() else 0.0
        assert (a - b).abs().le(EXACT * (largest + 1e-3)).all(), (where, float((a - b).abs().max()), largest)


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in MODELS), *((4, name) for name in SOME_MODELS)])
def test_loss_gradients_and_log_probs_are_those_of_one_process(of, one_process, ranks, name):
    for found in of(ranks):
        close(found[name], one_process[name])


def test_all_that_is_trained_gets_a_gradient_and_nothing_else(one_process):
    """So that the comparison is not one of nothing with nothing."""
    for name, make in MODELS.items():
        _, grads, norm = one_process[name]["many"]
        assert set(grads) == {n for n, p in make().named_parameters() if p.requires_grad}
        assert all(g.abs().max() > 0 for g in grads.values())
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in grads.values()]).norm()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_of_descent_are_those_of_one_process(of, one_process, ranks, estimator):
    expected = one_process["descent", estimator]
    for found in of(ranks):
        close(found["descent", estimator], expected)
    if estimator != "zero":
        assert expected[0][-1][0] != (0.0, 0.0)


def test_a_model_that_every_rank_holds_whole_splits_the_work_of_log_probs(of, one_process):
    for found in of(2):
        close(found["replicated"], one_process["untied"]["log_probs"])


def test_activation_checkpointing_changes_nothing(of, one_process):
    for found in of(2):
        close(found["checkpointed"], one_process["untied"]["many"])


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_is_that_of_one_process(of, one_process, name):
    """The same products are rounded at the same places; only the sums of some gradients' parts differ, each of which
    has been rounded to bf16 (8 bits), and there are a dozen of them."""
    loss, grads, dtypes = one_process["bf16"][name]
    for found in of(2):
        assert found["bf16"][name][0] == pytest.approx(loss, rel=1e-5)
        assert found["bf16"][name][2] == dtypes == {torch.float32}
        for key, expected in grads.items():
            assert (found["bf16"][name][1][key] - expected).norm() <= 2**-6 * expected.norm(), key
    exact = one_process[name]["many"][1]
    assert any((grads[key] - exact[key]).norm() > 1e-4 * exact[key].norm() for key in grads), "it was bf16"


def test_one_head_is_gathered_at_a_time_for_each_model_that_is_read(of):
    for found in of(2):
        assert found["heads"] == {"log_probs": 1, "accumulate_gradients": 1, "exact": 2}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_of_any_number_of_ranks_are_read_by_any_other(of, folder, ranks, name):
    for found in (found["checkpoints"] for found in of(ranks)):
        for other in (ranks, ranks // 2):
            close(found["loaded", name, other], found["saved", name])
            close(found["resumed", name, other], found["went on", name])
        assert all(torch.equal(x, found["saved", name][n]) for n, x in found["loaded", name, ranks].items())
    place = folder / f"{name} {ranks}"
    assert [file.suffix for file in place.iterdir()] == [".safetensors"] * ranks
    model, optimizer = training(name)  # and by this process, which has no ranks
    load_sharded(model, optimizer, place)
    saved = of(ranks)[0]["checkpoints"]["saved", name]
    assert all(torch.equal(x, saved[n]) for n, x in everything_of(model, optimizer).items())
    with pytest.raises(RunError, match="is not empty"):
        save_sharded(model, optimizer, place)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_on_every_rank(of, one_process, what):
    for found in (one_process, *of(2)):
        assert "is damaged; delete it to go back" in found["checkpoints"]["complaints"][what]


def test_several_ranks_do_not_train_a_model_that_is_not_sharded(monkeypatch):
    monkeypatch.setattr("stepkto_fast.objective.size", lambda: 2)
    with pytest.raises(ValueError, match="policy that is not sharded"):
        one_batch(tiny(), BATCHES["many"], recipe())


def test_clipping_on_one_process_is_torchs_to_the_bit():
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        accumulate_gradients(model, BATCHES["many"], recipe(), class_weights(BATCHES["many"], recipe()), (0.1, 0.05))
    assert clip_gradients(ours.parameters(), 0.05) == float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
