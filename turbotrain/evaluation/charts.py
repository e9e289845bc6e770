"""Inline SVG charts for the report: no scripts, no libraries, colours from CSS classes so that dark mode needs no second drawing.

Every function returns a complete `<svg>` string that scales to its container. Classes `s-NAME` colour a series (see
`report_style.CSS`); text inherits the page's font.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Points of one line.

    Attributes:
        name: legend text. css: class suffix that carries the colour.
        intervals: (low, high) a point, drawn as whiskers; empty for none.
        dashed: a reference rather than a result. dotted: with a dot at every point.
    """

    name: str
    css: str
    xs: Sequence[float]
    ys: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = ()
    dashed: bool = False
    dotted: bool = True


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `text` is printed behind the bar, `note` in grey after it."""

    label: str
    value: float
    css: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class _Frame:
    """Plot area and scales of one chart, in the units of its view box."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            value, low, high = (math.log10(max(number, 1e-300)) for number in (value, low, high))
        share = (value - low) / ((high - low) or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def steps_chart(
    series: Sequence[Series], reference: tuple[str, float] | None, y_label: str, floor: tuple[str, float] | None
) -> str:
    """A score against the number of sampling steps (evenly spaced by rank), with whiskers.

    Args:
        reference: name and score of the teacher: a dashed line across.
        floor: name and score of chance: a dotted line across.
    """
    steps = sorted({x for one in series for x in one.xs})
    rank = {step: float(index) for index, step in enumerate(steps)}
    frame = _Frame(540, 320, 46, 132, 14, 40, (-0.35, len(steps) - 0.65), (0.0, 1.0))
    parts = _y_grid(frame, [0, 0.2, 0.4, 0.6, 0.8, 1.0], lambda value: f"{value:.1f}")
    for step in steps:
        label = f"{step:g} step{'s' if step != 1 else ''}"
        parts.append(_text(frame.x(rank[step]), frame.height - frame.bottom + 18, label, "middle"))
    parts.append(
        _text(12, frame.top + (frame.height - frame.top - frame.bottom) / 2, y_label, "middle", "axis", rotate=True)
    )
    labels: list[tuple[float, str, str]] = []
    for mark, css in ((reference, "reference"), (floor, "floor")):
        if mark is not None:
            y = frame.y(mark[1])
            parts.append(_horizontal(frame, y, css))
            labels.append((y, mark[0], "muted"))
    spread = 0.045
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * spread  # whiskers side by side, not on top of one another
        parts += _marks(frame, one, [frame.x(rank[x] + shift) for x in one.xs], labels)
    parts += _names(frame, labels)
    return _svg(frame.width, frame.height, parts, f"{y_label} by number of sampling steps")


def scatter_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    reference: tuple[str, float] | None = None,
) -> str:
    """Scores against costs on a logarithmic axis, points of a series joined, with whiskers.

    Args:
        x_ticks: costs that are labelled; the axis reaches from the first to the last.
        reference: name and score of a dashed line across.
    """
    ys = [y for one in series for y in one.ys if math.isfinite(y)] + ([reference[1]] if reference else [])
    if not ys or len(x_ticks) < 2:
        return ""
    ends = [end for one in series for interval in one.intervals if interval is not None for end in interval]
    ticks = _linear_ticks(max(0.0, min([*ys, *ends]) - 0.02), max([*ys, *ends]), 5)
    exponents = [math.log10(tick) for tick in x_ticks]
    margin = 0.06 * (exponents[-1] - exponents[0])
    frame = _Frame(640, 340, 50, 168, 14, 44, (exponents[0] - margin, exponents[-1] + margin), (ticks[0], ticks[-1]))
    parts = _y_grid(frame, ticks, _short)
    for tick, exponent in zip(x_ticks, exponents):
        parts.append(_text(frame.x(exponent), frame.height - frame.bottom + 18, _short(tick), "middle"))
    parts.append(_text(frame.x(sum(exponents[:: len(exponents) - 1]) / 2), frame.height - 8, x_label, "middle", "axis"))
    parts.append(_text(12, frame.height / 2 - 14, y_label, "middle", "axis", rotate=True))
    labels: list[tuple[float, str, str]] = []
    if reference is not None:
        parts.append(_horizontal(frame, frame.y(reference[1]), "reference"))
        labels.append((frame.y(reference[1]), reference[0], "muted"))
    for one in series:
        parts += _marks(frame, one, [frame.x(math.log10(x)) for x in one.xs], labels)
    parts += _names(frame, labels)
    return _svg(frame.width, frame.height, parts, f"{y_label} by {x_label}")


