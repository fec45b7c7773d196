"""The report's figures as SVG for one page: its own text, its colours by the page's CSS variables.

Importing this needs matplotlib. Names come from people's folders: nothing in them
is markup or mathematics here.
"""

import io
import warnings
from collections.abc import Sequence
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from ddb_fast.report import plain

# What a figure is drawn in; `_svg` replaces each by the variable of the page's style.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--made)",
    "#050505": "var(--odd)",
    "#060606": "var(--typical)",
}
INK, SOFT, LINE, MADE, ODD, TYPICAL = _VARIABLES
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ddb_fast",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "legend.frameon": False,
}
_HEAT = (0.91, 0.35, 0.05)
LONGEST = 20
"""Characters of a class's name beside the confusion picture."""
NUMBERED = 25
"""Classes up to which a cell of the confusion picture holds its number."""


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element; ids begin with `name`, so that a page can hold many."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib measures with its own font, which lacks some scripts; the browser's has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            key = key.split("}")[-1]
            if key in ("id", "href", "clip-path"):
                value = value if value.startswith("data:") else _named(value, name)
            elif key == "style":
                for colour, variable in _VARIABLES.items():
                    value = value.replace(colour, variable)
            element.set(key, value)
    used = {
        value.strip("url()").lstrip("#")
        for element in root.iter()
        for key, value in element.attrib.items()
        if key in ("href", "clip-path")
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("style", f"width:{width}px;aspect-ratio:{width}/{height}")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _named(reference: str, name: str) -> str:
    """`x`, `#x` or `url(#x)` with the name put before x."""
    start = len(reference) - len(reference.removeprefix("url(").lstrip("#"))
    return f"{reference[:start]}{name}-{reference[start:]}"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _logarithmic(axes: Axes, steps: Sequence[int]) -> None:
    """A logarithmic y axis with numbers at these steps; matplotlib's own are mathematics."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _line(axes: Axes, x: float, **options) -> None:
    axes.axvline(x, color=INK, linestyle="--", linewidth=1.2, **options)


def scores(score: np.ndarray, flagged: np.ndarray, threshold: float | None) -> str:
    """How many training images have which score (N,); flagged (N,) bool ones in their own colour.

    The axis is linear near 0 and logarithmic far out (asinh), where a few images are very far.
    """
    bend = 3.0
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(4.8, 2.7)
        low, high = (float(np.arcsinh(v / bend)) for v in (score.min(), score.max()))
        edges = bend * np.sinh(np.linspace(low - 0.02, max(high, low + 0.5) + 0.02, 61))
        axes.hist(
            [score[~flagged], score[flagged]],
            bins=edges,
            stacked=True,
            color=[TYPICAL, ODD],
            label=["not flagged", "flagged"],
        )
        axes.set_xscale("asinh", linear_width=bend)
        _logarithmic(axes, (1,))
        axes.set_ylim(bottom=0.7)
        near = [1.0, 3.0] if edges[-1] < 30 else [3.0]
        far = [sign * t for t in (*near, *(10.0**e for e in range(1, 8))) for sign in (-1, 1)]
        ticks = sorted(t for t in (0.0, *far) if edges[0] <= t <= edges[-1])
        axes.set_xticks(ticks, labels=[f"{t:,.0f}" for t in ticks])
        axes.set_xticks([], minor=True)
        if threshold is not None:
            _line(axes, threshold, label=f"threshold {threshold:g}")
        axes.set(xlabel="score: how far an image is at odds with its class", ylabel="images")
        # Above the axes: bars and the threshold may be anywhere within.
        figure.legend(loc="outside upper right", ncols=3)
        label = (
            f"Histogram of the scores of {len(score)} images, {int(flagged.sum())} of them flagged"
        )
        return _svg(figure, "scores", label)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Rows: the label, columns: what the amplifier takes the image for; counts (K, K).

    The darker a cell, the larger its share of the row. The diagonal is grey.
    """
    number = len(classes)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    off = share * ~np.eye(number, dtype=bool)
    heat = np.zeros((number, number, 4))
    heat[..., :3] = _HEAT
    # Of the square root, so that a few images of a class still show.
    heat[..., 3] = 0.65 * np.sqrt(off / max(off.max(), 1e-12))
    diagonal = np.arange(number)
    heat[diagonal, diagonal] = [(0.5, 0.5, 0.5, 0.35 * s) for s in share[diagonal, diagonal]]
    cell = min(0.9, max(0.14, 5.0 / number))
    names = [_short(name) for name in classes]
    margin = 0.75 + 0.075 * max(map(len, names))
    with matplotlib.rc_context(_STYLE):
        size = min(9.0, max(6.0, 60 * cell))
        figure, axes = _axes(number * cell + margin, number * cell + margin)
        axes.imshow((255 * heat).round().astype(np.uint8), interpolation="none")
        turn = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(diagonal, labels=names, rotation=turn, fontsize=size)
        axes.set_yticks(diagonal, labels=names, fontsize=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color(LINE)
        axes.set_xlabel("taken for")
        axes.set_ylabel("labelled")
        if number <= NUMBERED:
            for row, column in np.argwhere(counts > 0).tolist():
                text = str(int(counts[row, column]))
                fits = min(9.0, 80 * cell / len(text))
                axes.text(column, row, text, ha="center", va="center", fontsize=fits)
        return _svg(figure, "confusion", f"Labels against predictions of {number} classes")


def curve(lines: Sequence[Sequence[tuple[float, float]]], title: str, name: str) -> str:
    """A panel of losses over the images seen, a line a seed; (images, loss) points."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.2, 2.0)
        for points in lines:
            images, loss = zip(*points, strict=True)
            axes.plot(images, loss, color=MADE, marker="." if len(points) < 40 else None, lw=1.2)
        values = [loss for points in lines for _, loss in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            _logarithmic(axes, (1, 2, 5))
        axes.set_xlim(left=0)
        axes.set_title(plain(title))
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y", linewidth=0.5)
        return _svg(figure, name, f"Loss of {plain(title)} over the images seen")


def nearness(histogram: dict[str, list[int]], width: float) -> str:
    """Shares of generated, held-out and training images over the ratio in limits of its class."""
    looks = {
        "train": ("training images, to one another", SOFT, ":"),
        "held_out": ("held-out images", TYPICAL, "--"),
        "generated": ("generated images", MADE, "-"),
    }
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(4.8, 2.5)
        for kind, (label, colour, style) in looks.items():
            bins = np.array(histogram.get(kind, []), dtype=float)
            if bins.sum() > 0:
                edges = width * np.arange(len(bins) + 1)
                share = 100 * bins / bins.sum()
                axes.stairs(share, edges, color=colour, linestyle=style, lw=1.5, label=label)
        _line(axes, 1)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate("limit", (1, 1), xytext=(4, -2), va="top", **place)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.4 * axes.dataLim.ymax)  # room for the legend
        axes.set(xlabel="distance to the nearest training image, 1 = the limit", ylabel="images, %")
        axes.legend(loc="upper right")
        return _svg(figure, "nearness", "Histogram of distances to the nearest training image")
