"""What the fuzzers of tests/soak found, kept: each of these once was an exception nobody could act on."""

import base64
import csv

import pytest
import torch
from stepkto_kernels import linear_logp, step_kto

from stepkto_fast import planner
from stepkto_fast.errors import RunError
from stepkto_fast.labelled import read_labelled
from stepkto_fast.recipe import Recipe, parse_recipe
from stepkto_fast.rows import read_rows
from stepkto_fast.tasks import arithmetic, math

BATCH = {
    "logp": torch.tensor([-1.0]), "ref_logp": torch.tensor([-2.0]),
    "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32), "cu_steps": torch.tensor([0, 1], dtype=torch.int32),
    "labels": torch.tensor([True]), "step_labels": torch.tensor([1], dtype=torch.int8),
}  # fmt: skip
DAMAGED = (  # a gzip file whose stream breaks its own format
    "H4sIAMWsAmsC/6tWKijKz3ZlcnNpb24gaHR0cHM6Ly9naXQtbGZzUEoGSuWklmTm5xUDFUQrJYIEk5RigWROYlJqDli0pKg0VUch"
    "rzQnBy4OFAaJ1gIA5D8OZV4AAAA="
)


@pytest.mark.parametrize("name", ["kl", "step_kl"])
def test_integers_of_more_than_64_bits_are_numbers(name):
    assert step_kto(**BATCH, **{name: 2**70}).loss.isfinite()
    assert getattr(step_kto(**BATCH, **{name: 2**70}), name) == 2.0**70


@pytest.mark.parametrize("name", ["kl", "step_kl", "beta", "desirable_weight", "num_completions", "num_supervised"])
@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_integers_beyond_all_floats_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is"):
        step_kto(**BATCH, **{name: value})


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_ignore_index_that_no_tensor_holds_is_refused(value):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"^ignore_index is .*64 bits"):
        linear_logp(one, one, torch.tensor([0]), ignore_index=value)


def test_a_damaged_archive_is_named(tmp_path):
    """zlib's own error is none of the operating system."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(base64.b64decode(DAMAGED))
    with pytest.raises(RunError, match="may be cut off or damaged"):
        list(read_rows(str(path)))


def test_a_header_that_is_not_utf8_is_a_complaint(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"probl\xe9me,answer\nq,2\n")
    ((_, row, complaint),) = read_rows(str(path))
    assert row is None
    assert "is not UTF-8" in complaint
    for read in (read_labelled, math.problems):
        with pytest.raises(RunError) as raised:
            read(str(path))
        str(raised.value).encode()


def test_a_name_as_long_as_a_text_does_not_flood_the_message(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["x" * 3000, *map(str, range(500))], ["1"] * 501])
    for read in (read_labelled, math.problems, lambda source: read_labelled(source, format="unpaired")):
        with pytest.raises(RunError) as raised:
            read(str(path))
        assert len(str(raised.value)) < 1500 + 2 * len(str(path))


@pytest.mark.parametrize("source", ["9" * 5000, "~nobody-of-this-name/rows.jsonl"])
def test_what_cannot_be_a_path_is_refused(source):
    for read in (read_rows, read_labelled, math.problems, arithmetic.read_problems):
        with pytest.raises(RunError, match=r"^'(9+|~nobody.*)' cannot be looked up"):
            read(source)


@pytest.mark.parametrize("words", [["9" * 5000], ["--seed", "1" * 30], ["--learning_rate", "inf"], ["--beta", "1e400"]])
def test_command_lines_that_no_machine_takes_are_refused(words):
    with pytest.raises(RunError, match=r"cannot be read|give a number below"):
        parse_recipe(words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_length", "0"), ("filter_eps", "1"), ("adam_beta1", "1"), ("step_weight", "-1"),
        ("weight_decay", "-1"), ("max_grad_norm", "0"), ("desirable_weight", "nan"),
    ],
)  # fmt: skip
def test_numbers_that_would_stop_a_run_later_are_refused_at_once(key, value):
    with pytest.raises(RunError, match=f"^{key} is .*: give"):
        parse_recipe([f"--{key}", value])


@pytest.mark.parametrize(
    "content", ["seed: 2024-99-99", "seed: " + "9" * 5000, "[" * 4000], ids=["date", "number", "nesting"]
)
def test_yaml_that_breaks_its_reader_is_not_yaml(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RunError, match="is not YAML"):
        parse_recipe([str(path)])


@pytest.mark.parametrize("rate", ["engine_reserve_gib", "memory_gib"])
def test_a_plan_of_infinite_rates_is_refused(rate, capsys):
    assert planner.main([f"--{rate}", "inf"]) == 1
    assert f"{rate} is inf: give a number below" in capsys.readouterr().err


def test_the_defaults_are_numbers_that_are_allowed():
    assert parse_recipe([]) == Recipe()
