"""RFT and DPO: their batches, their losses against fp64, TRL and other splits, and whole runs."""

import copy
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_ranks import on_ranks
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast import objective as objectives
from stepkto_fast import update
from stepkto_fast.attention import NAME
from stepkto_fast.baselines import units
from stepkto_fast.errors import RunError
from stepkto_fast.objective import accumulate_gradients, class_weights, log_probs
from stepkto_fast.packing import pack
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout, read_rollouts
from stepkto_fast.sharding import shard, whole
from stepkto_fast.update import batch_order

SMOKE = str(Path(__file__).parent.parent / "recipes" / "smoke.yaml")
EXACT = 1e-11  # of the largest entry: sums of some hundred fp64 products in another order


def named(r):
    return r.problem_id, r.sample


def completions(labels, length=4):
    """One prompt for each string of `labels`, with a completion for each of its characters: r is right, w wrong."""
    found = []
    for problem, outcomes in enumerate(labels):
        for sample, outcome in enumerate(outcomes):
            n = 1 + (3 * problem + 5 * sample) % length
            r = Rollout(
                problem, sample, "", [1 + problem % 7, 2, 3], "", [5 + (sample + k) % 9 for k in range(n)], [], True
            )
            r.step_ends, r.step_labels, r.label = [n], [1], outcome == "r"
            r.ref_logps = [-3.0 - 0.1 * ((problem + k) % 5) for k in range(n)]
            found.append(r)
    return found


MIXED = completions(["rrww", "rwww", "rrrr", "wwww", "rrrw", "rrww", "rwwww"])


# ---- batches ----


