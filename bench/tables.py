"""The columns of a benchmark's table, for the terminal: only those that somebody in the group has something in."""

from collections.abc import Callable
from typing import Any


def percent(value: float) -> str:
    return f"{value:.1%}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("ms", lambda ms: f"{ms:.3f}" if ms < 100 else f"{ms:.0f}"),
    "spread": ("+-", lambda share: f"{share / 2:.1%}"),
    "tflops": ("TFLOP/s", "{:.3f}".format),
    "gb_per_s": ("GB/s", "{:.2f}".format),
    "tokens_per_s": ("tokens/s", "{:.0f}".format),
    "answers_per_s": ("answers/s", "{:.0f}".format),
    "of_bare": ("of bare", "{:.2f}".format),
    "of_best_peer": ("x peer", "{:.2f}".format),
    "rho": ("rho", "{:.3f}".format),
    "value_error": ("error", "{:.0e}".format),
    "gradient_error": ("grad. error", "{:.0e}".format),
    "peak_bytes": ("MB", lambda size: f"{size / 1e6:.1f}"),
    "peak_share": ("of logits", percent),
    "path": ("path", str),
}


def text(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row, fastest first, under a line of titles."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    width = max(len(str(row.get("provider", ""))) for row in rows)
    lines = [" " * width + "".join(f"  {COLUMNS[name][0]:>11}" for name in names)]
    for row in sorted(rows, key=lambda row: row["ms"]):
        cells = ("" if row.get(name) is None else COLUMNS[name][1](row[name]) for name in names)
        lines.append(f"{row.get('provider', ''):<{width}}" + "".join(f"  {cell:>11}" for cell in cells))
    return lines
