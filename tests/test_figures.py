"""The report's figures: what they show, in the page's colours, whatever the classes are called."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

figures = pytest.importorskip("ddb_fast.figures", reason="needs matplotlib")

SCORE = np.array([-0.5] * 40 + [0.2] * 50 + [2.0] * 6 + [9.0, 40.0, 180.0, 200.0])
HOSTILE = ["<script>x</script>", "$x^{2$", "a\"b'c & d", "a\nb\u202eexe", "漢字", "x" * 200]


def texts(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]


def all_figures(classes=("a", "b", "c")):
    histogram = {"train": [0, 3, 5, 2], "held_out": [1, 2, 2, 0], "generated": [4, 0, 2, 1]}
    counts = np.arange(len(classes) ** 2).reshape(len(classes), -1)
    return [
        figures.scores(SCORE, SCORE > 3, 3.0),
        figures.confusion(counts, classes),
        figures.curve([[(64, 2.0), (128, 0.5)], [(64, 1.0)]], "erm", "curve0"),
        figures.nearness(histogram, 0.5),
    ]


def test_colours_are_the_pages_and_ids_belong_to_one_figure():
    seen = set()
    for svg in all_figures():
        # Of colours only variables and `none` are left, so that one figure serves both schemes.
        colours = re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)
        assert {c for c in colours if not re.fullmatch(r"var\(--[a-z]+\)|none", c)} == set()
        assert {"var(--ink)"} <= set(colours)
        ids = re.findall(r' id="([^"]+)"', svg)
        used = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
        assert set(ids) == set(used) and len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
        assert "<style" not in svg and "metadata" not in svg and "http" not in svg
    assert all_figures() == all_figures(), "the same figure every time"


def bars(svg, colour):
    """Heights of the bars of a colour, as the share of the largest, of which the axis is linear."""
    found = []
    for element in ElementTree.fromstring(svg).iter("path"):
        if f"fill: {colour}" in (element.get("style") or "") and element.get("clip-path"):
            points = [
                tuple(map(float, p.split()))
                for p in re.split("[MLz]", element.get("d"))
                if p.strip()
            ]
            xs, ys = zip(*points, strict=True)
            found.append((min(xs), max(xs), max(ys) - min(ys)))
    return [bar for bar in found if bar[2] > 0]


def test_the_histogram_parts_flagged_images_and_marks_the_threshold():
    svg = figures.scores(SCORE, SCORE > 3, 3.0)
    assert len(bars(svg, "var(--typical)")) == 3 and len(bars(svg, "var(--odd)")) == 4
    left = max(bar[1] for bar in bars(svg, "var(--typical)"))
    assert min(bar[0] for bar in bars(svg, "var(--odd)")) > left
    assert {"threshold 3", "flagged", "not flagged", "0", "10", "100"} <= set(texts(svg))
    assert "100 images, 4 of them flagged" in svg
    assert "threshold 3" not in texts(figures.scores(SCORE, SCORE > 3, None))
    # Nothing is written over the bars or the threshold's line, wherever they are.
    near = ElementTree.fromstring(figures.scores(SCORE.clip(max=5), SCORE > 3, 3.0))
    line = next(e for e in near.iter("path") if "dasharray" in (e.get("style") or ""))
    top = min(float(y) for y in re.findall(r"[ML] \S+ (\S+)", line.get("d")))
    legend = [float(e.get("y")) for e in near.iter("text") if e.text.endswith(("flagged", "d 3"))]
    assert len(legend) == 3 and max(legend) < top
    # One value, or none flagged, is a histogram too.
    assert bars(figures.scores(np.zeros(5), np.zeros(5, bool), 3.0), "var(--odd)") == []


def picture(svg):
    """The pixels of the confusion picture, (K, K, 4)."""
    import base64
    import io

    from PIL import Image

    data = re.search(r'href="data:image/png;base64,([^"]+)"', svg)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_the_confusion_picture_is_darkest_where_most_of_a_row_is_mistaken():
    counts = np.array([[90, 10, 0], [1, 9, 0], [2, 0, 2]])
    svg = figures.confusion(counts, ["cats", "dogs", "owls"])
    alpha = picture(svg)[..., 3].astype(int)
    off = ~np.eye(3, dtype=bool)
    assert (alpha[off] > 0).tolist() == (counts[off] > 0).tolist()
    share = counts / counts.sum(1, keepdims=True)
    assert alpha[2, 0] == alpha[off].max()
    # 10 of 100 and 1 of 10 are the same share, a fifth of 2 of 4; the alpha is its root.
    assert alpha[0, 1] == alpha[1, 0]
    assert alpha[0, 1] / alpha[2, 0] == pytest.approx((share[0, 1] / share[2, 0]) ** 0.5, abs=0.01)
    # Top to bottom the labels, left to right the predictions, with the numbers that are not 0.
    assert texts(svg)[:3] == ["cats", "dogs", "owls"]
    assert sorted(t for t in texts(svg) if t.isdigit()) == sorted(map(str, counts[counts > 0]))


@pytest.mark.parametrize("number", [2, 10, 26, 100])
def test_the_confusion_picture_is_readable_for_any_number_of_classes(number):
    counts = np.full((number, number), 3) + 50 * np.eye(number, dtype=int)
    svg = figures.confusion(counts, [f"class {i}" for i in range(number)])
    assert picture(svg).shape == (number, number, 4)
    assert len([t for t in texts(svg) if t.startswith("class ")]) == 2 * number
    assert ("53" in texts(svg)) == (number <= figures.NUMBERED)
    width = int(re.search(r"width:(\d+)px", svg)[1])
    # Matplotlib 3.9 writes all of a font in one: font: 9px 'DejaVu Sans'.
    size = min(float(s) for s in re.findall(r"font(?:-size)?: ([\d.]+)px", svg))
    box = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert size * width / box >= 7.9, "pixels of the smallest letters"
    assert len(svg) < 150_000


def test_a_set_without_mistakes_has_an_empty_picture():
    alpha = picture(figures.confusion(5 * np.eye(4, dtype=int), list("abcd")))[..., 3]
    assert (alpha[~np.eye(4, dtype=bool)] == 0).all() and (alpha.diagonal() > 0).all()


def test_numbers_are_readable_on_every_cell_in_both_schemes():
    from test_report import contrast, schemes

    heat = [round(255 * c) for c in figures._HEAT]
    for colours in schemes():
        page = [int(colours["page"][i : i + 2], 16) for i in (1, 3, 5)]
        for top, alpha in ((heat, 0.65), ([128] * 3, 0.35)):
            mixed = [round(alpha * t + (1 - alpha) * p) for t, p in zip(top, page, strict=True)]
            assert contrast(colours["ink"], "#" + bytes(mixed).hex()) >= 4.5


def test_names_of_classes_are_text_and_nothing_else():
    counts = np.ones((len(HOSTILE), len(HOSTILE)), dtype=int)
    svg = figures.confusion(counts, HOSTILE)
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} <= {
        "svg", "g", "path", "text", "image", "defs", "clipPath", "rect", "use",
    }  # fmt: skip
    assert not [k for element in root.iter() for k in element.attrib if k.startswith("on")]
    shown = texts(svg)
    assert {"<script>x</script>", "$x^{2$", "a\"b'c & d", "a\\nb\\u202eexe", "漢字"} <= set(shown)
    assert "x" * 19 + "…" in shown and max(map(len, shown)) <= figures.LONGEST
    assert "<script>" not in svg


def test_curves_show_every_seed_and_use_plain_numbers():
    svg = figures.curve([[(64, 900.0), (128, 1.0)], [(64, 500.0), (128, 2.0)]], "a $b", "curve7")
    lines = re.findall(r'<path d="([^"]+)"[^>]*fill: none; stroke: var\(--made\)', svg)
    assert len(lines) == 2 and "a $b" in texts(svg)
    assert {"1", "10", "100"} <= set(texts(svg)), "a logarithmic axis"
    assert "math" not in svg
    # A single point of a short training shows as a point.
    assert "<use" in figures.curve([[(64, -1.0)]], "x", "c")
