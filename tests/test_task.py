"""The tasks as the loop sees them: which problems a run gets, how they are asked, who may label steps."""

import importlib.util
import json
from contextlib import closing

import pytest
from tokenizers.processors import TemplateProcessing

from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_byte_tokenizer
from stepkto_fast.recipe import Recipe
from stepkto_fast.setup_run import require_labels
from stepkto_fast.task import ArithmeticTask, asked_rows, open_task
from stepkto_fast.tasks import math

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def math_recipe(**settings) -> Recipe:
    return Recipe(**{"task": "math", "label_source": "monte_carlo", "answer_workers": 1, **settings})


def rows(path, count, **changes):
    made = [{"problem": f"What is ${n} + 1$?", "answer": str(n + 1), **changes} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_arithmetic_problems_of_a_run_are_apart():
    recipe = Recipe(num_prompts=20, num_test_problems=30, prm_seed_problems=15, iterations=2)
    found = open_task(recipe).problems()
    sets = [{p.prompt for p in part} for part in (found.test, found.seed, *found.train)]
    assert [len(s) for s in sets] == [30, 15, 20, 20]
    assert len(set().union(*sets)) == 85
    other = open_task(
        Recipe(num_prompts=20, num_test_problems=30, prm_seed_problems=15, iterations=2, seed=1)
    ).problems()
    assert other.test == found.test, "held-out problems do not depend on the seed"
    assert other.train != found.train


@needs_math_verify
def test_the_sample_gives_a_run_its_problems():
    recipe = math_recipe(
        label_source="head", prm_labels="monte_carlo", num_prompts=8, prm_seed_problems=10, iterations=2
    )
    with closing(open_task(recipe)) as task:
        found = task.problems()
        again = task.problems()
    assert (len(found.test), len(found.seed), [len(t) for t in found.train]) == (6, 10, [8, 8])
    assert not found.complaints
    assert again == found
    questions = [{p.question for p in part} for part in (found.test, found.seed, found.train[0] + found.train[1])]
    assert not questions[0] & (questions[1] | questions[2]), "held out"
    assert not questions[1] & questions[2], "the head does not label what it was fitted on"


@needs_math_verify
def test_no_problem_is_set_aside_for_a_head_that_is_not_fitted_on_them():
    with closing(open_task(math_recipe(num_prompts=24))) as task:
        found = task.problems()
    assert (found.seed, [len(t) for t in found.train]) == ([], [24, 24, 24])


@needs_math_verify
def test_golds_that_do_not_parse_and_held_out_problems_are_left_out_and_named(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    rows(test, 3)
    bad = [{"problem": "Prove it.", "answer": "?!"}, {"problem": "List them.", "answer": [1, 2]}]
    rows(train, 20)
    with open(train, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    with closing(open_task(math_recipe(train_dataset=str(train), test_dataset=str(test)))) as task:
        found = task.problems()
    assert len(found.test) == 3
    assert {len(t) for t in found.train} == {17}, "three of twenty are held out"
    assert len(found.complaints) == 2
    assert any(f"{train}:21" in c for c in found.complaints), "no answer in it"
    assert any(f"{train}:22" in c and "answer" in c for c in found.complaints), "not a text"


@needs_math_verify
def test_no_more_golds_are_parsed_than_a_run_needs(tmp_path, monkeypatch):
    from stepkto_fast import task as module

    path = rows(tmp_path / "many.jsonl", 100)
    monkeypatch.setattr(module, "GOLDS", 10)
    with closing(open_task(math_recipe(train_dataset=path, num_prompts=7, iterations=2))) as task:
        parsed = []
        real = task._answers.complaints
        monkeypatch.setattr(task._answers, "complaints", lambda golds: parsed.extend(golds) or real(golds))
        found = task.problems()
    assert [len(t) for t in found.train] == [7, 7]
    assert len(parsed) == 6 + 20, "the sample's held-out problems, and two parts of ten for fourteen prompts"


@needs_math_verify
def test_too_few_problems_and_no_usable_gold_are_errors(tmp_path):
    few = rows(tmp_path / "few.jsonl", 5)
    with closing(open_task(math_recipe(train_dataset=few))) as task, pytest.raises(RunError, match="give at least 10"):
        task.problems()
    none = rows(tmp_path / "none.jsonl", 12, answer="?!")
    with closing(open_task(math_recipe(test_dataset=none))) as task, pytest.raises(RunError, match="no usable problem"):
        task.problems()


@needs_math_verify
def test_demonstrations_are_of_training_problems_alone():
    with closing(open_task(math_recipe(num_prompts=24))) as task:
        found = task.problems()
        shown = task.demonstrations(found)
    assert len(shown.pairs) == 24
    assert not {p.question for p, _ in shown.pairs} & {p.question for p in found.test}
    for p, text in shown.pairs:
        assert shown.tokenizer.decode(shown.tokenizer(text)["input_ids"]) == text
        assert "\\boxed{" in text
        assert p.solution == text


@needs_math_verify
def test_special_tokens_are_added_once(tmp_path):
    tokenizer = build_byte_tokenizer(["What is 1 + 1? Solve it."])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    with closing(open_task(math_recipe())) as task:
        problem = task.problems().test[0]
        text, ids = task.prompt(problem, tokenizer)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids, "the completion is still to come"
        tokenizer.chat_template = "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        templated, ids = task.prompt(problem, tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert templated.startswith("<bos>[user]")
        assert templated.endswith("[assistant]")
        assert problem.question in templated
        assert problem.question in text
        assert task.check_steps(problem, ["a", "b"]) == [-1, -1]


@pytest.mark.parametrize("template", ["none", "with system role", "rejects it", "drops it"])
def test_labelled_questions_are_asked_as_rollouts_are(template):
    """With the same system prompt and instruction, by every kind of chat template."""
    tokenizer = build_byte_tokenizer(["What is 1 + 1? Be brief."])
    message = "[{{ m.role }}]{{ m.content }}"
    tokenizer.chat_template = {
        "none": None,
        "with system role": "{% for m in messages %}" + message + "{% endfor %}[assistant]",
        "rejects it": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + message + "{% endfor %}[assistant]",
        "drops it": "{% for m in messages if m.role != 'system' %}" + message + "{% endfor %}[assistant]",
    }[template]  # fmt: skip
    recipe = math_recipe(system_prompt="Be brief.", instruction="In steps.")
    bare = [{"role": "user", "content": "What is $1 + 1$?"}]
    rows = [{"prompt": bare, "n": 1}, {"prompt": "A text", "n": 2}, {"prompt": [*bare, bare[0]], "n": 3}]
    found = asked_rows(rows, recipe, tokenizer)
    assert found[1:] == rows[1:], "a text, or a conversation, is taken as it is"
    asked = found[0]["prompt"]
    if template != "none":
        asked = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    wanted = math.prompt("What is $1 + 1$?", tokenizer, system_prompt="Be brief.", instruction="In steps.")
    assert asked == wanted.text
    assert "Be brief." in asked
    assert asked_rows(rows, Recipe(), tokenizer) == rows, "other tasks have no instruction"


def test_who_cannot_label_steps_is_told_before_the_run_starts(tmp_path):
    class Unchecked(ArithmeticTask):
        exact_steps = False

    require_labels(Recipe(label_source="checker"), ArithmeticTask(Recipe()))
    for settings, message in (
        ({"label_source": "checker"}, "no exact checker of steps; take head"),
        ({}, "set prm_labels to monte_carlo"),
        ({"label_source": "consensus"}, "prm_dataset to step-labelled data"),
    ):
        with pytest.raises(RunError, match=message):
            require_labels(Recipe(**settings), Unchecked(Recipe()))
    with pytest.raises(RunError, match=r"holds no prm_config.json: give a directory that train_prm wrote"):
        require_labels(Recipe(prm=str(tmp_path)), Unchecked(Recipe()))
    (tmp_path / "prm_config.json").touch()
    for settings in ({"prm": str(tmp_path)}, {"prm_labels": "monte_carlo"}, {"label_source": "monte_carlo"}):
        require_labels(Recipe(**settings), Unchecked(Recipe()))
