"""The trainer for users of TRL: its loss in fp64, TRL's own KTO, DDP, adapters, and what is refused."""

import copy
import json
import math
import os
import random
import socket
import warnings
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the trainer is for users of TRL, which is not installed")

from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import KTOConfig, KTOTrainer

from stepkto_fast.integrations.packed_forward import add_packed_forward
from stepkto_fast.integrations.trl_trainer import POINTS_FILE, StepKTOConfig, StepKTOTrainer
from stepkto_fast.policy import build_policy, build_tokenizer
from stepkto_fast.stepwise_rows import collate


def make_rows(count=16, seed=0):
    """Sums in two or three steps; some steps and some whole rows have no labels."""
    rng, rows = random.Random(seed), []
    for n in range(count):
        a, b, c = (rng.randrange(1, 9) for _ in range(3))
        first = rng.random() < 0.6
        steps = [f" Step 1: {a} + {b} = {a + b + (not first)}", f"Step 2: {a + b} + {c} = {a + b + c}"]
        steps += ["Answer: done"] * (n % 2)
        labels = [first, rng.random() < 0.5, None][: len(steps)]
        rows.append(
            {
                "prompt": f"Question: {a} + {b} + {c}\n",
                "completions": steps,
                "labels": [None] * len(steps) if n % 5 == 3 else labels,
                "label": first,
            }
        )
    return rows


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """TRL's trainers report their use to the hub, but not from a CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def words():
    texts = ["".join([r["prompt"], *r["completions"]]) for r in make_rows(300, 1)]
    return build_tokenizer([*texts, "<user> <assistant> a b c d <eos>", " ".join(map(str, range(40)))])


def tiny(tokenizer, seed=1):
    model = build_policy(tokenizer, hidden_size=32, layers=2, heads=2, max_length=128, seed=seed)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def near(model, seed=5):
    """A reference close to the model: far from it every value function is saturated."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


METRICS = ["loss", "outcome_loss", "step_loss", "kl", "step_kl", "num_tokens"] + [
    f"{prefix}{name}"
    for prefix in ("", "step_")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
]

# 24 bits of mantissa, through 2 layers and sums over 360 tokens
ROUNDING = 2**-24 * 50

SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "max_steps": 1, "save_strategy": "no",
    "per_device_train_batch_size": 16, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0, "disable_tqdm": True, "beta": 0.2, "step_beta": 0.3,
}  # fmt: skip


