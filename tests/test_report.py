"""report.html: what it shows, that nothing in a file's name can break it, and how it looks."""

import base64
import csv
import html
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import small
from ddb_fast import checkpoint, report
from ddb_fast.data.digits import digits
from ddb_fast.data.store import ImageData, Split
from ddb_fast.memorisation import check_memorisation
from ddb_fast.metrics import summarise, wilson_interval
from ddb_fast.opinions import AT_ODDS
from ddb_fast.presets import PRESETS
from ddb_fast.trackers import read_log

HOSTILE = [
    "\"><script>document.title='owned'</script>.png",
    "' onerror='document.title=1' x='.png",
    "<img src=x onerror=document.title=1>.png",
    "a\nb\tc\u202egnp.exe",
    "{{ 7 * 7 }}{% raw %}.png",
    "</figcaption></main><style>*{display:none}</style>.png",
    "ü 漢字 😀 &lt;b&gt; &amp;.png",
    "x" * 200 + ".png",
    "javascript:document.title=1",
]
CLASSES = ('cats "and" <b>', "$x^{2$ 'dogs'", "owls\n</main>")


class Page(HTMLParser):
    """Elements with their attributes and text, and that every element is closed where it should."""

    VOID = frozenset({"meta", "img", "br", "input", "link"})

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in self.VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open[-1][0] == tag
        if tag in ("td", "th", "span"):
            self.handle_data(" ")
        self._open.pop()

    def handle_data(self, data):
        for _, number in self._open:
            self.elements[number][2].append(data)

    def all(self, tag, **wanted):
        """The attributes of every such element, and its text, white space as one blank."""
        return [
            attributes | {"text": " ".join("".join(text).split())}
            for name, attributes, text in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]


def split_of(y, paths, size=16, a=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(y), size, size, 3), generator=generator).byte()
    y = torch.tensor(y)
    return Split(paths=tuple(paths), y=y, a=a, small=images, large=images)


def planted(folder, *, classes=CLASSES, per_class=20, size=16, paths=None, train=None):
    """A run's folder whose scores are known: image i of class c has i - 10 + c / 10 / 100.

    The four highest of class 0, two of class 1 and none of class 2 are flagged.
    """
    count = len(classes)
    y = [c for c in range(count) for _ in range(per_class)]
    paths = paths or [f"train/{c}/{i}.png" for i, c in enumerate(y)]
    train = train or split_of(y, paths, size)
    data = ImageData(
        name="pets", classes=tuple(classes), biases=None, splits={"train": train}, fingerprint=""
    )
    config = replace(PRESETS["digits"](), out=str(folder), methods=("erm", "ddb-i"), seeds=(0, 1))
    flagged = {0: 4, 1: 2}
    rows = [("index", "split", "path", "y", "predicted", "loss", "probability_y", "score",
             "pseudo_conflicting")]  # fmt: skip
    for i, label in enumerate(y):
        rank = i % per_class
        odd = rank >= per_class - flagged.get(label, 0)
        taken = (label + 1 + rank % 2) % count if odd else label
        score = rank - 10 + label / 1000
        rows.append((i, "train", paths[i], label, taken, 0.5, 0.6, score, int(odd)))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    checkpoint.write_atomically(folder / "amplifier" / "scores.csv", text.getvalue())
    generated = torch.randint(0, 256, (count * 10, 3, size, size)).byte()
    tensors = {"images": generated, "labels": torch.arange(count).repeat(10)}
    checkpoint.save_tensors(folder / "synthetic" / "images.safetensors", tensors, {})
    (folder / "manifest.json").write_text(json.dumps({
        "command": ["ddb-fast", "run", "a <b> & 'c'"], "device": "1 x cpu (x86_64), 2 threads",
        "versions": {"torch": "2.13"},
    }))  # fmt: skip
    records = [("diffusion", 640 * i, 2.0 / i) for i in range(1, 40)]
    records += [(f"{m} seed {s}", 640, 0.5) for m in ("erm", "ddb-i") for s in (0, 1)]
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"time": i, "stage": stage, "images": images, "loss": loss}) + "\n"
        for i, (stage, images, loss) in enumerate(records)
    ))  # fmt: skip
    return config, data


