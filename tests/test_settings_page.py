"""docs/settings.md is what the dataclasses say."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from stepkto_fast.settings import setting
from stepkto_fast.settings_page import COMMANDS, Command, _command, page

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def test_the_committed_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run make docs"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.settings.__name__)
def test_every_key_stands_in_a_section(command):
    names = [f.name for f in command.fields()]
    assert not command.sections or next(iter(command.sections)) == names[0]
    # The sections are in the dataclass's order, and none is of a key that is gone.
    assert list(command.sections) == [name for name in names if name in command.sections]
    rows = [line.split("`")[1] for line in "\n".join(_command(command)).splitlines() if line.startswith("| `")]
    assert rows == names


def test_every_setting_of_every_command_is_on_the_page():
    shown = {name for command in COMMANDS for name in (f.name for f in command.fields())}
    assert shown == {f.name for command in COMMANDS for f in fields(command.settings)}


def test_how_a_key_is_shown():
    @dataclass
    class Settings:
        mode: Literal["a", "b"] = setting("a", "one | other")
        path: str | None = setting(None, "where")
        exact: bool = setting(True, "whether")
        rate: float = setting(1e-5, "how fast")
        choice: Literal["x"] | None = setting(None, "which")

    parts = "\n".join(_command(Command("Title", "python -m x", Settings, {"mode": "First", "exact": "Second"})))
    assert parts == (
        "## Title\n\n    python -m x\n\n### First\n\n"
        "| key | values | default | what it is |\n|---|---|---|---|\n"
        "| `mode` | `a`, `b` | `a` | one \\| other |\n| `path` | text | none | where |\n\n"
        "### Second\n\n| key | values | default | what it is |\n|---|---|---|---|\n"
        "| `exact` | true or false | `true` | whether |\n| `rate` | number | `1e-05` | how fast |\n"
        "| `choice` | `x` | none | which |\n"
    )
