"""The page's section on ablations, and the runs that lost their form, on results made by hand."""

import json
import math

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from made_study import PLANTED, Maker, fail, part, table_of, text_of

from stepkto_fast.study import figures
from stepkto_fast.study.statistics import Estimate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Maker(folder).study(("hard",)).ablations()
    return folder


def test_ablations_are_beside_their_base_over_common_seeds(whole, tmp_path):
    found = table_of(text_of(whole), "Ablations")
    assert found["`points_exact`"][:4] == ["reference points: exact KL", "hard", "`step_kto`", "3"]
    assert found["`noise_20`"][6].endswith("worse**")
    assert "better" not in found["`points_exact`"][6]
    assert [row[8] for row in found.values()] == ["1.30x"] * 3
    Maker(tmp_path).study(("hard",), seeds=2).ablations(("a_name_of_its_own",))
    found = table_of(text_of(tmp_path), "Ablations")
    expected = ["`reference_points: exact`", "hard", "`step_kto`", "2"]
    assert found["`a_name_of_its_own`"][:4] == expected
    assert "(2 seeds)" in found["`a_name_of_its_own`"][6]


def test_the_outcome_loss_is_held_against_the_step_loss_alone_all_else_equal(tmp_path):
    maker, lead = Maker(tmp_path).study(("hard",), 4), "**The outcome loss beside the step loss**,"
    for seed in (1, 3):
        maker.run("ablations", "hard", "step_weight_3", seed, "step_kto", PLANTED["step_only"])
        maker.run("ablations", "hard", "outcome_wrong", seed, "step_kto", (-0.6, -1.0))
    assert lead not in text_of(tmp_path)  # no run of the step loss alone at these settings
    for seed in (1, 3):
        maker.run("ablations", "hard", "outcome_none", seed, "step_kto", PLANTED["step_only"])
        maker.run("ablations", "hard", "unweighted_outcome_none", seed, "step_kto", PLANTED["step_only"])
    text = text_of(tmp_path)
    found = table_of(f"\n## one\n{text[text.index(lead) :]}", "one")

    def solved(stage, name, seed, t):
        record = json.loads((tmp_path / stage / "hard" / name / f"seed_{seed}.json").read_text())
        return 100 * record["iterations"][t]["pass@1"]

    for stage, name, alone in (
        ("main", "step_kto", "outcome_none"), ("ablations", "step_weight_3", "outcome_none"),
        ("ablations", "outcome_wrong", "unweighted_outcome_none"),
    ):  # fmt: skip
        assert found[f"`{name}`"][1] == f"`{alone}`"
        for t in (1, 2, 3):
            gaps = [solved(stage, name, s, t) - solved("ablations", alone, s, t) for s in (1, 3)]
            value = found[f"`{name}`"][1 + t].strip("*").split(" ")[0]
            assert float(value) == pytest.approx(sum(gaps) / 2, abs=0.051)
    assert float(found["`outcome_wrong`"][4].strip("*").split(" ")[0]) < -20
    assert "worse" not in found["`step_weight_3`"][4]
    assert found["`outcome_none`"][0] == "the step loss alone"
    assert [found[f"`{name}`"][-1] for name in ("step_kto", "outcome_none")] == ["0 of 4 runs", "0 of 2 runs"]


def test_a_failed_ablation_is_said_to_have_failed_and_is_not_judged(tmp_path):
    maker = Maker(tmp_path).study(("hard",), 3).ablations(("after_mask", "step_sum"))
    for seed in range(3):
        fail(maker.run("ablations", "hard", "after_mask", seed, "step_kto"), 2)
    fail(maker.run("ablations", "hard", "step_sum", 1, "step_kto"), 2)
    text = text_of(tmp_path)
    for section in ("Ablations", "Advice"):
        assert "Failed: `step_sum` (1 of 3 runs) and `after_mask` (3 of 3 runs)." in part(text, section)
    found = table_of(text, "Ablations")
    assert found["`after_mask`"][3:] == ["0", "", "", "", "", "", "3 of 3"]
    assert found["`step_sum`"][3] == "2"
    assert found["`step_sum`"][9] == "1 of 3"
    advice = part(text, "Advice").replace("Failed: `step_sum` (1 of 3 runs) and `after_mask` (3 of 3 runs).", "")
    assert "`after_mask`" not in advice


