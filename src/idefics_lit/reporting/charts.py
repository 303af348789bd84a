"""Curves and a histogram as plain SVG: where everything goes. The markup is in report.html.jinja."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 8, 200
"""Of the plot in a chart of ``WIDTH`` x ``HEIGHT``; the rest is for the axes' numbers."""

Points = Sequence[tuple[float, float]]


class Axis:
    """From values to places, numbered by round numbers.

    Args:
        values: what must have room.
        start: the place of the lowest.
        stop: the place of the highest.
        whole: number it with whole numbers only.
        tight: end at the values and not at the numbers around them.
    """

    def __init__(
        self, values: Sequence[float], start: float, stop: float, *, whole: bool = False, tight: bool = False
    ) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = min(low, 0), high or 1
        numbers = [*map(float, MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high))]
        self.low, self.high = (low, high) if tight else (numbers[0], numbers[-1])
        self.start, self.stop = start, stop
        self.ticks = [(self.place(number), f"{number:,.6g}") for number in numbers if self.low <= number <= self.high]

    def place(self, value: float) -> float:
        """Return where a value goes, to a hundredth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 2)


class Line(NamedTuple):
    """A curve of a chart.

    Attributes:
        style: its CSS class.
        name: in the legend; a line without one only accompanies another.
        points: x and y of each.
    """

    style: str
    name: str
    points: Points


class Chart:
    """Curves over steps.

    Args:
        title: what is shown.
        last: the last step.
        lines: by CSS class, the name of each and its points.
        values: what the vertical axis must have room for besides.
    """

    def __init__(
        self, title: str, last: int, lines: Mapping[str, tuple[str, Points]], values: Sequence[float] = (0,)
    ) -> None:
        self.title = title
        finite = {style: (name, [(x, y) for x, y in points if isfinite(y)]) for style, (name, points) in lines.items()}
        every = [point for _, points in finite.values() for point in points]
        self.x = Axis([0, last, *(x for x, _ in every)], LEFT, RIGHT, whole=True, tight=True)
        self.y = Axis([*values, *(y for _, y in every)], BOTTOM, TOP)
        self.lines = [
            Line(style, name, [(self.x.place(x), self.y.place(y)) for x, y in points])
            for style, (name, points) in finite.items()
            if points
        ]


class Bar(NamedTuple):
    """A bar of a histogram: its CSS class, its rectangle, and what it says."""

    style: str
    x: float
    y: float
    width: float
    height: float
    says: str


class Histogram:
    """How many questions have which score, in tenths; those that are right are a bar of their own.

    Args:
        scores: from 0 to 1, by CSS class, whose bars stand side by side.
    """

    def __init__(self, scores: Mapping[str, Sequence[float]]) -> None:
        counts = {style: [0] * 11 for style in scores}
        for style, some in scores.items():
            for score in some:
                counts[style][int(score * 10 + 1e-9)] += 1
        self.y = Axis([0, *(count for some in counts.values() for count in some)], BOTTOM, TOP, whole=True)
        slot = (RIGHT - LEFT) / 11
        width = round(0.8 * slot / max(len(counts), 1), 2)
        labels = [*(f"{tenth / 10:.1f}" for tenth in range(10)), "1"]
        self.labels = [(round(LEFT + slot * (tenth + 0.5), 2), label) for tenth, label in enumerate(labels)]
        self.bars = [
            Bar(
                style,
                round(LEFT + slot * (tenth + 0.1) + width * number, 2),
                self.y.place(count),
                width,
                round(BOTTOM - self.y.place(count), 2),
                f"{count} questions with a score " + ("of 1" if tenth == 10 else f"from {labels[tenth]}"),
            )
            for number, (style, some) in enumerate(counts.items())
            for tenth, count in enumerate(some)
            if count
        ]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Return the means over a twentieth of the points, around each."""
    reach = len(points) // 40
    values = [y for _, y in points]
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
