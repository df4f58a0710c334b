"""The page's section on the search: what was tried and chosen, on searches made by hand."""

import math
import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from made_study import PLANTED, Maker, part, text_of

from stepkto_fast.study import page
from stepkto_fast.study.plan import ready, tuned
from stepkto_fast.study.results import load


def test_the_search_marks_what_was_chosen(tmp_path_factory, tmp_path):
    whole = tmp_path_factory.mktemp("whole")
    Maker(whole).study(seeds=1).search()
    found = part(text_of(whole), "Search")
    row = re.search(r"\| hard \| `kto` \| 0.5 \| (.*?) \| (.*?) \| (.*?) \|", found)
    assert row is not None
    assert [cell.startswith("**") for cell in row.groups()] == [False, True, False]
    assert all(cell.strip("*").endswith(" (1.5)") for cell in row.groups())  # KL from M_0
    assert "Chosen, hard: `kto` 0.0001 and 0.5 (3 tried)." in found
    assert (
        "`kto_more` takes what was chosen for `kto` and `step_kto_prm` takes what was chosen for `step_kto`." in found
    )
    Maker(tmp_path).search()
    found = part(text_of(tmp_path), "Search")
    assert "Chosen, hard: `kto` not chosen yet (3 tried)." in found
    assert "The search is not over: `kto` (hard)." in found


def climb(maker, effect):
    """Runs the whole search of `kto` on the first difficulty; `effect` of a learning rate and a beta."""
    while specs := [s for s in ready(page.FAMILY, searches(maker), ("search",)) if (s.difficulty, s.arm) == WHERE]:
        for s in specs:
            right = effect(s.overrides["learning_rate"], s.overrides["beta"])
            maker.run("search", s.difficulty, s.name, s.seed, s.arm, (right, 0.3), overrides=s.overrides)
    return tuned(page.FAMILY, *WHERE, searches(maker))


WHERE = ("easy", "kto")


def searches(maker):
    return [r for r in load(maker.folder) if r["stage"] == "search"] if maker.folder.exists() else []


def test_what_the_search_ended_with_is_chosen_and_what_the_runs_use_is_said(tmp_path):
    maker = Maker(tmp_path, problems=400, effects={"kto": PLANTED["kto"]})
    start = page.FAMILY.start
    chosen = climb(maker, lambda rate, beta: -3.0 if (rate, beta) != start else 1.5)
    assert (chosen["learning_rate"], chosen["beta"]) == start
    found = part(text_of(tmp_path), "Search")
    assert f"Chosen, easy: `kto` {start[0]:g} and {start[1]:g} (5 tried)." in found
    assert "4 of 5 settings end below M_0, far from it: KL 1.5 to 1.5 nats" in found
    maker.run("main", "easy", "kto", 0, overrides=chosen)
    assert "highest" not in part(text_of(tmp_path), "Search")
    maker.run("main", "easy", "kto", 0, overrides=chosen | {"learning_rate": start[0] / 2})
    assert "The chosen setting is not the one with the highest Pass@1: `kto` (easy)." in part(
        text_of(tmp_path), "Search"
    )
    maker.run("main", "easy", "kto", 0, overrides=chosen | {"learning_rate": 1.0})
    assert "The runs use a setting that was not tried: `kto` (easy)." in part(text_of(tmp_path), "Search")


def test_the_search_says_when_it_ended_at_its_edge(tmp_path):
    maker = Maker(tmp_path, problems=400, effects={"kto": PLANTED["kto"]})
    low, high = page.FAMILY.rate_limits
    chosen = climb(maker, lambda rate, beta: 2.0 * math.log(rate / low) / math.log(high / low))
    assert chosen["learning_rate"] * 2 > high
    found = part(text_of(tmp_path), "Search")
    assert "The chosen setting lies at the edge of what could be tried: `kto` (easy)." in found