def test_where_all_ablations_failed_nothing_is_judged(tmp_path):
    maker = Maker(tmp_path).study(("hard",), 3)
    for seed in range(3):
        fail(maker.run("ablations", "hard", "after_mask", seed, "step_kto"), 2)
    found = table_of(text_of(tmp_path), "Ablations")
    assert found["`after_mask`"][3:] == ["0", "3 of 3"]  # columns that nothing fills are left out


def test_noise_is_no_choice(whole):
    advice = part(text_of(whole), "Advice")
    assert "Step labels turned over, 20 %: Pass@1 of M_" in advice
    assert "worse than the base" not in advice


def test_runs_that_lost_the_form_are_named(tmp_path):
    maker = Maker(tmp_path).study(("hard",), 2).ablations(("after_mask",), 2)

    def longer(stage, name, seed, shares):
        """Gives a share of each model's solutions one line more."""
        path = tmp_path / stage / "hard" / name / f"seed_{seed}.json"
        record = json.loads(path.read_text())
        for greedy, share in zip(record["greedy"], shares, strict=True):
            many = round(share * maker.problems)
            greedy["steps"] = "9" * many + greedy["steps"][many:]
        path.write_text(json.dumps(record))

    longer("main", "kto", 1, (0, 0, 0.3, 0.2))
    longer("main", "dpo", 0, (0, 0, 0, 0.1))  # not more than a tenth
    longer("ablations", "after_mask", 0, (0, 0, 0, 0.4))
    path = tmp_path / "main" / "hard" / "rft" / "seed_0.json"
    record = json.loads(path.read_text())
    steps = record["final"]["shifted"]["greedy"]["steps"]
    record["final"]["shifted"]["greedy"]["steps"] = "9" * (len(steps) // 2) + steps[len(steps) // 2 :]
    path.write_text(json.dumps(record))
    # A variant that changed nothing is its base again: no run of its own.
    base = json.loads((tmp_path / "main" / "hard" / "kto" / "seed_1.json").read_text())
    maker.write(base | {"stage": "ablations", "name": "kto_points_mismatched"})
    maker.run("ablations", "hard", "step_sum", 1, "step_kto")
    text = text_of(tmp_path)
    found = part(text, "Results")
    assert (
        "more than 10 % of the problems: 1 of 2 runs of `kto`, 1 of 2 runs of `rft` and 1 of 3 runs of ablations, on "
        "hard with seeds 0 and 1; no run of `dpo`, `kto_more`, `step_kto`, `step_kto_prm` and `step_only`."
    ) in found
    assert [line for line in text.splitlines() if line.startswith(("| `kto`, hard | 1", "| `rft`, hard | 0"))] == [
        "| `kto`, hard | 1 | 0.0 | 30.0 | 20.0 | 0.0 |",
        "| `rft`, hard | 0 | 0.0 | 0.0 | 0.0 | 50.0 |",
    ]
    assert "some runs lost the form" in part(text, "Advice")
    assert "the base's very solutions: `kto_points_mismatched`." in part(text, "Advice")
    assert "lost the form of solutions, see Results: `kto` with seed 1." in part(text, "Ablations")


def test_wide_intervals_leave_the_frame_and_the_caption_says_so():
    def drawn(*estimates):
        rows = [figures.Row("a", Estimate(*e, 3), "no difference") for e in estimates]
        figure = figures.forest_figure([[figures.Forest("t", "points", 1, rows)]], "title", "Caption.")
        return figure.axes[0].get_xlim(), figure.get_supxlabel()

    wide, caption = drawn((-0.1, -0.9, 0.7), (0.02, 0.0, 0.04))
    assert wide == pytest.approx((-30, 30))
    assert caption == "Caption. Lines that meet the frame go on."
    narrow, caption = drawn((-0.1, -0.2, 0.0), (0.0, 0.0, 0.0))
    assert -30 < narrow[0] < -20
    assert 0 < narrow[1] < 30
    assert caption == "Caption."
    assert drawn((0.0, -0.2, 0.2))[0][0] < -20  # nothing to cut at
    assert drawn((0.1, math.nan, math.nan))[1] == "Caption."