@pytest.mark.parametrize("objective", ["rft", "dpo"])
@pytest.mark.parametrize(("size", "epochs"), [(4, 1), (8, 3), (7, 2), (64, 1), (2, 2), (3, 1)])
def test_the_budget_is_step_ktos(objective, size, epochs):
    recipe = Recipe(train_batch_size=size, num_train_epochs=epochs)
    own = [len(batch) for batch in batch_order(MIXED, recipe, 1)]
    found = [len(batch) for batch in batch_order(MIXED, replace(recipe, objective=objective), 1)]
    assert found == ([max(2, 2 * (n // 2)) for n in own] if objective == "dpo" else own)


def test_a_batch_of_one_still_holds_a_pair():
    few = completions(["rw", "r"])
    recipe = Recipe(train_batch_size=2)
    assert [len(batch) for batch in batch_order(few, recipe, 0)] == [2, 1]
    assert [len(batch) for batch in batch_order(few, replace(recipe, objective="dpo"), 0)] == [2, 2]


def test_rft_goes_through_the_right_completions_again_and_again():
    right = sorted(named(r) for r in MIXED if r.label)
    recipe = Recipe(objective="rft", train_batch_size=4, num_train_epochs=3)
    drawn = [named(r) for batch in batch_order(MIXED, recipe, 0) for r in batch]
    passes = [drawn[n : n + len(right)] for n in range(0, len(drawn), len(right))]
    assert len(passes) > 4
    assert all(sorted(each) == right for each in passes[:-1])
    assert len(set(passes[-1])) == len(passes[-1])
    assert all(a != b for a, b in pairwise(passes)), "in a new order"


def test_dpo_pairs_completions_of_one_prompt_and_pairs_anew_in_each_pass():
    recipe = Recipe(objective="dpo", train_batch_size=4, num_train_epochs=40)
    batches = batch_order(MIXED, recipe, 0)
    drawn = [unit.rollouts for batch in batches for unit in units(batch, recipe)]
    for right, wrong in drawn:
        assert right.label
        assert not wrong.label
        assert right.problem_id == wrong.problem_id
    expected = {0: 2, 1: 1, 4: 1, 5: 2, 6: 1}  # min(right, wrong) of every prompt that has both
    size = sum(expected.values())
    passes = [drawn[n : n + size] for n in range(0, len(drawn), size)][:-1]
    assert len(passes) > 8
    for each in passes:
        assert Counter(right.problem_id for right, _ in each) == expected
        assert max(Counter(named(r) for pair in each for r in pair).values()) == 1, "none is used twice in a pass"
    partners = {(named(a), named(b)) for each in passes for a, b in each}
    assert {pair for pair in partners if pair[0] == (0, 0)} == {((0, 0), (0, 2)), ((0, 0), (0, 3))}
    assert {a for a, b in partners if a[0] == 4} == {(4, 0), (4, 1), (4, 2)}, "each right one has its turn"
    assert all([named(a) for a, _ in x] != [named(a) for a, _ in y] for x, y in pairwise(passes)), "in a new order"


@pytest.mark.parametrize("objective", ["rft", "dpo"])
def test_batches_depend_on_seed_and_iteration_alone(objective):
    recipe = Recipe(objective=objective, train_batch_size=6)
    other = copy.deepcopy(MIXED)
    assert batch_order(MIXED, recipe, 2) == batch_order(other, replace(recipe, beta=0.1, learning_rate=1.0), 2)
    assert batch_order(MIXED, recipe, 2) != batch_order(MIXED, recipe, 1)
    assert batch_order(MIXED, recipe, 2) != batch_order(MIXED, replace(recipe, seed=1), 2)


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        ("rft", ["www", "w"], r"iteration 3: none of 4 completions is right, and objective rft .*: raise num_prompts"),
        ("dpo", ["www", "rr", "r"], r"iteration 3: none of 3 prompts has both .* objective dpo .*: raise num_prompts"),
    ],
)
def test_nothing_to_learn_from_is_an_error(objective, labels, message):
    with pytest.raises(RunError, match=message):
        batch_order(completions(labels), Recipe(objective=objective), 3)


@pytest.mark.parametrize("objective", ["rft", "dpo"])
@pytest.mark.parametrize(
    ("key", "value", "only"),
    [
        ("reference_points", "lagged", "zero"),
        ("importance_correction", "token", "none"),
        ("loss_type", "apo_zero_unpaired", "kto"),
    ],
)
def test_settings_of_step_kto_are_refused(objective, key, value, only):
    with pytest.raises(RunError, match=f"{key} is '{value}' and objective '{objective}', .*: set {key} to {only}"):
        Recipe(objective=objective, **{key: value})
    Recipe(objective=objective, step_weight=0.0, class_weights="none", label_source="monte_carlo")


def test_a_pair_needs_a_batch_of_two():
    with pytest.raises(RunError, match="train_batch_size is 1: give at least 2"):
        Recipe(objective="dpo", train_batch_size=1)
    Recipe(objective="rft", train_batch_size=1)


# ---- loss and gradient ----


def batch_of(rollouts, recipe):
    (batch,) = batch_order(rollouts, replace(recipe, train_batch_size=len(rollouts)), 0)
    return batch


def gradients(model, batch, recipe):
    model = copy.deepcopy(model)
    result = accumulate_gradients(model, batch, recipe, class_weights(batch, recipe), (0.0, 0.0))
    return result, torch.cat([p.grad.flatten() for p in model.parameters()])


def oracle(model, batch, recipe):
    """Loss, log-ratios and gradients by plain torch on the model's whole logits, one completion after the other."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    logps, ratios = [], []
    for r in batch:
        logits = model(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0, len(r.prompt_ids) - 1 : -1]
        logp = log_softmax(logits.double() / recipe.temperature, -1)
        logp = logp.gather(-1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        logps.append(logp)
        ratios.append(logp.sum() - torch.tensor(r.ref_logps).double().sum())
    if recipe.objective == "rft":
        loss = -torch.cat(logps).mean()
    else:
        pairs = zip(batch[0::2], batch[1::2], ratios[0::2], ratios[1::2], strict=True)
        losses = []
        for right, wrong, of_right, of_wrong in pairs:
            assert (right.label, wrong.label) == (True, False)
            losses.append(torch.log1p(torch.exp(-recipe.beta * (of_right - of_wrong))))
        loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return float(loss.detach()), torch.stack(ratios).detach(), gradient


@pytest.mark.parametrize("objective", ["rft", "dpo"])
@pytest.mark.parametrize("tokens", [50, 10**6])
def test_loss_and_gradient_are_the_formula_in_fp64(model, rollouts, objective, tokens):
    recipe = Recipe(objective=objective, beta=0.3, temperature=0.7, max_tokens_per_micro_batch=tokens)
    model, batch = model.double(), batch_of(rollouts, recipe)
    result, found = gradients(model, batch, recipe)
    loss, ratios, expected = oracle(model, batch, recipe)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert (result.outcome_loss, result.step_loss) == (result.loss, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT * float(expected.abs().max()))
    # What metrics and watchdogs look at: in the order of the batch, and in fp32.
    torch.testing.assert_close(result.log_ratios.double(), ratios, rtol=1e-6, atol=1e-6)
    logps = [x.sum() for x in log_probs(model, batch, recipe)]
    torch.testing.assert_close(result.sequence_logps, torch.stack(logps), rtol=1e-6, atol=1e-6)
    of_steps = result.step_log_ratios.split([len(r.step_ends) for r in batch])
    torch.testing.assert_close(torch.stack([x.sum() for x in of_steps]).double(), ratios, rtol=1e-5, atol=1e-5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=10)
@given(budget=st.integers(20, 1000), order=st.randoms(use_true_random=False), objective=st.sampled_from(["rft", "dpo"]))
def test_neither_micro_batches_nor_order_change_loss_or_gradient(model, rollouts, budget, order, objective):
    recipe = Recipe(objective=objective)
    batch = batch_of(rollouts, recipe)
    result, expected = gradients(model, batch, recipe)
    every = units(batch, recipe)
    shuffled = [r for unit in order.sample(every, len(every)) for r in unit.rollouts]
    split, found = gradients(model, shuffled, replace(recipe, max_tokens_per_micro_batch=budget))
    assert split.loss == pytest.approx(result.loss, abs=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_a_pair_is_one_unit_of_the_tokens_of_both(rollouts):
    pairs = units(rollouts[:4], Recipe(objective="dpo"))
    assert [unit.rollouts for unit in pairs] == [tuple(rollouts[:2]), tuple(rollouts[2:4])]
    assert [len(unit) for unit in pairs] == [len(a) + len(b) for a, b in (rollouts[:2], rollouts[2:4])]
    assert [len(unit) for unit in units(rollouts[:4], Recipe(objective="rft"))] == [len(r) for r in rollouts[:4]]


@pytest.mark.parametrize("tokens", [60, 400])
def test_micro_batches_of_pairs_keep_to_their_tokens(model, rollouts, monkeypatch, tokens):
    recipe = Recipe(objective="dpo", max_tokens_per_micro_batch=tokens)
    batch, packed = batch_of(rollouts, recipe), []
    monkeypatch.setattr(objectives, "pack", lambda group: packed.append(group) or pack(group))
    gradients(model, batch, recipe)
    pairs = {named(a): named(b) for a, b in zip(batch[0::2], batch[1::2], strict=True)}
    for group in packed:
        assert sum(map(len, group)) <= tokens or len(group) == 2
        assert all(pairs[named(a)] == named(b) for a, b in zip(group[0::2], group[1::2], strict=True))
    both = [sum(map(len, a)) + sum(map(len, b)) for a, b in pairwise(packed)]
    assert len(packed) > 1
    assert any(len(group) > 2 for group in packed) == (tokens == 400)
    assert all(total > tokens for total in both), "no two would fit into one"


def test_dpo_is_trls(model, tokenizer, rollouts, monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setenv("CI", "1")  # TRL's trainers report their use to the hub, but not from a CI
    recipe = Recipe(objective="dpo", beta=0.3)
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    for r, logp in zip(rollouts, log_probs(reference, rollouts, recipe), strict=True):
        r.ref_logps = logp.tolist()
    batch = batch_of(rollouts, recipe)
    result, found = gradients(model, batch, recipe)

    theirs = copy.deepcopy(model)
    for each in (theirs, reference):
        each.set_attn_implementation("sdpa")
    config = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, loss_type="sigmoid", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": r.prompt, "chosen": r.completion, "rejected": w.completion}
                              for r, w in zip(batch[0::2], batch[1::2], strict=True)])  # fmt: skip
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(theirs, reference, args=config, train_dataset=text, processing_class=tokenizer)
    # Chosen completions, then the rejected ones, padded on the right: the very tokens of our batch.
    rows = [*batch[0::2], *batch[1::2]]
    longest = max(map(len, rows))

    def padded(of_row):
        return torch.tensor([[*of_row(r), *[0] * (longest - len(r))] for r in rows])

    inputs = {
        "input_ids": padded(lambda r: [*r.prompt_ids, *r.completion_ids]),
        "attention_mask": padded(lambda r: [1] * len(r)),
        "completion_mask": padded(lambda r: [0] * len(r.prompt_ids) + [1] * len(r.completion_ids)),
    }
    theirs.eval()
    loss = trainer.compute_loss(theirs, inputs)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in theirs.parameters()])
    assert abs(result.loss - 0.6931) > 1e-3, "policy and reference differ"
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    model.set_attn_implementation(NAME)
    return model


RANKED = {"many": completions(["rrww", "rwww", "rrrw", "rrww", "rwwww"], length=23), "one pair": completions(["rw"])}


def on_a_rank(_, sharded=True):
    found = {}
    for objective in ("rft", "dpo"):
        for name, rollouts in RANKED.items():
            model = tiny()
            if sharded:
                shard(model, bf16=False)
            recipe = Recipe(objective=objective, beta=0.3, max_tokens_per_micro_batch=40)
            batch = batch_of(rollouts, recipe)
            result = accumulate_gradients(model, batch, recipe, class_weights(batch, recipe), (0.0, 0.0))
            grads = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
            found[objective, name] = vars(result), grads
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_are_one_process(ranks):
    alone = on_a_rank(0, sharded=False)
    for found in on_ranks(ranks, on_a_rank):
        for case, (result, grads) in found.items():
            expected, expected_grads = alone[case]
            for name in ("loss", "outcome_loss", "step_loss"):
                assert result[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), (case, name)
            for name in ("log_ratios", "step_log_ratios", "sequence_logps"):
                torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-6)
            for name, gradient in expected_grads.items():
                atol = EXACT * float(gradient.abs().max())
                torch.testing.assert_close(grads[name], gradient, rtol=0, atol=atol, msg=f"{case} {name}")


# ---- whole runs ----

TINY = [
    "--engine", "transformers", "--num_prompts", "16", "--num_test_problems", "10", "--warm_start_steps", "80",
    "--report_to", "none", "--reference_points", "zero", "--label_source", "checker", "--prm_audit", "false",
    "--save_steps", "1", "--prm_seed_problems", "10",
]  # fmt: skip


def updates(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run for each objective, of the same recipe otherwise."""
    from stepkto_fast.train import main

    folder = tmp_path_factory.mktemp("baselines")
    for objective in ("step_kto", "rft", "dpo"):
        assert main([SMOKE, *TINY, "--objective", objective, "--output_dir", str(folder / objective)]) == 0
    return folder


@pytest.mark.loop
@pytest.mark.parametrize("objective", ["rft", "dpo"])
def test_a_whole_run(runs, objective):
    own, steps = runs / objective, updates(runs / objective)
    first = read_rollouts(own / "rollouts" / "iteration_0.parquet")
    assert [r.completion_ids for r in first] == [
        r.completion_ids for r in read_rollouts(runs / "step_kto" / "rollouts" / "iteration_0.parquet")
    ], "the runs share M_0 and its rollouts"
    assert [x["step"] for x in steps if x["iteration"] == 0] == [
        x["step"] for x in updates(runs / "step_kto") if x["iteration"] == 0
    ]
    assert [x["loss/outcome"] for x in steps] == [x["loss"] for x in steps]
    assert {x["loss/step"] for x in steps} == {0.0}
    assert any(x["rewards/chosen"] for x in steps), "the policy moves away from its reference"
    assert all(("logps/rejected" in x) == (objective == "dpo") for x in steps)
    starts, ends = (load_file(own / "checkpoints" / f"iteration_{t}" / "model.safetensors") for t in (0, 2))
    assert any(not torch.equal(starts[name], ends[name]) for name in starts)
    assert (own / "report.html").exists()


@pytest.mark.loop
@pytest.mark.parametrize("objective", ["rft", "dpo"])
def test_an_interrupted_update_resumes_with_the_same_batches(runs, tmp_path, interrupt_update, objective):
    from stepkto_fast.train import main

    arguments = [SMOKE, *TINY, "--objective", objective, "--output_dir", str(tmp_path / "cut")]
    interrupt_update(len([x for x in updates(runs / objective) if x["iteration"] == 0]) + 3)
    assert main(arguments) == 130
    assert list((tmp_path / "cut" / "checkpoints").glob("iteration_1_step_2")), "it stopped in the second update"
    assert main([*arguments, "--resume", "true"]) == 0
    assert updates(tmp_path / "cut") == updates(runs / objective)
    name = Path("checkpoints", "iteration_2", "model.safetensors")
    assert (tmp_path / "cut" / name).read_bytes() == (runs / objective / name).read_bytes()


@pytest.mark.loop
@pytest.mark.parametrize("objective", ["rft", "dpo"])
def test_a_run_without_anything_to_learn_from_is_one_message(tmp_path, capsys, objective):
    from stepkto_fast.train import main

    # What M_0 writes is cut off long before an answer.
    more = ["--max_completion_length", "3", "--objective", objective, "--output_dir", str(tmp_path / "run")]
    assert main([SMOKE, *TINY, *more]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"objective {objective} learns from" in error
    assert "iteration 0: none of" in error
    assert "Traceback" not in error


@pytest.mark.loop
def test_an_evaluation_tells_what_became_of_each_problem(runs):
    summary = json.loads((runs / "rft" / "summary.json").read_text())
    for record in summary["iterations"]:
        rows = pq.read_table(runs / "rft" / "evaluations" / f"iteration_{record['iteration']}.parquet").to_pylist()
        assert record["pass@8"] == sum(row["samples_right"] > 0 for row in rows) / len(rows)
        assert record["maj@8"] == sum(row["majority_right"] for row in rows) / len(rows)
        firsts = [row["step_labels"].index(0) + 1 for row in rows if 0 in row["step_labels"]]
        assert record["first_error_step"] == pytest.approx(sum(firsts) / len(firsts))
        assert max(row["samples_right"] for row in rows) > 1


@pytest.mark.loop
def test_without_an_audit_no_head_is_fitted_and_nothing_else_changes(runs, tmp_path):
    from stepkto_fast.train import main

    own, audited = runs / "step_kto", tmp_path / "audited"
    assert main([SMOKE, *TINY, "--prm_audit", "true", "--output_dir", str(audited)]) == 0
    assert not (own / "rollouts" / "seed.parquet").exists()
    assert not (own / "model" / "prm_head").exists()
    assert (audited / "rollouts" / "seed.parquet").exists()
    for t in (0, 1, 2):
        name = Path("checkpoints", f"iteration_{t}", "model.safetensors")
        assert (own / name).read_bytes() == (audited / name).read_bytes()
    with_head, without = (json.loads((f / "summary.json").read_text())["iterations"] for f in (audited, own))
    assert all(record["prm_f1"] is None and record["prm"] == {} for record in without)
    assert all(record["prm_f1"] is not None for record in with_head)
    assert [r["pass@1"] for r in with_head] == [r["pass@1"] for r in without]


@pytest.mark.loop
def test_a_head_that_labels_is_fitted_without_an_audit_too(tmp_path):
    from stepkto_fast.train import main

    more = ["--label_source", "head", "--iterations", "1", "--num_eval_generations", "1"]
    assert main([SMOKE, *TINY, *more, "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "rollouts" / "seed.parquet").exists()
    # Of one sample there is no Pass@k beside the greedy solutions' Pass@1.
    for record in json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"]:
        path = tmp_path / "run" / "evaluations" / f"iteration_{record['iteration']}.parquet"
        labels = pq.read_table(path)["label"].to_pylist()
        assert record["pass@1"] == sum(labels) / len(labels)


@pytest.mark.loop
@pytest.mark.parametrize("objective", ["rft", "dpo"])
def test_offline(tmp_path, model, tokenizer, rollouts, monkeypatch, capsys, objective):
    """Labelled completions without step labels, with which Step-KTO would say that only outcomes are learnt."""
    from stepkto_fast.checkpoint import save_pretrained
    from stepkto_fast.train import main

    save_pretrained(model, tokenizer, tmp_path / "m0")
    by_prompt = [rollouts[n : n + 2] for n in range(0, len(rollouts), 2)]
    assert any({r.label for r in pair} == {True, False} for pair in by_prompt[1:10])
    rows = [{"prompt": r.prompt, "completion": r.completion, "label": r.label} for r in rollouts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    arguments = [
        "--label_source", "dataset", "--labelled_dataset", str(tmp_path / "rows.jsonl"), "--model",
        str(tmp_path / "m0"), "--report_to", "none", "--train_batch_size", "6", "--warmup_steps", "0",
        "--num_train_epochs", "4", "--learning_rate", "1e-3", "--context_length", "96", "--objective", objective,
    ]  # fmt: skip
    assert main([*arguments, "--output_dir", str(folder)]) == 0
    own = updates(folder)
    assert own[-1]["loss"] < own[0]["loss"]

    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    # Micro-batches are halved down to what cannot be split, which is a pair for DPO.
    monkeypatch.setattr(update, "accumulate_gradients", no_memory)
    capsys.readouterr()
    assert main([*arguments, "--output_dir", str(tmp_path / "large")]) == 1
    recipe = Recipe(objective=objective, train_batch_size=6, num_train_epochs=4)
    batches = batch_order(read_rollouts(folder / "rollouts" / "iteration_0.parquet"), recipe, 0)
    per = 2 if objective == "dpo" else 1
    longest = max(sum(map(len, batch[k : k + per])) for batch in batches for k in range(0, len(batch), per))
    said = f"micro-batches of {longest} tokens, and the longest completion has {longest} "
    assert said in " ".join(capsys.readouterr().err.split())
