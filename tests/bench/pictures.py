"""The figures of a run as pictures (SVG) for the README: systems side by side, and how the cost of a token grows."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .scenarios import CPU, Figure
from .system import OURS, STRAIGHT

Series = Mapping[Figure, Sequence[float]]

COMPARISON, GROWTH = Path(__file__).with_name("comparison.svg"), Path(__file__).with_name("growth.svg")
#: What is compared: scenario, metric, unit, title.
_COMPARED = (
    ("low", "added_first_token_p50", "ms", "added time to the first token, ms"),
    ("paced", CPU, "us", "CPU a token, 50 streams at 50/s, us"),
    ("paced", "token_delay_p95", "ms", "delay of a token, 95 of 100, ms"),
    ("burst", CPU, "us", "CPU a token, 16 clients, no gap, us"),
    ("json", "cpu_per_request", "ms", "CPU a request, not streamed, ms"),
    ("most", "streams", "1", "streams at 50/s kept up with"),
    ("idle", "rss_per_stream", "kB", "memory of an idle stream, kB"),
    ("rss", "rss", "MB", "memory after the load, MB"),
)
_OURS, _THEIRS, _INK = "#b5651d", "#7d8597", "#2b2b2b"


def draw(series: Series, comparison: Path = COMPARISON, growth: Path = GROWTH) -> list[Path]:
    """Draw what *series* has enough of; the files that were written."""
    written = []
    panels = [panel for panel in _panels(series) if len(panel[1]) > 1]
    if len({name for _, bars in panels for name, _ in bars}) > 1:
        _compare(panels, comparison)
        written.append(comparison)
    if curves := _curves(series):
        _grow(curves, growth)
        written.append(growth)
    return written


def _panels(series: Series) -> Iterator[tuple[str, list[tuple[str, Sequence[float]]]]]:
    for scenario, metric, unit, title in _COMPARED:
        # The bare engine's own cost is no price of a system in front of it, but what can be kept up with at best.
        bars = [
            (figure.system, values)
            for figure, values in series.items()
            if (figure.scenario, figure.metric, figure.unit) == (scenario, metric, unit)
            and (figure.system != STRAIGHT or scenario == "most")
        ]
        yield title, bars


def _plotting() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    # The same figures make the same file: no date, no random ids.
    mpl.rcParams |= {"svg.hashsalt": "capibara", "svg.fonttype": "none", "font.size": 9, "text.color": _INK, "axes.edgecolor": "#c8c8c8"}
    from matplotlib import pyplot

    return pyplot


def _compare(panels: Sequence[tuple[str, list[tuple[str, Sequence[float]]]]], path: Path) -> None:
    pyplot = _plotting()
    columns = 2
    rows = -(-len(panels) // columns)
    height = max(len(bars) for _, bars in panels) * 0.26 + 0.55
    figure, axes = pyplot.subplots(rows, columns, figsize=(9, rows * height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, bars) in zip(axes.flat, panels, strict=False):
        names = [name for name, _ in bars]
        medians = [statistics.median(values) for _, values in bars]
        spans = [
            [m - min(v) for m, (_, v) in zip(medians, bars, strict=True)],
            [max(v) - m for m, (_, v) in zip(medians, bars, strict=True)],
        ]
        colours = [_OURS if name in OURS else _THEIRS for name in names]
        axis.barh(names, medians, xerr=spans, color=colours, error_kw={"ecolor": _INK, "elinewidth": 0.8, "capsize": 2})
        top = max(max(values) for _, values in bars) or 1
        for row, (median, (_, values)) in enumerate(zip(medians, bars, strict=True)):
            axis.text(max(values) + top * 0.02, row, f"{median:,.0f}" if median >= 100 else f"{median:.3g}", va="center")
        axis.set_xlim(0, top * 1.18)
        axis.set_title(title, loc="left", fontsize=9)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _curves(series: Series) -> dict[str, dict[str, list[tuple[int, Sequence[float]]]]]:
    """By axis and system: sizes with their values."""
    found: dict[str, dict[str, list[tuple[int, Sequence[float]]]]] = {}
    for figure, values in series.items():
        if figure.scenario == "growth" and figure.metric.startswith(f"{CPU}@"):
            axis, _, size = figure.metric.partition("@")[2].partition("=")
            found.setdefault(axis, {}).setdefault(figure.system, []).append((int(size), values))
    return found


def _grow(curves: dict[str, dict[str, list[tuple[int, Sequence[float]]]]], path: Path) -> None:
    pyplot = _plotting()
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2), squeeze=False, layout="constrained")
    titles = {"streams": "streams that share 1,000 tokens a second", "tokens": "tokens a turn, 4 clients, no gap"}
    for axis, (name, systems) in zip(axes.flat, curves.items(), strict=True):
        for system, points in systems.items():
            sizes, values = zip(*sorted(points), strict=True)
            axis.plot(sizes, list(map(statistics.median, values)), marker="o", label=system)
            axis.fill_between(sizes, list(map(min, values)), list(map(max, values)), alpha=0.2)
        axis.set(xscale="log", yscale="log", xlabel=titles.get(name, name), ylabel="CPU a token, us")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
