"""Damaged result files of the study are named, with what is wrong with them."""

import json
import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from made_study import Maker

from stepkto_fast.errors import RunError
from stepkto_fast.study.results import load


def damage_version(record):
    return record | {"version": 2}


def damage_key(record):
    return {k: v for k, v in record.items() if k != "greedy"}


def damage_digit(record):
    record["greedy"][1]["right"] = "2" + record["greedy"][1]["right"][1:]
    return record


def damage_length(record):
    record["greedy"][1]["steps"] += "4"
    return record


def damage_samples(record):
    record["final"]["test"]["samples_right"] = "9" * 40
    return record


def damage_place(record):
    return record | {"seed": 3}


def damage_problems(record):
    for greedy in record["greedy"]:
        greedy |= {key: greedy[key][:-1] for key in ("right", "first_error", "steps")}
    return record | {"final": {}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "its version is 2"), (damage_key, "'greedy' is missing"),
        (damage_digit, "digit that is out of range"), (damage_length, "40, 40 and 41 problems"),
        (damage_samples, "samples with a digit"), (damage_place, "says that it is main/easy/kto/seed_3"),
        (damage_problems, "has 39 test problems"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, damage, message):
    maker = Maker(tmp_path, problems=40)
    maker.run("main", "easy", "kto", 0)
    path = maker.run("main", "easy", "kto", 1)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = Maker(tmp_path, problems=40).run("main", "easy", "kto", 0)
    path.write_text(path.read_text()[:500])
    with pytest.raises(RunError, match=re.escape(str(path))):
        load(tmp_path)
