"""Small pieces of HTML that the report's sections share: cells, tables, numbers as people read them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

# (model, sampler) -> (name, colour class, dashed line)
FAMILIES: dict[tuple[str, str], tuple[str, str, bool]] = {
    ("teacher", "teacher"): ("Teacher", "teacher", False),
    ("sla", "teacher"): ("SLA", "sla", False),
    ("teacher", "turbo"): ("Teacher, undistilled", "teacher-u", True),
    ("sla", "turbo"): ("SLA, undistilled", "sla-u", True),
    ("rcm", "turbo"): ("rCM", "rcm", False),
    ("merge", "turbo"): ("SLA + rCM merged", "merge", False),
    ("turbo", "turbo"): ("Turbo", "turbo", False),
}


def esc(text: object) -> str:
    """Text from outside, safe in HTML."""
    return html.escape(str(text), quote=True)


def family(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row.get("sampler", "turbo")


def describe(row: dict[str, Any]) -> tuple[str, str, bool]:
    """(name, colour class, dashed) of a row, also for models that the table above does not know."""
    return FAMILIES.get(family(row), (str(row["model"]), "merge", False))


def family_name(row: dict[str, Any]) -> str:
    return describe(row)[0]


def find(rows: Sequence[dict[str, Any]], model: str, sampler: str) -> dict[str, Any] | None:
    return next((row for row in rows if family(row) == (model, sampler)), None)


def headline_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The result: the last stage's model at 4 steps, or at the most steps it was sampled with."""
    for model in ("turbo", "merge", "rcm"):
        members = [row for row in rows if row["model"] == model]
        if members:
            return max(members, key=lambda row: (row["steps"] == 4, row["steps"]))
    return None


def table(heads: Sequence[str], rows: Iterable[str], left: Sequence[int] = ()) -> str:
    """A table that scrolls on narrow screens; `rows` are complete `<tr>`, `left` the columns that are not right-aligned."""
    cells = "".join(
        f'<th class="left">{head}</th>' if index in left else f"<th>{head}</th>" for index, head in enumerate(heads)
    )
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def key_cell(row: dict[str, Any], note: str = "") -> str:
    """The first cell of a row: coloured dot and name."""
    name, css, _ = describe(row)
    small = f"<small>{esc(note)}</small>" if note else ""
    return f'<td><span class="key s-{css}"></span>{esc(name)}{small}</td>'


def cell(value: float | None, digits: int, interval: Sequence[float | None] | None = None) -> str:
    low, high = interval or (None, None)
    span = "" if low is None or high is None else f"<small>[{low:.{digits}f}, {high:.{digits}f}]</small>"
    return f"<td>{number(value, digits)}{span}</td>"


def number(value: Any, digits: int) -> str:
    """A number with fixed digits, or nothing for a missing one."""
    return f"{value:.{digits}f}" if is_number(value) else ""


def percent(value: float | None) -> str:
    return f"{100 * value:.0f}%" if is_number(value) else ""


def percent_interval(interval: Sequence[float | None] | None) -> str:
    low, high = interval or (None, None)
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def steps_text(row: dict[str, Any]) -> str:
    return f"{row['steps']} step{'' if row['steps'] == 1 else 's'}"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 12 ms, 3.4 s, 5 min 07 s."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