def results_of(groups=3, **changes):
    def method(shift):
        rows = []
        for g in range(groups):
            share = (g + shift) % groups / groups
            low, high = wilson_interval(share * 40, 40)
            rows.append({"name": f"y={g} a=<b>", "y": g, "a": 0, "n": 40 if g else 0,
                         "accuracy": [share, share] if g else [None, None],
                         "low": low if g else None, "high": high if g else None})  # fmt: skip
        return {"metrics": {"average_accuracy": summarise([0.5, 0.6])}, "groups": rows}

    return {
        "format": 1, "dataset": "pets", "preset": "digits", "split": "test", "selection": "last",
        "seeds": [0, 1], "methods": {"erm": method(0), "ddb-i": method(1)},
        "synthetic": {"count": 30, "aligned_share": None, "aligned_by": None},
        "amplifier": {"auroc": None}, "real_amplifier": None,
        "seconds": {"data": 1.0, "diffusion": 12.48, "erm/seed0": 2.0}, **changes,
    }  # fmt: skip


def written(folder, config, data, results=None):
    report.write(folder, config, data, results or results_of())
    text = (folder / "report.html").read_text("utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of everything, of images whose names attack it."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = [f"{i % 20}/{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(60)]
    config, data = planted(folder, paths=paths)
    verdict = {
        "found": True, "sentences": ["One <b>.", "Two.", "Three.", "Four."],
        "checks": [{"name": "same", "question": "Is <i>it</i>?", "value": 0.75, "limit": 0.4,
                    "passed": True}, {"name": "none", "question": "?", "value": None,
                                      "limit": None, "passed": False}],
        "suspicious": {"count": 7, "share": 7 / 60}, "classes": [],
    }  # fmt: skip
    results = results_of(verdict=verdict, memorisation=memorised(paths, flagged=15))
    return folder, *written(folder, config, data, results), results


def memorised(paths, *, flagged=0, held_out=(1, 200), low=0.2):
    pairs = [
        {"synthetic": i, "real": 2 * i, "path": paths[2 * i], "class": CLASSES[0], "flagged":
         i < flagged, "distance": 3.0, "ratio": i / 100, "ratio_limit": 0.5, "feature": 1.0,
         "feature_limit": 2.0} for i in range(20)
    ]  # fmt: skip
    counts = {"total": 30, "compared": 30, "flagged": flagged, "share": flagged / 30, "low": low,
              "high": 0.7}  # fmt: skip
    control = None
    if held_out:
        odd, n = held_out
        interval = wilson_interval(odd, n)
        control = {"split": "val", "total": n, "compared": n, "flagged": odd, "share": odd / n,
                   "low": interval[0], "high": interval[1]}  # fmt: skip
    excess = flagged / 30 > 0.05
    if excess and control and low <= control["high"]:
        excess = None
    bins = {"train": [0, 3, 2], "generated": [2, 1, 0], "held_out": [0, 1, 1]}
    return {
        "level": 0.01, "expected_share": 0.01, "chance_share": 0.05, "excess": excess,
        "generated": counts,
        "held_out": control, "side": 16, "classes_skipped": [CLASSES[2]], "pairs": pairs, "bin":
        0.1, "real": {"total": 60, "compared": 58, "duplicates": 2, "left_out": 0},
        "histograms": {"ratio": bins, "feature": bins},
    }  # fmt: skip


# --- pictures ----------------------------------------------------------------------------------


def pixels(source):
    data = source.removeprefix("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    return torch.from_numpy(np.array(image)).reshape(-1, 3)


def sections(page_text):
    """The parts of the page that show a class each, in their order."""
    return [
        Page(part) for part in re.findall(r'<section class="class".*?</section>', page_text, re.S)
    ]


def test_the_worst_class_comes_first_with_the_extreme_images(tmp_path):
    config, data = planted(tmp_path)
    text, _ = written(tmp_path, config, data)
    shown = sections(text)
    assert [s.all("h2")[0]["text"] for s in shown[:1]] == ['Most affected class: cats "and" <b>']
    assert [s.all("h3")[0]["text"] for s in shown[1:]] == ["$x^{2$ 'dogs'", "owls\\n</main>"]
    tensors, _ = checkpoint.load_tensors(tmp_path / "synthetic" / "images.safetensors")
    for label, part in enumerate(shown):
        images = part.all("img")
        assert len(images) == report.GENERATED + 12
        numbers = [int(i) for i in (tensors["labels"] == label).nonzero()[: report.GENERATED, 0]]
        expected = [tensors["images"][i].permute(1, 2, 0) for i in numbers]
        # Scores rise with the number within a class.
        real = [*range(20 * label, 20 * label + 6), *range(20 * label + 19, 20 * label + 13, -1)]
        expected += [data.splits["train"].small[i] for i in real]
        for image, source in zip(images, expected, strict=True):
            assert torch.equal(pixels(image["src"]), source.reshape(-1, 3))
        paths = [f"train/{label}/{i}.png" for i in real]
        alts = [image["alt"] for image in images[report.GENERATED :]]
        assert all(path in alt for path, alt in zip(paths, alts, strict=True))
        assert [alt.endswith("flagged") for alt in alts] == [False] * 6 + [
            i < {0: 4, 1: 2, 2: 0}[label] for i in range(6)
        ]
    first = shown[0].all("figcaption")
    assert "seen as cats" in first[0]["text"] and "score -10.0" in first[0]["text"]
    assert "looks like owls" in first[6]["text"] and "score 9.0" in first[6]["text"]
    assert [row["text"].split(" ")[0] for row in shown[0].all("tr")[1:]] == [
        f"train/0/{i}.png" for i in (19, 18, 17, 16)
    ]
    assert "4 of 20 training images flagged" in shown[0].all("p")[0]["text"]


def test_of_what_flagged_images_look_like_the_rest_is_counted(tmp_path):
    config, data = planted(tmp_path, classes="abcdef")
    table = tmp_path / "amplifier" / "scores.csv"
    # The flagged ones of class a, numbers 16 to 19, are taken for b, c, d and e.
    rows = [row.split(",") for row in table.read_text().splitlines()]
    for number in range(16, 20):
        rows[1 + number][4] = str(number - 15)
    table.write_text("\n".join(",".join(row) for row in rows) + "\n")
    text, _ = written(tmp_path, config, data)
    first, second = (part.all("p")[0]["text"] for part in sections(text)[:2])
    assert first.endswith("; they look like b (1), c (1), d (1) and others (1)")
    assert second.endswith("; they look like c (1), d (1)")


def test_what_is_taken_for_what_is_listed_the_most_frequent_first(tmp_path):
    config, data = planted(tmp_path)
    text, _ = written(tmp_path, config, data)
    section = Page(re.search(r'<section id="scores">.*?</section>', text, re.S)[0])
    rows = [row["text"] for row in section.all("tr")[1:]]
    # In class 0 numbers 16 and 18 are taken for 1, 17 and 19 for 2; in class 1 one each.
    dogs, owls = "$x^{2$ 'dogs'", "owls\\n</main>"
    assert rows == [
        f'cats "and" <b> {dogs} 2 10.0', f'cats "and" <b> {owls} 2 10.0',
        f'{dogs} cats "and" <b> 1 5.0', f"{dogs} {owls} 1 5.0",
    ]  # fmt: skip


def test_classes_with_equal_shares_are_ordered_by_mean_score(tmp_path):
    config, data = planted(tmp_path)
    table = tmp_path / "amplifier" / "scores.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0]] + [row[:-1] + "0" for row in rows[1:]]) + "\n")
    text, _ = written(tmp_path, config, data)
    first = sections(text)[0].all("h2")[0]["text"]
    assert first == "No image is flagged; the class with the highest mean score: owls\\n</main>"
    assert "0 of 60 training images (0.0 %) are at odds" in text


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run on the digits whose generated images are given: every stage but the generator."""
    folder = tmp_path_factory.mktemp("digits")
    for entry in digits(1.0, draw=1).entries:
        if entry.split == "train":
            place = folder / "given" / str(entry.y)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(entry.pixels).save(place / entry.path.replace("/", "-"))
    out, given = folder / "run", str(folder / "given")
    longer = {"amplifier__images": "12800", "amplifier__width": "16"}
    answer = small.ddb_fast(out, data__rho="0.95", methods="none", synthetic=given, **longer)
    assert answer.returncode == 0, answer.stderr
    return out


def test_on_digits_the_images_most_at_odds_break_the_bias(found):
    with (found / "amplifier" / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    shown = sections((found / "report.html").read_text("utf-8"))
    assert len(shown) == 10
    for part in shown:
        paths = [span["title"] for span in part.all("span", **{"class": "file"})]
        label = paths[0].split("/")[1]
        own = sorted((r for r in rows if r["y"] == label), key=lambda r: float(r["score"]))
        assert paths[:6] == [row["path"] for row in own[:6]]
        assert paths[6:] == [row["path"] for row in own[:-7:-1]]
        conflicting = [path[-5] != label for path in paths]
        assert sum(conflicting[6:]) >= 5 and sum(conflicting[:6]) == 0


# --- sentences, tables, figures ----------------------------------------------------------------


def test_what_was_found_comes_first_and_needs_no_labels(tmp_path, hostile):
    config, data = planted(tmp_path)
    _, page = written(tmp_path, config, data)
    text = page.all("p", **{"class": "lead"})[0]["text"]
    assert text.startswith("6 of 60 training images (10.0 %) are at odds with what the generator")
    assert 'Class cats "and" <b> has the largest share of them: 4 of 20 (20.0 %).' in text
    verdict = hostile[2].all("p", **{"class": "lead"})[0]["text"]
    assert verdict == "One <b>. Two. Three."


def test_a_run_without_an_amplifier_says_so(tmp_path):
    config, data = planted(tmp_path)
    (tmp_path / "amplifier" / "scores.csv").unlink()
    results = results_of(amplifier=None, synthetic=None)
    _, page = written(tmp_path, config, data, results)
    assert "trained no generator" in page.all("p", **{"class": "lead"})[0]["text"]
    assert page.all("img") == [] and page.all("section", id="scores") == []
    assert len(page.all("table")) == 3
    results["methods"] = {}
    assert written(tmp_path, config, data, results)[1].all("section", id="classifiers") == []


def test_a_run_on_given_scores_shows_real_images_alone(tmp_path):
    config, data = planted(tmp_path)
    (tmp_path / "synthetic" / "images.safetensors").unlink()
    text, page = written(tmp_path, config, data, results_of(synthetic=None))
    assert len(page.all("img")) == 3 * 12
    assert len(re.findall("No image of this class was generated", text)) == 3
    found = page.all("p", **{"class": "lead"})[0]["text"]
    assert "are at odds with their class." in found and "do the most typical images" in found


def test_the_checks_are_a_table_where_there_is_a_verdict(tmp_path, hostile):
    section = re.search(r'<section id="checks">.*?</section>', hostile[1], re.S)[0]
    rows = Page(section).all("tr")
    assert rows[1]["text"] == "same Is <i>it</i>? 0.75 0.4 yes"
    assert rows[2]["text"] == "none ? - - no"
    assert "7 training images (11.7 %)" in section
    config, data = planted(tmp_path)
    for results in (results_of(), results_of(verdict=None)):
        _, page = written(tmp_path, config, data, results)
        assert page.all("section", id="checks") == page.all("section", id="copies") == []


def test_images_at_odds_are_told_apart_where_the_audit_could(tmp_path, hostile):
    """Twenty: those labelled 1 stand at 90 %, others rise from 0 to 60 and are of class 0."""
    config, data = planted(tmp_path, paths=[f"{HOSTILE[0]}{i}" for i in range(60)])
    table = tmp_path / "audit" / "at_odds.csv"
    table.parent.mkdir()
    stands = [*(i / 20 for i in range(13)), *[0.9] * 7]
    rows = [(i, f"{HOSTILE[0]}{i}", int(i >= 13), 2, stand) for i, stand in enumerate(stands)]
    # Of equals, one of each class comes first: the last but one is of class 0.
    rows[18] = (18, f"{HOSTILE[0]}18", 0, 2, 0.9)
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([AT_ODDS, *rows])
    check = {"question": "?", "limit": 0.05}
    for unanimous, gain, passed in ((True, 0.1, True), (True, 0.01, True), (True, -0.01, False),
                                    (True, None, False), (False, 0.1, False)):  # fmt: skip
        checks = [
            {"name": "unanimous", "passed": unanimous, "value": 0.9, **check},
            {"name": "separable", "passed": gain == 0.1, "value": gain, **check},
        ]
        verdict = hostile[3]["verdict"] | {"checks": checks}
        text, page = written(tmp_path, config, data, results_of(verdict=verdict))
        assert len(page.all("section", id="odds")) == len(page.all("a", href="#odds")) == passed
        if not passed:
            continue
        section = re.search(r'<section id="odds">.*?</section>', text, re.S)[0]
        boxes = re.findall(
            r'<div class="kind (\w+)"><h3>(.*?)</h3>\s*<p class="soft">(.*?)</p>(.*?)'
            r'(?=<div class="kind |</section>)', section, re.S,
        )  # fmt: skip
        (*most, first), (*least, second) = boxes
        assert most == ["typical", "Their own class shows most",
                        "Likelier to break a shortcut: keep them."]  # fmt: skip
        assert least[:2] == ["conflicting", "Their own class shows least"]
        assert least[2].startswith("Likelier to be mislabelled")
        best, worst = [13, 18, 14, 15, 16, 17, 19, 12, 11], list(range(9))
        names = [report.plain(name) for name in data.classes]
        for part, chosen in ((first, best), (second, worst)):
            captions = re.findall(r"<figcaption>(.*?)</figcaption>", part, re.S)
            for caption, i in zip(captions, chosen, strict=True):
                label, likeness, shows, _ = re.findall(r"<span[^>]*>(.*?)</span>", caption)
                _, _, y, _, stand = rows[i]
                assert html.unescape(label) == f"labelled {names[y]}"
                assert html.unescape(likeness) == f"looks like {names[2]}"
                assert shows == f"shows {100 * stand:.0f}\N{NO-BREAK SPACE}%"
        part = Page(section)
        shown = [span["title"] for span in part.all("span", **{"class": "file"})]
        assert shown == [report.plain(data.splits["train"].paths[i]) for i in best + worst]
        for image, i in zip(part.all("img"), best + worst, strict=True):
            small = data.splits["train"].small[i].reshape(-1, 3)
            assert torch.equal(pixels(image["src"]), small)


def test_possible_copies_are_shown_side_by_side(hostile):
    folder, text, _, results = hostile
    section = re.search(r'<section id="copies">.*?</section>', text, re.S)[0]
    page = Page(section)
    tensors, _ = checkpoint.load_tensors(folder / "synthetic" / "images.safetensors")
    images = page.all("img")
    assert len(images) == 2 * report.PAIRS == 24
    train = planted(folder)[1].splits["train"].small
    for i, (made, real) in enumerate(zip(images[::2], images[1::2], strict=True)):
        generated = tensors["images"][i].permute(1, 2, 0).reshape(-1, 3)
        assert torch.equal(pixels(made["src"]), generated)
        assert torch.equal(pixels(real["src"]), train[2 * i].reshape(-1, 3))
        path = report.plain(results["memorisation"]["pairs"][i]["path"])
        assert f"training image {path} of class" in real["alt"]
    words = " ".join(p["text"] for p in page.all("p"))
    assert "15 of 30 (50.0 %; 95 % interval 20.0 to 70.0 %) generated images" in words
    assert "validation images, which no network was trained on, 1 of 200 (0.5 %" in words
    assert "some of these are copies" in words and "2 are repetitions" in words
    assert "owls\\n</main>" in words


def test_what_is_said_of_copies_depends_on_the_control(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_figures", lambda *_: {"missing": "not looked at here"})
    config, data = planted(tmp_path)
    paths = data.splits["train"].paths

    def said(**changes):
        results = results_of(memorisation=memorised(paths, **changes))
        text, _ = written(tmp_path, config, data, results)
        return re.search(r'<section id="copies">.*?</section>', text, re.S)[0]

    assert "too few to tell" in said(flagged=15, held_out=(0, 5))
    assert "nothing shows that the generator copied" in said(low=0.0)
    assert "None is flagged; the nearest pairs" in said(low=0.0)
    assert len(Page(said(low=0.0)).all("img")) == 2 * report.NEAREST
    alone = said(low=0.0, held_out=None)
    assert "No real images were held out" in alone and "nothing shows" in alone
    assert "some of these are copies" in said(flagged=15, held_out=None)
    nothing = memorised(paths, held_out=None)
    nothing["generated"] |= {"share": None, "low": None, "high": None, "compared": 0}
    nothing |= {"pairs": [], "expected_share": None, "chance_share": None, "excess": False}
    text, _ = written(tmp_path, config, data, results_of(memorisation=nothing))
    assert "That could not be looked at" in text


def test_where_nothing_was_compared_with_the_training_images_no_figure_is_drawn(tmp_path):
    config, data = planted(tmp_path)
    train = data.splits["train"]
    nothing = check_memorisation(
        torch.zeros(6, 3, *train.small.shape[1:3], dtype=torch.uint8),
        torch.arange(6) % len(CLASSES),
        torch.zeros_like(train.small),
        train.y,
        paths=train.paths,
        classes=CLASSES,
        features=lambda images: images.flatten(1).float(),
    )
    text, _ = written(tmp_path, config, data, results_of(memorisation=nothing))
    assert "That could not be looked at" in text
    assert "distance to the nearest training image" not in text


def test_groups_come_with_sizes_and_intervals_the_worst_first(tmp_path):
    config, data = planted(tmp_path)
    results = results_of(groups=300)
    text, _ = written(tmp_path, config, data, results)
    section = Page(re.search(r'<section id="classifiers">.*?</section>', text, re.S)[0])
    tables = section.all("table")
    assert "55.0 ± 7.1" in tables[0]["text"]
    rows = [row["text"].split() for row in section.all("tr")][4:14]
    low, high = wilson_interval(40 / 300, 40)
    # The empty group is left out, the first method's worst is group 1.
    assert rows[0][:3] == ["y=1", "a=<b>", "40"]
    assert rows[0][3:6] == ["0.3", f"[{100 * low:.0f},", f"{100 * high:.0f}]"]
    assert [row[0] for row in rows] == [f"y={g}" for g in range(1, 11)]
    assert len(section.all("tr")) == 3 + 1 + report.GROUPS + 1 + report.MORE_GROUPS
    assert "89 more groups are in results.json" in section.all("caption")[2]["text"]


def test_stages_have_the_images_a_second_that_the_log_gives(tmp_path, caplog):
    config, data = planted(tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(
            b'{"time": 1, "stage": "erm seed 0", "images": 640, "loss": 0.25}\n{"time": 2, "st\xff'
        )
    with caplog.at_level(logging.WARNING):
        text, _ = written(tmp_path, config, data)
    assert "1 lines are cut off" in caplog.text
    section = Page(re.search(r'<section id="course">.*?</section>', text, re.S)[0])
    rows = [row["text"] for row in section.all("tr")[1:]]
    assert rows == ["data 1.0", "diffusion 12.5 24,960 2000", "erm/seed0 2.0 640 320", "all 15.5"]
    assert "1 x cpu (x86_64), 2 threads" in section.all("caption")[0]["text"]
    assert len(section.all("svg")) == 3, "diffusion, erm and ddb-i"
    # Of the repeated step the last line counts.
    assert read_log(tmp_path / "log.jsonl")["erm seed 0"] == [(640, 0.25)]


def test_an_abandoned_attempt_leaves_no_points(tmp_path):
    """`erm` diverged and was begun again, shorter; `lff` went on from its checkpoint."""
    attempts = {
        "erm": [(64, 1.0), (128, 9.0), (192, 99.0), (32, 0.5), (96, 0.4)],
        "lff": [(64, 1.0), (128, 0.9), (128, 0.8), (192, 0.7)],
    }
    with (tmp_path / "log.jsonl").open("w") as file:
        for stage, points in attempts.items():
            for images, loss in points:
                row = {"time": 1, "stage": stage, "images": images, "loss": loss}
                print(json.dumps(row), file=file)
    assert read_log(tmp_path / "log.jsonl") == {
        "erm": [(32, 0.5), (96, 0.4)],
        "lff": [(64, 1.0), (128, 0.8), (192, 0.7)],
    }


def test_the_stages_of_the_manifest_have_the_logs_names():
    names = {
        "diffusion": "diffusion", "real-amplifier": "real amplifier", "erm/seed0": "erm seed 0",
        "real-amplifier-i/seed2": "real-amplifier-i seed 2",
        "jtt-identification/1": "jtt identification seed 1",
    }  # fmt: skip
    assert {stage: report._log_name(stage) for stage in names} == names


def test_command_and_configuration_are_complete(hostile):
    made = Page(re.search(r'<section id="made">.*?</section>', hostile[1], re.S)[0])
    assert made.all("code")[0]["text"] == "ddb-fast run 'a <b> & '\"'\"'c'\"'\"''"
    assert "diffusion.images = 48000" in made.all("pre")[0]["text"]
    assert "torch 2.13" in made.all("pre")[0]["text"]


def test_without_matplotlib_the_page_says_why_there_are_no_figures(tmp_path, monkeypatch, caplog):
    config, data = planted(tmp_path)
    with_figures = written(tmp_path, config, data)[1]
    assert len(with_figures.all("svg")) == 5
    monkeypatch.delitem(sys.modules, "ddb_fast.figures")
    monkeypatch.delattr("ddb_fast.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        text, page = written(tmp_path, config, data)
    assert page.all("svg") == []
    assert len(re.findall("matplotlib cannot be imported", text)) == 1
    assert "matplotlib cannot be imported" in caplog.text
    assert len(page.all("img")) == len(with_figures.all("img"))
    assert "taken for" in page.all("table")[-4]["text"], "the picture's numbers as a list"


# --- the page itself ---------------------------------------------------------------------------


def test_names_are_text_and_nothing_else(hostile):
    _, text, page, _ = hostile
    assert page.all("script") == [] and len(page.all("style")) == 1
    assert page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    )
    for tag, attributes, _ in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:image/png;base64,")), (tag, target[:80])
    assert "{{ 7 * 7 }}" in text
    titles = {span["title"] for span in page.all("span", **{"class": "file"})}
    paths = [report.plain(f"{i % 20}/{HOSTILE[i % len(HOSTILE)]}{i}") for i in range(60)]
    assert titles <= set(paths)
    assert {report.plain(name)[:9] for name in HOSTILE} == {t.split("/", 1)[1][:9] for t in titles}
    # What does not show, such as a mark that turns the direction of writing, is written out.
    assert "\\u202egnp" in text and "\u202e" not in text
    assert max(len(span["text"]) for span in page.all("span", **{"class": "file"})) <= 22


def test_the_page_can_be_heard_and_walked_with_a_keyboard(hostile):
    _, _, page, _ = hostile
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for tag, a, _ in page.elements if a.get("href", "").startswith("#")}
    assert targets and targets <= set(ids)
    clips = {c[5:-1] for _, a, _ in page.elements if (c := a.get("clip-path"))}
    assert clips and clips <= set(ids)
    assert all(image["alt"].strip() for image in page.all("img"))
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("nav")) == 1
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert page.elements[[t for t, _, _ in page.elements].index("a")][1]["href"] == "#content"
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    # What scrolls can be reached and has a name.
    for tag, attributes, _ in page.elements:
        if "wide" in attributes.get("class", "").split():
            assert attributes["tabindex"] == "0" and attributes["role"] == "region", tag
            assert attributes["aria-label"]
    assert page.all("html")[0]["lang"] == "en" and page.all("title")[0]["text"]


def schemes():
    """The colours of the light and of the dark scheme, by name."""
    style = re.search(
        r"<style>(.*?)</style>", (small.ROOT / "ddb_fast/report.html.j2").read_text(), re.S
    )
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style[1], re.S)
    )
    assert light.keys() == dark.keys() and light != dark
    return light, dark


def contrast(one, other):
    """WCAG 2.1's contrast ratio of two #rrggbb colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_text_has_contrast_in_both_schemes(hostile):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    for colours in schemes():
        for ink in ("ink", "soft", "made", "typical", "odd"):
            for ground in ("page", "card"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    # No colour but these: all others are variables.
    style = re.search(r"<style>(.*?)</style>", hostile[1], re.S)[1]
    outside = re.sub(r":root \{.*?\}", "", style, flags=re.S)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|\brgba?\(", outside) == []
    assert not re.findall(r'style="[^"]*#[0-9a-f]{6}', hostile[1])


def test_a_page_of_any_size_of_set_is_small_and_says_what_it_leaves_out(tmp_path):
    """20,000 images of noise, which no format shrinks, in 100 classes with long names."""
    noise = torch.randint(0, 256, (1, 96, 96, 3), generator=torch.Generator().manual_seed(0)).byte()
    paths = [f"{'y' * 200}/{'x' * 200}{i}.png" for i in range(20_000)]
    y = torch.arange(100).repeat_interleave(200)
    images = noise.expand(20_000, -1, -1, -1)
    train = Split(paths=tuple(paths), y=y, a=None, small=images, large=images)
    classes = [f"{i} {'z' * 100}" for i in range(100)]
    config, data = planted(tmp_path, classes=classes, per_class=200, paths=paths, train=train)
    tensors = {
        "images": noise.permute(0, 3, 1, 2).repeat(1000, 1, 1, 1),
        "labels": torch.arange(100).repeat(10),
    }
    checkpoint.save_tensors(tmp_path / "synthetic" / "images.safetensors", tensors, {})
    lines = [
        json.dumps({"stage": f"{m} seed {s}", "images": 64 * i, "loss": 1.0 / i})
        for m in range(12) for s in range(10) for i in range(1, 400)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    results = results_of(groups=500)
    results["methods"] = {f"method-{i}": results["methods"]["erm"] for i in range(11)}
    results["seconds"] = {f"stage {i}": 1.0 for i in range(200)}
    text, page = written(tmp_path, config, data, results)
    assert len(text.encode()) < 5_000_000
    shown = sections(text)
    assert 10 <= len(shown) <= report.CLASSES
    assert f"{100 - len(shown)} more classes, less affected, are shown without pictures" in text
    # Every class has its row, the worst first.
    names = [row["text"].split()[0] for row in page.all("th", scope="row")]
    ranked = [name for name in names if name.isdigit()][:100]
    assert ranked == ["0", "1", *map(str, range(99, 1, -1))]
    pictures = [image["src"] for image in page.all("img")]
    assert {source[:15] for source in pictures} == {"data:image/jpeg"}
    assert len(pictures) == len(shown) * (report.GENERATED + 12)
    assert sum(map(len, pictures)) <= report.BYTES


def test_larger_images_become_thumbnails():
    noise = torch.randint(0, 256, (200, 100, 3)).byte()
    source = report._data_uri(noise)
    image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert source.startswith("data:image/jpeg") and image.size == (48, 96)
    exact = report._data_uri(noise[:32, :32])
    assert torch.equal(pixels(exact), noise[:32, :32].reshape(-1, 3))


# --- in a browser ------------------------------------------------------------------------------

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

MEASURE = """<script>
const frame = document.documentElement, said = [...document.images];
const first = document.querySelector("#class-1");
const visible = kind => [...first.querySelectorAll(kind + " img")]
  .map(i => i.getBoundingClientRect())
  .filter(b => b.top >= 0 && b.bottom <= 800 && b.right <= 1280 && b.width >= 96 && b.height >= 96)
  .length;
parent.document.getElementById("out").textContent = JSON.stringify({
  title: document.title, width: innerWidth, images: said.length,
  broken: said.filter(i => !i.complete || i.naturalWidth === 0).length,
  overflow: frame.scrollWidth - frame.clientWidth,
  wider: [...document.querySelectorAll("main *:not(.wide *):not(svg *)")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
  visible: [".made", ".typical", ".conflicting"].map(visible),
  background: getComputedStyle(document.body).backgroundColor,
  details: [...document.querySelectorAll("details")].every(d => d.open)});
</script>"""


def browse(path, *options):
    """The DOM of a page that chromium opened from disk, and what it logged."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1400,1000"]
    command += [f"--user-data-dir={path.parent / 'profile'}", *options, "--dump-dom", path.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout, [line for line in answer.stderr.splitlines() if "CONSOLE" in line]


def measured(text, folder, width, height, *options, opened=False):
    """What a script finds in a copy of the page in a frame of this size."""
    policy = re.search(r"<meta http-equiv=.*?>\n", text)[0]
    inner = text.replace(policy, "").replace("</body>", MEASURE + "</body>")
    if opened:
        inner = inner.replace("<details>", "<details open>")
    copy = folder / "frame.html"
    copy.write_text(
        f'<!doctype html><title>frame</title><iframe width="{width}" height="{height}" '
        f'style="border:0" srcdoc="{html.escape(inner)}"></iframe><pre id="out"></pre>',
        "utf-8",
    )
    dom, _ = browse(copy, *options)
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1]))


@in_browser
@pytest.mark.parametrize("page", ["hostile", "found"])
def test_the_first_screen_holds_eighteen_images(page, request, tmp_path):
    source = request.getfixturevalue(page)
    source = source / "report.html" if page == "found" else source[0] / "report.html"
    seen = measured(source.read_text("utf-8"), tmp_path, 1280, 800)
    assert seen["width"] == 1280 and seen["broken"] == 0 and seen["images"] >= 21
    assert all(count >= 6 for count in seen["visible"]), seen["visible"]
    assert seen["title"].endswith("what the data teaches")
    assert seen["overflow"] <= 0 and seen["wider"] == 0


@in_browser
def test_nothing_overflows_on_a_phone(hostile, tmp_path):
    seen = measured(hostile[1], tmp_path, 390, 844, opened=True)
    assert seen["width"] == 390 and seen["details"]
    assert seen["overflow"] <= 0 and seen["wider"] == 0 and seen["broken"] == 0


@in_browser
def test_the_dark_scheme_is_dark(hostile, tmp_path):
    light, dark = schemes()
    for option, colours in ((), light), (("--blink-settings=preferredColorScheme=0",), dark):
        seen = measured(hostile[1], tmp_path, 1280, 800, *option)
        page = [int(colours["page"][i : i + 2], 16) for i in (1, 3, 5)]
        assert seen["background"] == "rgb({}, {}, {})".format(*page)


@in_browser
def test_the_browser_has_nothing_to_complain_of(hostile, tmp_path):
    copy = tmp_path / "page.html"
    copy.write_text(hostile[1], "utf-8")
    dom, said = browse(copy)
    assert said == [] and "pets: what the data teaches" in dom
    copy.write_text(
        hostile[1].replace("<main", "<script>document.title = 1</script><main"), "utf-8"
    )
    dom, said = browse(copy)
    assert said and "Content Security Policy" in said[0], "a script would be seen here"
    assert "pets: what the data teaches" in dom, "and would not have run"