def make_trainer(tmp_path, tokenizer, rows=None, model=None, ref_model=True, eval_rows=None, others=None, **changes):
    """A trainer of one step over all rows, unless `changes` say otherwise; ref_model True is one near the model."""
    model = tiny(tokenizer) if model is None else model
    return StepKTOTrainer(
        model,
        near(model) if ref_model is True else ref_model,
        StepKTOConfig(str(tmp_path), **{**SETTINGS, **changes}),
        train_dataset=Dataset.from_list(make_rows() if rows is None else rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        **(others or {}),
    )


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            self.found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def step(trainer, points=(0.4, 0.2)):
    """(first log line, {name: gradient}) of a first optimizer step, with the given reference points."""
    if isinstance(trainer, StepKTOTrainer):
        trainer.lagged.outcome, trainer.lagged.step = points
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.state.log_history[0], gradients.found


def assert_same_gradients(found, expected):
    """Within ROUNDING of the largest entry of each tensor: sums over tokens round as that one does."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = ROUNDING * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=limit, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def fp64_loss(model, reference, rows, config, points, weights=(1, 1, 1, 1)):
    """docs/objective.md in torch: one row at a time, unpacked, in fp64."""
    outcome, steps = [], []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        targets = torch.tensor(row["completion_ids"])[:, None]
        first, last = len(row["prompt_ids"]) - 1, ids.shape[1] - 1
        policy = log_softmax(model(ids).logits[0, first:last], -1).gather(-1, targets)[:, 0]
        with torch.no_grad():
            frozen = log_softmax(reference(ids).logits[0, first:last], -1).gather(-1, targets)[:, 0]
        d = policy - frozen
        outcome.append(value(d.sum() - points[0], row["label"], config.beta, weights[:2]))
        own = [
            value(d[begin:end].sum() - points[1], label, config.step_beta, weights[2:])
            for begin, end, label in zip([0, *row["step_ends"]], row["step_ends"], row["step_labels"], strict=False)
            if label >= 0
        ]
        if own:
            steps.append(torch.stack(own).mean())
    return torch.stack(outcome).mean(), torch.stack(steps).mean()


def value(x, label, beta, weights):
    return weights[0] * torch.sigmoid(-beta * x) if label else weights[1] * torch.sigmoid(beta * x)


def test_packed_log_probs_are_those_of_padded_forwards(tmp_path, words):
    model = tiny(words)
    original = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, words, model=model)
    assert trainer.model.config._attn_implementation == "stepkto_packed"
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        found = trainer.model(packed=collate(rows)["packed"])
        longest = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
        ids = torch.full((len(rows), longest), words.pad_token_id)
        mask = torch.zeros_like(ids)
        for n, r in enumerate(rows):
            sequence = torch.tensor([*r["prompt_ids"], *r["completion_ids"]])
            ids[n, : len(sequence)], mask[n, : len(sequence)] = sequence, 1
        logps = log_softmax(original(input_ids=ids, attention_mask=mask).logits, -1)
    expected = torch.cat(
        [
            logps[n, len(r["prompt_ids"]) - 1 :][range(len(r["completion_ids"])), r["completion_ids"]]
            for n, r in enumerate(rows)
        ]
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"class_weights": "balanced"}, {"step_weight": 0.3, "outcome_weight": 0.7}])
def test_loss_and_gradient_are_the_formula_in_fp64(tmp_path, words, changes):
    model = tiny(words)
    truth, reference = copy.deepcopy(model).double(), near(model).double()
    trainer = make_trainer(tmp_path, words, model=model, **changes)
    rows = list(trainer.train_dataset)
    weights = (1, 1, 1, 1)
    if "class_weights" in changes:
        labels, steps = [r["label"] for r in rows], [x for r in rows for x in r["step_labels"] if x >= 0]
        weights = (
            len(labels) / 2 / sum(labels), len(labels) / 2 / (len(labels) - sum(labels)),
            len(steps) / 2 / sum(steps), len(steps) / 2 / (len(steps) - sum(steps)),
        )  # fmt: skip
    outcome, process = fp64_loss(truth, reference, rows, trainer.args, (0.4, 0.2), weights)
    loss = trainer.args.outcome_weight * outcome + trainer.args.step_weight * process
    loss.backward()
    log, gradients = step(trainer)
    assert log["loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
    assert log["outcome_loss"] == pytest.approx(float(outcome.detach()), abs=2e-6)
    assert log["step_loss"] == pytest.approx(float(process.detach()), abs=2e-6)
    assert (log["kl"], log["step_kl"]) == (0.4, 0.2)
    assert_same_gradients(gradients, {n: p.grad.float() for n, p in truth.named_parameters()})


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"gradient_checkpointing": False},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
        {"dataloader_num_workers": 1},
        {"train_sampling_strategy": "random"},
    ],
)
def test_how_a_batch_is_run_does_not_change_its_gradient(tmp_path, words, changes):
    log, gradients = step(make_trainer(tmp_path, words))
    other, found = step(make_trainer(tmp_path, words, **changes))
    assert_same_gradients(found, gradients)
    for name in METRICS:
        assert other[name] == pytest.approx(log[name], abs=1e-5), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_without_steps_it_is_trls_own_kto(tmp_path, words, loss_type):
    rows = [
        {"prompt": r["prompt"], "completion": "\n".join(r["completions"]), "label": r["label"]} for r in make_rows()
    ]
    model = tiny(words)
    plain = {k: v for k, v in SETTINGS.items() if k != "step_beta"}
    theirs = KTOTrainer(
        copy.deepcopy(model), near(model),
        KTOConfig(str(tmp_path / "theirs"), loss_type=loss_type, desirable_weight=1.3, **plain),
        train_dataset=Dataset.from_list(rows), processing_class=words,
    )  # fmt: skip
    expected, gradients = step(theirs)
    points = "lagged" if loss_type == "kto" else "zero"
    trainer = make_trainer(
        tmp_path,
        words,
        rows,
        model,
        step_weight=0.0,
        loss_type=loss_type,
        reference_points=points,
        desirable_weight=1.3,
    )
    log, found = step(trainer, (expected["kl"], 0.0))
    assert (expected["kl"] > 0) == (loss_type == "kto")
    assert_same_gradients(found, gradients)
    for name in (
        "loss",
        "kl",
        "num_tokens",
        *(f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")),
    ):
        assert log[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    assert log["rewards/margins"] == pytest.approx(expected["rewards/margins"], abs=1e-5)


def test_lagged_points_follow_earlier_batches(tmp_path, words):
    trainer = make_trainer(tmp_path, words, max_steps=3, per_device_train_batch_size=4, learning_rate=0.1)
    rows = list(trainer.train_dataset)
    first = collate(rows[:4])["packed"]
    with torch.no_grad():
        ratios = trainer.model(packed=first) - trainer.ref_model(packed=first)
    trainer.train()
    seen = [(log["kl"], log["step_kl"]) for log in trainer.state.log_history if "kl" in log]
    assert seen[0] == (0.0, 0.0)
    steps = sum(len(r["step_ends"]) for r in rows[:4])
    assert seen[1] == pytest.approx((0.1 * float(ratios.sum()) / 4, 0.1 * float(ratios.sum()) / steps), abs=1e-5)
    assert seen[2] not in ((0.0, 0.0), seen[1])


# many processes


SPLITS = ({}, {"precompute_ref_log_probs": True, "gradient_checkpointing": False})


def _train_in_two(rank, port, folder, rows):
    """One of two processes: trains once with each of SPLITS and writes down what it found."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1}
    for n, changes in enumerate(SPLITS):
        trainer = make_trainer(
            f"{folder}/out", tokenizer, rows, eval_rows=rows[:6], ddp_backend="gloo", **split, **changes
        )
        assert trainer.accelerator.num_processes == 2
        log, gradients = step(trainer)
        found = {"log": log, "lagged": vars(trainer.lagged), "evaluation": trainer.evaluate()}
        save_file({name: g.contiguous() for name, g in gradients.items()}, f"{folder}/{n}_{rank}.safetensors")
        Path(f"{folder}/{n}_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    # Without destructors: DDP's, which holds the interpreter's lock, may wait for a thread of gloo that waits for it.
    os._exit(0)


def test_two_processes_give_the_gradient_of_one(tmp_path, words):
    """DDP means over processes; their micro-batches have different numbers of supervised completions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words.save_pretrained(tmp_path / "tokenizer")
    torch.multiprocessing.spawn(_train_in_two, args=(port, str(tmp_path), make_rows()), nprocs=2)
    trainer = make_trainer(tmp_path / "one", words, eval_rows=make_rows()[:6])
    log, gradients = step(trainer)
    evaluation = trainer.evaluate()
    for name in [f"{n}_{rank}" for n in range(len(SPLITS)) for rank in range(2)]:
        assert_same_gradients(load_file(tmp_path / f"{name}.safetensors"), gradients)
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["lagged"] == pytest.approx(vars(trainer.lagged), abs=1e-5)
        assert found["evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], abs=1e-5)
        for key in METRICS:
            assert found["log"][key] == pytest.approx(log[key], abs=1e-5), key


# adapters


def lora(**options):
    peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")
    return peft, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def stir(model, part):
    """Moves the adapter, so that what ignores it would be noticed."""
    torch.manual_seed(3)
    with torch.no_grad():
        moved = [p.add_(0.1 * torch.randn_like(p)) for n, p in model.named_parameters() if part in n]
    assert moved


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_an_adapters_reference_is_the_model_without_it(tmp_path, words, options):
    _, config = lora(**options)
    model = tiny(words)
    original = copy.deepcopy(model).double()
    trainer = make_trainer(tmp_path, words, model=model, ref_model=None, others={"peft_config": config})
    stir(trainer.model, "lora_B")
    if options:
        stir(trainer.model, "modules_to_save.default")
    rows = list(trainer.train_dataset)
    merged = copy.deepcopy(trainer.model).merge_and_unload().double()
    merged.set_attn_implementation("sdpa")
    del merged.forward  # the model's own again
    outcome, process = fp64_loss(merged, original, rows, trainer.args, (0.4, 0.2))
    log, gradients = step(trainer)
    assert log["loss"] == pytest.approx(float((outcome + process).detach()), abs=5e-6)
    assert abs(log["rewards/chosen"]) > 1e-3
    assert all(float(g.abs().max()) > 0 for g in gradients.values())
    assert any("modules_to_save" in name for name in gradients) == bool(options)


def test_a_given_adapters_reference_is_the_adapter_as_it_was(tmp_path, words):
    peft, config = lora()
    model = peft.get_peft_model(tiny(words), config)
    stir(model, "lora_B")
    trainer = make_trainer(tmp_path, words, model=model, ref_model=None)
    log, _ = step(trainer)
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    packed = collate(list(trainer.train_dataset))["packed"]
    with trainer.model.disable_adapter(), torch.no_grad():
        base = trainer.model(packed=packed)
    assert float((trainer._reference_logps(packed) - base).abs().max()) > 1e-2


def test_adapters_that_packing_would_ignore_are_refused(tmp_path, words):
    peft, config = lora()
    config.target_modules = ["q_proj", "lm_head"]
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, words, ref_model=None, others={"peft_config": config})
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning"):
        make_trainer(tmp_path, words, ref_model=None, others={"peft_config": prompt})


# the rest of a trainer


def test_a_nan_is_not_averaged_away(tmp_path, words):
    seen = [set(words("".join([row["prompt"], *row["completions"]]))["input_ids"]) for row in make_rows()]
    rare = next(token for token in seen[0] if sum(token in row for row in seen) < len(seen) / 2)
    model, reference = tiny(words), tiny(words)
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = math.nan
    trainer = make_trainer(tmp_path, words, model=reference)
    trainer.model.load_state_dict(model.state_dict())  # a model of NaN is refused at the start
    metrics, _ = step(trainer)
    assert math.isnan(metrics["outcome_loss"])
    assert math.isnan(metrics["rewards/chosen"])


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_evaluation_is_over_the_whole_data_set(tmp_path, words, batch):
    model = tiny(words)
    truth, reference = copy.deepcopy(model).double(), near(model).double()
    rows = make_rows(9, seed=4)
    trainer = make_trainer(tmp_path, words, model=model, eval_rows=rows, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    outcome, process = fp64_loss(truth, reference, list(trainer.eval_dataset), trainer.args, (0.0, 0.0))
    assert metrics["eval_loss"] == pytest.approx(float((outcome + process).detach()), abs=5e-6)
    assert metrics["eval_step_loss"] == pytest.approx(float(process.detach()), abs=5e-6)
    margins = metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(margins)
    assert math.isfinite(metrics["eval_step_rewards/margins"])
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
    assert trainer.predict(trainer.train_dataset).metrics["test_loss"] != pytest.approx(metrics["eval_loss"], abs=1e-4)
    again = trainer.evaluate(Dataset.from_list(rows))
    assert {k: v for k, v in again.items() if "/" in k} == {k: v for k, v in metrics.items() if "/" in k}
    assert again["eval_loss"] == metrics["eval_loss"]
    assert trainer.lagged.outcome == 0


def test_an_interrupted_evaluation_leaves_nothing_behind(tmp_path, words, monkeypatch):
    trainer = make_trainer(tmp_path, words, eval_rows=make_rows(9, seed=4), per_device_eval_batch_size=3)
    expected = trainer.evaluate()["eval_loss"]
    batches, collate_all = [], trainer.data_collator

    def interrupted(rows):
        batches.append(rows)
        if len(batches) == 3:  # accelerate is one batch ahead: one has been evaluated
            raise KeyboardInterrupt
        return collate_all(rows)

    monkeypatch.setattr(trainer, "data_collator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    monkeypatch.undo()
    assert trainer.evaluate()["eval_loss"] == expected


def test_evaluation_in_between_leaves_training_alone(tmp_path, words):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    plain = make_trainer(tmp_path, words, **options)
    plain.train()
    watched = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "save_total_limit": 1}
    trainer = make_trainer(
        tmp_path, words, eval_rows=make_rows(5), metric_for_best_model="step_rewards/margins", greater_is_better=True,
        **watched, **options,
    )  # fmt: skip
    trainer.train()
    for p, q in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    margins = [log["eval_step_rewards/margins"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(margins) == 3
    assert trainer.state.best_metric == max(margins)


def test_a_model_by_its_path_is_its_own_reference(tmp_path, words):
    tiny(words).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    trainer = StepKTOTrainer(
        str(tmp_path / "model"), args=StepKTOConfig(str(tmp_path / "out"), **SETTINGS),
        train_dataset=Dataset.from_list(make_rows()),
    )  # fmt: skip
    log, _ = step(trainer, (0.0, 0.0))
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert log["loss"] == pytest.approx(1, abs=1e-6)  # lambda / 2 for each of the two losses
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/chosen"]) > 1e-3


def test_a_saved_model_is_the_trained_one(tmp_path, words):
    trainer = make_trainer(tmp_path, words)
    step(trainer)
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", use_safetensors=True)
    assert model.config._attn_implementation != "stepkto_packed"
    row = trainer.train_dataset[0]
    ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        found = trainer.model(packed=collate([row])["packed"])
    targets = torch.tensor(row["completion_ids"])[:, None]
    torch.testing.assert_close(found, log_softmax(logits, -1).gather(-1, targets)[:, 0], atol=2e-5, rtol=0)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, words):
    options = {
        "max_steps": 4, "per_device_train_batch_size": 4, "optim": "adamw_torch", "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", words, **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = make_trainer(tmp_path / "resumed", words, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.lagged == whole.lagged
    assert whole.lagged.outcome != 0
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    (checkpoint / POINTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"holds no reference_points\.json"):
        make_trainer(tmp_path / "again", words, **options).train(resume_from_checkpoint=str(checkpoint))


def test_bf16_is_near_fp32(tmp_path, words):
    log, _ = step(make_trainer(tmp_path, words))
    rounded, _ = step(make_trainer(tmp_path, words, bf16=True))
    assert rounded["loss"] != log["loss"]
    # 8 bits of mantissa on log-ratios of a few nats, times betas of 0.2 and 0.3 and a slope of 1/4
    assert rounded["loss"] == pytest.approx(log["loss"], abs=2e-2)


def test_a_stream_of_rows(tmp_path, words):
    model = tiny(words)
    stream = IterableDataset.from_generator(make_rows)
    arguments = StepKTOConfig(str(tmp_path), **SETTINGS)
    trainer = StepKTOTrainer(model, near(model), arguments, train_dataset=stream, processing_class=words)
    _, gradients = step(trainer)
    assert_same_gradients(gradients, step(make_trainer(tmp_path, words))[1])


def test_a_stream_without_step_labels_is_said_aloud(tmp_path, words):
    def unlabelled():
        return ({**row, "labels": None} for row in make_rows())

    model = tiny(words)
    trainer = StepKTOTrainer(
        model, near(model), StepKTOConfig(str(tmp_path), **SETTINGS),
        train_dataset=IterableDataset.from_generator(unlabelled), processing_class=words,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="an optimizer batch has no labelled step"):
        trainer.train()


def test_a_bad_row_stops_the_trainer(tmp_path, words):
    rows = make_rows()
    rows[11]["completions"] = rows[11]["completions"][:-1]
    with pytest.raises(ValueError, match="row 11 of the train dataset has 3 labels for 2 steps"):
        make_trainer(tmp_path, words, rows)


def test_rows_without_room_are_dropped_aloud(tmp_path, words):
    rows = make_rows()
    rows[3]["prompt"] = rows[3]["prompt"] * 5
    with pytest.warns(UserWarning, match=r"dropped 1 of 16 rows of the train dataset.*max_length \(30\)"):
        trainer = make_trainer(tmp_path, words, rows, max_length=30)
    assert len(trainer.train_dataset) == 15


def test_step_labels_that_teach_nothing_are_said_aloud(tmp_path, words):
    rows = make_rows()
    for row in rows:
        row["labels"] = [None] * len(row["completions"])
    with pytest.raises(ValueError, match=r"no step of the train dataset has a label.*step_weight=0"):
        make_trainer(tmp_path, words, rows)
    make_trainer(tmp_path, words, rows, step_weight=0.0)
    for row in rows:
        row["labels"] = [True] * len(row["completions"])
    with pytest.warns(UserWarning, match="all labelled steps of the train dataset are right"):
        make_trainer(tmp_path, words, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({"torch_compile": True}, "torch_compile"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length.*use 'sequential' or 'random'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"loss_type": "bco"}, "loss_type is 'bco'"),
        ({"step_reduction": "max"}, "step_reduction is 'max'"),
        ({"reference_points": "exact"}, "reference_points is 'exact'"),
        ({"step_beta": 0.0}, "step_beta is 0.0; expected a positive number"),
        ({"step_weight": -1.0}, "step_weight is -1.0; expected 0 or more"),
        ({"loss_type": "apo_zero_unpaired"}, "reference_points='zero'"),
        ({"class_weights": "balanced", "desirable_weight": 2.0}, "class_weights='balanced'"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        StepKTOConfig(str(tmp_path), **{**SETTINGS, **change})


def test_arguments_that_cannot_work_are_refused(tmp_path, words):
    rows = Dataset.from_list(make_rows())
    arguments = StepKTOConfig(str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="data_collator"):
        StepKTOTrainer(tiny(words), args=arguments, data_collator=collate, train_dataset=rows)
    with pytest.raises(ValueError, match="compute_metrics"):
        StepKTOTrainer(tiny(words), args=arguments, compute_metrics=len, train_dataset=rows)
    with pytest.raises(TypeError, match="KTOConfig; expected a StepKTOConfig"):
        StepKTOTrainer(tiny(words), args=KTOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows)
    stream = IterableDataset.from_generator(make_rows)
    balanced = StepKTOConfig(str(tmp_path), **SETTINGS, class_weights="balanced")
    model = tiny(words)
    with pytest.raises(ValueError, match="class_weights='balanced' needs rows that can be counted"):
        StepKTOTrainer(model, near(model), balanced, train_dataset=stream, processing_class=words)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "cannot keep packed sequences apart: what number 1 of 3"),
        ("Doge", {"keep_window_size": 2}, "has no masks, and DogeAttention makes one of its own"),
        ("FalconH1", {}, "cannot keep packed sequences apart"),
        ("HyperCLOVAX", {"logits_scaling": 4.0}, "other logits than expected"),
    ],
)
def test_models_that_packing_would_get_wrong_are_refused(name, options, message):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    with pytest.raises(ValueError, match=message):
        add_packed_forward(AutoModelForCausalLM.from_config(config))


def test_a_copy_of_a_model_runs_its_own_weights(words):
    model = tiny(words)
    add_packed_forward(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    ids = torch.tensor([[3, 4, 5]])
    for each in (model, other):
        each.set_attn_implementation("sdpa")
    assert other(ids).logits.eq(0).all()
    assert model(ids).logits.ne(0).any()


def test_rows_without_their_reference_are_refused(tmp_path, words):
    trainer = make_trainer(tmp_path, words, eval_rows=make_rows(4, 7), precompute_ref_log_probs=True)
    loss = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == loss  # prepared already
    with pytest.raises(ValueError, match="rows without ref_logps"):
        trainer.predict(trainer.eval_dataset.remove_columns("ref_logps"))


def test_a_batch_that_overflowed_does_not_stay_in_the_lagged_points(tmp_path, words):
    trainer = make_trainer(tmp_path, words)
    trainer._sums["train"] = torch.tensor([100.0, 1.0, *[math.nan] * 18], dtype=torch.float64)
    trainer.lagged.outcome, trainer.lagged.step = 0.4, 0.2
    trainer._finish("train")
    assert (trainer.lagged.outcome, trainer.lagged.step) == (0.4, 0.2)
    assert math.isnan(trainer._metrics["train"]["outcome_loss"][-1])
