"""Line charts and a histogram as plain SVG: the coordinates; the markup is in ``report.html.jinja``.

They aren't drawn with matplotlib, since the page shows the values under the pointer and follows the browser's light or
dark theme.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

# Size of a chart and the edges of its plot, in SVG units; tick labels are drawn outside the plot.
WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 8, 200

Points = Sequence[tuple[float, float]]


class Axis:
    """A linear map from values to SVG coordinates, with ticks at round numbers.

    Args:
        values: the values that the axis must cover.
        start: the coordinate of the lowest value.
        stop: the coordinate of the highest value.
        integer: place ticks at integers only.
        tight: end the axis at the lowest and highest value instead of at the next ticks.
    """

    def __init__(
        self, values: Sequence[float], start: float, stop: float, *, integer: bool = False, tight: bool = False
    ) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = min(low, 0), high or 1
        ticks = [*map(float, MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer).tick_values(low, high))]
        self.low, self.high = (low, high) if tight else (ticks[0], ticks[-1])
        self.start, self.stop = start, stop
        self.ticks = [(self.coordinate(tick), f"{tick:,.6g}") for tick in ticks if self.low <= tick <= self.high]

    def coordinate(self, value: float) -> float:
        """Return the coordinate of a value, rounded to a hundredth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 2)


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        css_class: sets its colour.
        name: its name in the legend; a line without a name isn't listed.
        points: its points: (step, value), in a `LineChart` their coordinates.
        values: in a `LineChart` the (step, value) of each point.
    """

    css_class: str
    name: str
    points: Points
    values: Points = ()


class LineChart:
    """Lines, by default over optimizer steps.

    Args:
        title: the title.
        last: the end of the horizontal axis, which starts at 0.
        lines: the lines, whose points are (step, value); points that aren't finite are left out.
        values: further values that the vertical axis must cover.
        x_name: the name of the horizontal axis.
        integer: place its ticks at integers only.
    """

    def __init__(
        self,
        title: str,
        last: float,
        lines: Sequence[Line],
        values: Sequence[float] = (0,),
        *,
        x_name: str = "optimizer step",
        integer: bool = True,
    ) -> None:
        self.title, self.x_name = title, x_name
        finite = [line._replace(points=[(x, y) for x, y in line.points if isfinite(y)]) for line in lines]
        points = [point for line in finite for point in line.points]
        self.x = Axis([0, last, *(x for x, _ in points)], LEFT, RIGHT, integer=integer, tight=True)
        self.y = Axis([*values, *(y for _, y in points)], BOTTOM, TOP)
        self.lines = [
            line._replace(
                points=[(self.x.coordinate(x), self.y.coordinate(y)) for x, y in line.points], values=line.points
            )
            for line in finite
            if line.points
        ]


class Bar(NamedTuple):
    """A bar of a histogram: its colour, its rectangle and its tooltip."""

    css_class: str
    x: float
    y: float
    width: float
    height: float
    tooltip: str


class Histogram:
    """The number of questions by score: ten bins from 0 to below 1, and one for a score of exactly 1.

    Args:
        scores: scores from 0 to 1 by CSS class; the bars of several classes are drawn side by side.
    """

    def __init__(self, scores: Mapping[str, Sequence[float]]) -> None:
        counts = {css_class: [0] * 11 for css_class in scores}
        for css_class, values in scores.items():
            for value in values:
                counts[css_class][int(value * 10 + 1e-9)] += 1
        self.y = Axis([0, *(count for bins in counts.values() for count in bins)], BOTTOM, TOP, integer=True)
        bin_width = (RIGHT - LEFT) / 11
        bar_width = round(0.8 * bin_width / max(len(counts), 1), 2)
        names = [*(f"{tenths / 10:.1f}" for tenths in range(10)), "1"]
        self.labels = [(round(LEFT + bin_width * (i + 0.5), 2), name) for i, name in enumerate(names)]
        self.bars = [
            Bar(
                css_class,
                round(LEFT + bin_width * (i + 0.1) + bar_width * series, 2),
                self.y.coordinate(count),
                bar_width,
                round(BOTTOM - self.y.coordinate(count), 2),
                f"{count} questions with a score " + ("of 1" if i == 10 else f"from {names[i]}"),
            )
            for series, (css_class, bins) in enumerate(counts.items())
            for i, count in enumerate(bins)
            if count
        ]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Return the centred moving average over a twentieth of the points; fewer than 40 points are unchanged."""
    radius = len(points) // 40
    values = [y for _, y in points]
    windows = [values[max(i - radius, 0) : i + radius + 1] for i in range(len(values))]
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