def _marks(frame: _Frame, one: Series, at: Sequence[float], labels: list[tuple[float, str, str]]) -> list[str]:
    """A series as whiskers, line and dots; its name is added to `labels` beside its last dot. at: the abscissas of its points."""
    parts = []
    for x, interval in zip(at, one.intervals):
        if interval is not None:
            low, high = (frame.y(min(frame.y_range[1], max(frame.y_range[0], end))) for end in interval)
            parts.append(
                f'<line class="whisker s-{one.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
    points = sorted(((x, frame.y(y), y) for x, y in zip(at, one.ys) if math.isfinite(y)), key=lambda point: point[0])
    parts.append(_polyline([(x, y) for x, y, _ in points], one.css, one.dashed))
    for x, y, value in points if one.dotted else ():
        tip = f"<title>{_escape(one.name)}: {value:.3f}</title>"
        parts.append(f'<circle class="dot s-{one.css}" cx="{x:.1f}" cy="{y:.1f}" r="4">{tip}</circle>')
    if points:
        labels.append((points[-1][1], one.name, f"s-{one.css}"))
    return parts


def _names(frame: _Frame, labels: Sequence[tuple[float, str, str]]) -> list[str]:
    """Labels (ordinate, text, class) to the right of the plot."""
    spread = _spread_labels(labels, frame.top + 4, frame.height - frame.bottom)
    return [_text(frame.width - frame.right + 8, y + 4, name, "start", f"label {css}") for y, name, css in spread]


def standalone(svg: str, css: str) -> str:
    """A chart as a file of its own, for pages that show it as an image."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f"><style>{css}</style>", 1)


def curve_chart(series: Sequence[Series], x_label: str = "step", y_label: str = "loss") -> str:
    """Loss curves: the raw values faintly, a centred moving average on top; logarithmic where they span over a decade."""
    kept = [_finite(one) for one in series]
    kept = [one for one in kept if one.xs]
    values = [y for one in kept for y in one.ys]
    if not values:
        return ""
    low, high = _robust_range(values)
    log_y = low > 0 and high / low > 10
    smooth = [_centred_average(one.ys, log_y) for one in kept]
    ticks = _log_ticks(low, high) if log_y else _linear_ticks(low, high, 4)
    y_range = (min(low, ticks[0]) if log_y else ticks[0], max(high, ticks[-1]) if log_y else ticks[-1])
    xs = [x for one in kept for x in one.xs]
    frame = _Frame(420, 220, 50, 10, 12, 34, (min(xs), max(xs)), y_range, log_y)
    parts = _y_grid(frame, ticks, _short)
    for tick in _linear_ticks(min(xs), max(xs), 4):
        if min(xs) <= tick <= max(xs):
            parts.append(_text(frame.x(tick), frame.height - 18, _short(tick), "middle"))
    parts.append(_text(frame.width - frame.right, frame.height - 4, x_label, "end", "axis"))
    clip = f"c{abs(hash((tuple(xs[:3]), len(xs), values[0]))) % 10**8}"
    across, down = frame.width - frame.left - frame.right, frame.height - frame.top - frame.bottom
    inner = f'x="{frame.left}" y="{frame.top}" width="{across}" height="{down}"'
    parts.append(f'<clipPath id="{clip}"><rect {inner}/></clipPath><g clip-path="url(#{clip})">')
    for one, averaged in zip(kept, smooth):
        raw = _thin([(frame.x(x), frame.y(y)) for x, y in zip(one.xs, one.ys)], 600)
        parts.append(_polyline(raw, one.css, False, "raw"))
        parts.append(
            _polyline(_thin([(frame.x(x), frame.y(y)) for x, y in zip(one.xs, averaged)], 300), one.css, False)
        )
    parts.append("</g>")
    return _svg(frame.width, frame.height, parts, f"{y_label} by {x_label}")


def bar_chart(bars: Sequence[Bar], log: bool = False, title: str = "", label_width: float = 150.0) -> str:
    """Horizontal bars, each with its value printed behind it; a logarithmic axis where the values span decades."""
    if not bars:
        return ""
    row, left, right = 26.0, label_width, 118.0
    width, height = 540.0, row * len(bars) + 8
    finite = [bar.value for bar in bars if math.isfinite(bar.value) and bar.value > 0]
    high = max(finite, default=1.0)
    low = min(finite, default=1.0) / 2 if log else 0.0
    parts: list[str] = []
    for index, bar in enumerate(bars):
        y = 4 + index * row
        if not math.isfinite(bar.value):
            share = 1.0
        elif log:
            share = math.log(max(bar.value, low) / low) / math.log(high / low) if high > low else 1.0
        else:
            share = max(0.0, bar.value) / high
        length = max(2.0, share * (width - left - right))
        parts.append(_text(left - 10, y + 17, bar.label, "end", "barlabel"))
        shape = f'x="{left}" y="{y + 4:.1f}" width="{length:.1f}" height="{row - 8:.0f}" rx="2"'
        parts.append(f'<rect class="bar s-{bar.css}" {shape}/>')
        note = f' <tspan class="muted">{_escape(bar.note)}</tspan>' if bar.note else ""
        parts.append(
            f'<text class="barvalue" x="{left + length + 7:.1f}" y="{y + 17:.1f}">{_escape(bar.text)}{note}</text>'
        )
    return _svg(width, height, parts, title or "bar chart")


def dot_grid(
    columns: Sequence[str],
    rows: Sequence[str],
    values: dict[tuple[int, int], float],
    unit: str,
    before: dict[tuple[int, int], float] | None = None,
) -> str:
    """One strip a row: dots at the values of its columns on a shared axis, for many small numbers (SQNR of every layer).

    Args:
        values: by (row, column). before: hollow dots of the same places, for instance without smoothing.
    """
    before = before or {}
    finite = [value for value in (*values.values(), *before.values()) if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    ticks = _linear_ticks(low - margin, high + margin, 5)
    row_height, left, right = 24.0, 124.0, 16.0
    width, height = 620.0, row_height * len(rows) + 40
    span = (ticks[-1] - ticks[0]) or 1.0

    def at(value: float) -> float:
        return left + (value - ticks[0]) / span * (width - left - right)

    parts: list[str] = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" y2="{height - 34:.1f}"/>')
        parts.append(_text(at(tick), height - 18, _short(tick), "middle"))
    parts.append(_text(width - right, height - 4, unit, "end", "axis"))
    for i, name in enumerate(rows):
        y = 4 + (i + 0.5) * row_height
        parts.append(_text(left - 12, y + 4, name, "end", "barlabel"))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for marks, css, note in ((before, "hollow", ", not smoothed"), (values, "ghost", "")):
            for j, column in enumerate(columns):
                value = marks.get((i, j), math.nan)
                if math.isfinite(value):
                    tip = f"<title>{_escape(f'{column} {name}{note}: {value:.1f} {unit}')}</title>"
                    parts.append(
                        f'<circle class="dot s-turbo {css}" cx="{at(value):.1f}" cy="{y:.1f}" r="4.5">{tip}</circle>'
                    )
    return _svg(width, height, parts, f"{unit} by layer")


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_escape(title)}">{body}</svg>'


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick", rotate: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if rotate else ""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{_escape(text)}</text>'


def _polyline(points: Sequence[tuple[float, float]], css: str, dashed: bool, extra: str = "") -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line s-{css}{" dashed" if dashed else ""} {extra}" points="{path}"/>'


def _horizontal(frame: _Frame, y: float, css: str) -> str:
    return f'<line class="{css}" x1="{frame.left}" x2="{frame.width - frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _y_grid(frame: _Frame, ticks: Sequence[float], label: Callable[[float], str]) -> list[str]:
    parts: list[str] = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(_horizontal(frame, y, "grid"))
        parts.append(_text(frame.left - 8, y + 4, label(tick), "end"))
    return parts


def _spread_labels(labels: Sequence[tuple[float, str, str]], low: float, high: float) -> list[tuple[float, str, str]]:
    """Labels moved apart to at least 15 units, kept in order and as near their lines as that allows."""
    gap = 15.0
    ordered = sorted(labels)
    ys = [max(low, y) for y, _, _ in ordered]
    for index in range(1, len(ys)):
        ys[index] = max(ys[index], ys[index - 1] + gap)
    if ys and ys[-1] > high:
        ys[-1] = high
        for index in range(len(ys) - 2, -1, -1):
            ys[index] = min(ys[index], ys[index + 1] - gap)
    return [(max(low, y), name, css) for y, (_, name, css) in zip(ys, ordered)]


def _finite(one: Series) -> Series:
    kept = [(x, y) for x, y in zip(one.xs, one.ys) if math.isfinite(y)]
    return Series(one.name, one.css, [x for x, _ in kept], [y for _, y in kept])


def _centred_average(values: Sequence[float], log: bool) -> list[float]:
    """Mean over a window of a thirtieth of the points around each (geometric where the axis is logarithmic): no lag."""
    half = len(values) // 60
    numbers = [math.log(max(value, 1e-300)) for value in values] if log else list(values)
    sums = [0.0]
    for number in numbers:
        sums.append(sums[-1] + number)
    means: list[float] = []
    for index in range(len(numbers)):
        reach = min(half, index, len(numbers) - 1 - index)
        means.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return [math.exp(mean) for mean in means] if log else means


def _robust_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of all but the most extreme percent, so that one spike does not flatten a curve."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[-1 - cut]
    return (low, high) if high > low else (low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    span = (high - low) or 1.0
    raw = span / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, (last - first) // 5)
    powers = [10.0**exponent for exponent in range(first, last + 1, step)]
    inside = [power for power in powers if low * 0.999 <= power <= high * 1.001]
    if len(inside) >= 2:
        return inside
    finer = [digit * 10.0**exponent for exponent in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in finer if low * 0.7 <= tick <= high * 1.4] or [low, high]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-2:
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
        return text.replace("-", "\N{MINUS SIGN}") if value < 0 else text.replace("e-", "e\N{MINUS SIGN}")
    return f"{value:g}"


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    if len(points) <= most:
        return list(points)
    step = len(points) / most
    return [points[int(index * step)] for index in range(most)] + [points[-1]]


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
