"""The published sets: their exact layout in small or with empty files, right and wrong."""

import csv
import hashlib
import io
import logging
import tarfile
import typing
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddb_fast import cli
from ddb_fast.config import DataConfig
from ddb_fast.data.benchmarks import BENCHMARKS
from ddb_fast.data.benchmarks.imagenet9 import WNIDS
from ddb_fast.data.listing import Entry, Listing
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import broken_images, open_images

REAL_BAR = Path(__file__).parents[3] / "shared" / "data" / "bar" / "bar_128.tar.xz"


def picture():
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (200, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(root, paths, content=b""):
    """Files of a published tree; empty ones do for a listing, which decodes nothing."""
    for parent in {(root / path).parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        (root / path).write_bytes(content)
    return root


def listed(root, source, **fields):
    return open_listing(DataConfig(source=source, path=str(root), **fields))


def refused(capsys, root, source, *words):
    """`ddb-fast data` in this process: exit 2 and one line, which is returned."""
    assert cli.main(["data", str(root), "--as", source, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ddb-fast data: "), lines
    return lines[0]


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def groups(listing, split):
    """Images of each (y, a) in a split."""
    return Counter((e.y, e.a) for e in listing.entries if e.split == split)


def sha(path):
    return hashlib.sha256(path.encode()).hexdigest()


# --- the registry --------------------------------------------------------------------------------


def test_every_source_of_the_configuration_is_a_set_or_the_users_own():
    names = typing.get_args(typing.get_type_hints(DataConfig)["source"])
    assert set(names) - {"auto", "folder", "csv", "digits"} == set(BENCHMARKS)


@pytest.mark.parametrize("source", BENCHMARKS)
def test_a_wrong_layout_shows_the_expected_one_and_where_the_set_is_published(
    capsys, tmp_path, source
):
    write(tmp_path, ["cat/1.png", "dog/1.png"])
    for root in (tmp_path, tmp_path / "absent"):
        line = refused(capsys, root, source)
        assert BENCHMARKS[source].tree in line and BENCHMARKS[source].published in line
        assert "published at https://" in line and str(root) in line


# --- Waterbirds ----------------------------------------------------------------------------------

COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")
# Images of each group 2 * y + place, in train, val and test.
FULL = ((3498, 184, 56, 1057), (467, 466, 133, 133), (2255, 2255, 642, 642))
SMALL = ((350, 18, 6, 106), (47, 47, 13, 13), (23, 23, 6, 6))


def waterbirds(root, counts, content=b"", columns=COLUMNS):
    rows = []
    for split, groups_ in enumerate(counts):
        for group, count in enumerate(groups_):
            for _ in range(count):
                i = len(rows) + 1
                name = f"{i % 200 + 1:03d}.Bird/Bird_{i:04d}.jpg"
                rows.append((i, name, group // 2, split, group % 2, f"/b/bamboo/{i}.jpg"))
    write(root, [row[1] for row in rows], content)
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(dict(zip(COLUMNS, row, strict=True)) for row in rows)
    return root


@pytest.fixture(scope="module")
def all_waterbirds(tmp_path_factory):
    root = tmp_path_factory.mktemp("waterbirds")
    waterbirds(root / "waterbird_complete95_forest2water2", FULL)
    return root


def test_waterbirds_as_published(all_waterbirds, caplog):
    listing = listed(all_waterbirds, "waterbirds")
    assert (listing.classes, listing.biases) == (("landbird", "waterbird"), ("land", "water"))
    assert listing.aligned_bias == (0, 1)
    for split, counts in zip(("train", "val", "test"), FULL, strict=True):
        found = groups(listing, split)
        assert tuple(found[y, a] for y, a in product((0, 1), repeat=2)) == counts
    assert not warned(caplog)
    inside = listed(all_waterbirds / "waterbird_complete95_forest2water2", "waterbirds")
    assert inside.fingerprint == listing.fingerprint


@pytest.mark.parametrize(
    ("rho", "conflicting", "aligned", "landbirds"),
    # Waterbirds are 1113/4795 of each part: 47.1 of 203, 94.2 of 406, 141.4 of 609, 188.5 of 812;
    # 424.1 of 1827, 376.9 of 1624, 329.8 of 1421, 282.7 of 1218.
    [
        (0.9, 203, 1827, (156, 1403)),
        (0.8, 406, 1624, (312, 1247)),
        (0.7, 609, 1421, (468, 1091)),
        (0.6, 812, 1218, (624, 935)),
    ],
)
def test_waterbirds_ablations(all_waterbirds, caplog, rho, conflicting, aligned, landbirds):
    official, listing = (
        listed(all_waterbirds, "waterbirds"),
        listed(all_waterbirds, "waterbirds", rho=rho),
    )
    train = groups(listing, "train")
    assert train[0, 1] + train[1, 0] == conflicting and train[0, 0] + train[1, 1] == aligned
    assert (train[0, 1], train[0, 0]) == landbirds
    assert not warned(caplog)

    def paths(of, split, y, a):
        return {e.path for e in of.entries if (e.split, e.y, e.a) == (split, y, a)}

    for y, a in product((0, 1), repeat=2):
        ours, theirs = paths(listing, "train", y, a), paths(official, "train", y, a)
        first = sorted(theirs, key=sha)[: len(ours)]
        more = sorted(paths(official, "val", y, a), key=sha)[: len(ours) - len(first)]
        assert ours == {*first, *more}
        assert not (y == a and more), "aligned images come from train"
        assert paths(listing, "val", y, a) == paths(official, "val", y, a) - set(more)
        assert paths(listing, "test", y, a) == paths(official, "test", y, a)


def test_waterbirds_of_another_size(tmp_path, capsys, caplog):
    root = waterbirds(tmp_path, SMALL)
    assert groups(listed(root, "waterbirds"), "train")[0, 0] == 350
    (line,) = warned(caplog)
    assert "train landbird on land 350, not 3498" in line and "and 8 more" in line
    # round(2030 * 480 / 4795) = 203 images, 41 of them conflicting.
    train = groups(listed(root, "waterbirds", rho=0.8), "train")
    assert train[0, 1] + train[1, 0] == 41 and train.total() == 203
    assert "0.95 (the official split) and the ablations 0.9, 0.8, 0.7, 0.6" in refused(
        capsys, root, "waterbirds", "--rho", "0.5"
    )
    few = waterbirds(tmp_path / "few", ((350, 4, 2, 106), (4, 4, 1, 1), (1, 1, 1, 1)))
    line = refused(capsys, few, "waterbirds", "--rho", "0.6")
    assert "needs 60 images of a landbird on water, train and val have 8" in line


@pytest.mark.parametrize("column", COLUMNS)
def test_waterbirds_without_a_column(capsys, tmp_path, column):
    columns = [name for name in COLUMNS if name != column]
    root = waterbirds(tmp_path, ((1, 1, 1, 1),), columns=columns)
    assert f"no column `{column}`" in refused(capsys, root, "waterbirds")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (",0,0,0,", ",2,0,0,", "line 2: y is 2, not one of 0..1"),
        (",0,0,0,", ",bird,0,0,", "line 2: y is 'bird', not an integer"),
        (",0,0,0,", ",0,3,0,", "line 2: split is 3, not one of 0..2"),
        (",0,0,0,", ",0,0,-1,", "line 2: place is -1, not one of 0..1"),
        (
            "Bird_0001",
            "Bird_0009",
            "1 of 4 images it names are not there, first 002.Bird/Bird_0009",
        ),
        ("003.Bird/Bird_0002", "002.Bird/Bird_0001", "Bird_0001.jpg is listed twice"),
    ],
)
def test_waterbirds_with_a_wrong_row(capsys, tmp_path, old, new, told):
    root = waterbirds(tmp_path, ((1, 1, 1, 1),))
    text = (root / "metadata.csv").read_text()
    assert old in text
    (root / "metadata.csv").write_text(text.replace(old, new, 1))
    assert told in refused(capsys, root, "waterbirds")


# --- BFFHQ ---------------------------------------------------------------------------------------


def bffhq(root, train=(("align", 4), ("conflict", 1)), valid=2, test=2, percent="0.5pct"):
    """valid and test are numbers of images of each (aligned) class, of each cell."""
    paths = [
        f"{percent}/{part}/{y}/{1000 * y + i}_{y}_{y if part == 'align' else 1 - y}.png"
        for part, count in train
        for y in (0, 1)
        for i in range(count)
    ]
    paths += [f"valid/{2000 + i}_{y}_{y}.png" for y in (0, 1) for i in range(valid)]
    paths += [
        f"test/{4000 + i}_{y}_{a}.png" for y, a in product((0, 1), repeat=2) for i in range(test)
    ]
    return write(root, paths)


def test_bffhq_as_published(tmp_path, caplog):
    root = bffhq(tmp_path, (("align", 9552), ("conflict", 48)), 500, 250)
    listing = listed(root, "bffhq", rho=0.995)
    assert (listing.classes, listing.biases) == (("young", "old"), ("female", "male"))
    assert groups(listing, "train") == {(0, 0): 9552, (1, 1): 9552, (0, 1): 48, (1, 0): 48}
    assert groups(listing, "val") == {(0, 0): 500, (1, 1): 500}
    assert set(groups(listing, "test").values()) == {250}
    assert not warned(caplog)
    for entry in listing.entries[:5]:
        assert entry.path.endswith(f"_{entry.y}_{entry.a}.png")


def test_bffhq_of_another_size_loads_with_a_warning(tmp_path, caplog):
    listed(bffhq(tmp_path), "bffhq", rho=0.995)
    (line,) = warned(caplog)
    assert "train aligned 8, not 19104" in line and "train conflicting 2, not 96" in line


def test_bffhq_takes_the_percentage_of_rho(tmp_path, capsys, caplog):
    bffhq(tmp_path, (("align", 3), ("conflict", 1)), percent="2pct")
    assert groups(listed(tmp_path, "bffhq", rho=0.98), "train")[0, 0] == 3
    with pytest.raises(ValueError, match=r"that of rho 0\.95; pass rho 0\.98 for 2pct/$"):
        listed(tmp_path, "bffhq")
    assert not warned(caplog), "published counts are known of 0.5pct only"
    bffhq(tmp_path)
    with caplog.at_level(logging.INFO):
        assert groups(listed(tmp_path, "bffhq", rho=0.995), "train")[0, 0] == 4
    assert "2 percentages there, rho 0.995 takes 0.5pct" in caplog.text
    assert groups(listed(tmp_path, "bffhq", rho=0.98), "train")[0, 0] == 3
    line = refused(capsys, tmp_path, "bffhq", "--rho", "0.95")
    assert "0.995 for 0.5pct/" in line and "0.98 for 2pct/" in line


def test_bffhq_believes_names_more_than_folders(tmp_path, caplog):
    root = bffhq(tmp_path)
    write(root, ["0.5pct/align/0/77_1_0.png"])
    assert groups(listed(root, "bffhq", rho=0.995), "train")[1, 0] == 2
    assert "1 training images lie in a folder that their names contradict" in caplog.text


@pytest.mark.parametrize(
    ("extra", "gone", "told"),
    [
        ("0.5pct/align/2/7_0_0.png", None, "2/ is none of 0, 1"),
        ("0.5pct/neutral/0/7_0_0.png", None, "neutral/ is none of align, conflict"),
        ("test/7_0.png", None, "7_0.png: not named <id>_<age>_<gender>"),
        ("test/7_0_2.png", None, "7_0_2.png: not named"),
        (None, "valid", "no folder valid/"),
        (None, "0.5pct", "no folder 0.5pct/"),
        (None, "0.5pct/conflict", "no folder conflict/"),
        (None, "0.5pct/conflict/1", "no folder 1/"),
    ],
)
def test_bffhq_laid_out_otherwise(capsys, tmp_path, extra, gone, told):
    root = bffhq(tmp_path)
    if extra:
        write(root, [extra])
    if gone:
        (root / gone).rename(tmp_path / "elsewhere")
    line = refused(capsys, root, "bffhq")
    assert told in line and BENCHMARKS["bffhq"].tree in line


# --- BAR -----------------------------------------------------------------------------------------

ACTIONS = ("climbing", "diving", "fishing", "pole vaulting", "racing", "throwing")
TRAIN, TEST = (326, 520, 163, 279, 336, 317), (105, 159, 42, 131, 132, 85)


def bar(root, train=TRAIN, test=TEST):
    paths = [f"train/{n}_{i}.jpg" for n, c in zip(ACTIONS, train, strict=True) for i in range(c)]
    paths += [
        f"test/{name}_{here + i}.png"
        for name, here, count in zip(ACTIONS, train, test, strict=True)
        for i in range(count)
    ]
    return write(root, paths)


def test_bar_as_published(tmp_path, caplog):
    root = bar(tmp_path)
    listing = listed(root, "bar", validation_share=0.0)
    assert listing.classes == ACTIONS and listing.biases is None
    assert Counter(listing.split) == {"train": 1941, "test": 654}
    assert tuple(Counter(listing.y[:1941].tolist())[y] for y in range(6)) == TRAIN
    held = listed(root, "bar")
    assert Counter(held.split) == {"train": 1746, "val": 195, "test": 654}
    first = sorted((p for p in listing.paths if p.startswith("train/diving_")), key=sha)[:52]
    diving = [e.path for e in held.entries if e.split == "val" and e.y == 1]
    assert sorted(first) == sorted(diving)
    assert not warned(caplog)


@pytest.mark.parametrize(("rho", "conflicting"), [(0.99, 16), (0.98, 31), (0.95, 82)])
def test_bar_rho_counts_of_the_protocol(tmp_path, caplog, rho, conflicting):
    listing = listed(bar(tmp_path), "bar-rho", rho=rho)
    assert listing.biases == ("aligned", "conflicting") and listing.aligned_bias == (0,) * 6
    count = Counter((e.split, e.a) for e in listing.entries)
    assert (count["train", 0], count["train", 1]) == (1551, conflicting)
    assert (count["val", 0], count["test", 0]) == (195, 195)
    assert count["val", 1] == 10 + 16 + 4 + 13 + 13 + 8
    assert len(listing) == 2595 and not warned(caplog)
    assert all((e.a == 1) == e.path.startswith("test/") for e in listing.entries)
    # Fishing: 163 aligned, so 16 validate, 16 test, 131 train; 42 conflicting ones.
    pool = sorted((e for e in listing.entries if e.y == 2), key=lambda e: sha(e.path))
    aligned = [e.split for e in pool if e.a == 0]
    assert aligned == ["val"] * 16 + ["test"] * 16 + ["train"] * 131
    k = max(1, round(131 * (1 - rho) / rho))
    assert [e.split for e in pool if e.a == 1] == ["train"] * k + ["val"] * 4 + ["test"] * (38 - k)


def test_bar_of_another_size_and_a_rho_that_cannot_be(tmp_path, capsys, caplog):
    root = bar(tmp_path, (20,) * 6, (10,) * 6)
    train = groups(listed(root, "bar-rho", rho=0.9), "train")
    assert train[0, 0] == 16 and train[0, 1] == 2
    assert groups(listed(root, "bar-rho", rho=1.0), "train")[0, 1] == 1
    assert "train climbing 20, not 326" in caplog.text
    line = refused(capsys, root, "bar-rho", "--rho", "0.5")
    assert "puts 16 conflicting images of climbing into training" in line and "has 10" in line
    assert "above 0" in refused(capsys, root, "bar-rho", "--rho", "0")


@pytest.mark.parametrize("source", ["bar", "bar-rho"])
def test_bar_laid_out_otherwise(capsys, tmp_path, source):
    root = bar(tmp_path, (10,) * 6, (10,) * 6)
    (root / "train" / "notes.txt").write_text("ignored")
    assert listed(root, source).classes == ACTIONS
    stray = write(root, ["train/surfing_1.jpg"]) / "train" / "surfing_1.jpg"
    line = refused(capsys, root, source)
    assert "surfing_1.jpg: not named <class>_<n>" in line and "pole vaulting" in line
    stray.unlink()
    write(root, ["train/diving/1.jpg"])
    assert "1.jpg: not named <class>_<n>" in refused(capsys, root, source)
    (root / "train" / "diving" / "1.jpg").unlink()
    (root / "test").rename(tmp_path / "elsewhere")
    assert "no folder test/" in refused(capsys, root, source)


def test_a_class_of_bar_without_images(capsys, tmp_path):
    root = bar(tmp_path, (0, *TRAIN[1:]), TEST)
    assert "class climbing has no training images" in refused(capsys, root, "bar")
    assert "class climbing has no training images" not in refused(capsys, root, "waterbirds")


@pytest.mark.skipif(not REAL_BAR.exists(), reason="BAR's images are not on this machine")
def test_the_real_bar(tmp_path, caplog):
    with tarfile.open(REAL_BAR) as archive:
        archive.extractall(tmp_path, filter="data")
    listing = listed(tmp_path, "bar-rho", rho=0.98)
    assert groups(listing, "train").total() == 1551 + 31
    assert not warned(caplog)
    assert broken_images(listing, progress=False) == {}


# --- ImageNet-9 ----------------------------------------------------------------------------------

ALL_WNIDS = [(y, wnid) for y, wnids in enumerate(WNIDS.values()) for wnid in wnids]


def imagenet(root, per_folder=2, content=b"", folders=("train", "val")):
    return write(
        root,
        [
            f"{folder}/{wnid}/{wnid}_{i}.JPEG"
            for folder in folders
            for _, wnid in ALL_WNIDS
            for i in range(per_folder)
        ],
        content,
    )


def clusters(root, paths, columns="path,cluster_1,cluster_2,cluster_3"):
    rows = [f"{path},{i},{i % 3},{i % 2}" for i, path in enumerate(paths)]
    (root / "texture_clusters.csv").write_text("\n".join([columns, *rows]))


def test_the_folders_are_those_of_the_method():
    """Numbers of the method's text, in ImageNet's order, which is that of sorted wnids."""
    index = {"dog": (151, 207, 234, 235, 254), "cat": range(281, 286), "frog": range(30, 33)}
    index |= {"turtle": range(33, 38), "bird": (89, 90, 94, 96, 97), "fish": range(393, 398)}
    index |= {"monkey": (372, 373, 374, 375, 378), "crab": range(118, 122)}
    index |= {"insect": range(306, 311)}
    assert " ".join(WNIDS) == "dog cat frog turtle bird monkey fish crab insect"
    pairs = [pair for name in WNIDS for pair in zip(index[name], WNIDS[name], strict=True)]
    assert len({wnid for _, wnid in pairs}) == 42
    assert [wnid for _, wnid in sorted(pairs)] == sorted(wnid for _, wnid in pairs)


def test_imagenet_9_without_imagenet_a(tmp_path, caplog):
    root = imagenet(tmp_path)
    write(root, ["train/n01440764/tench.JPEG", "val/n01440764/tench.JPEG"])
    with caplog.at_level(logging.INFO):
        listing = listed(root, "imagenet-9")
    assert listing.classes == tuple(WNIDS) and listing.biases is None
    assert listing.name == "imagenet-9 tested on val", "no row beside ImageNet-A's figures"
    assert Counter(listing.split) == {"train": 84, "test": 84}
    assert not [path for path in listing.paths if "n01440764" in path]
    assert {
        path.split("/")[1]: y for path, y in zip(listing.paths, listing.y.tolist(), strict=True)
    } == {wnid: y for y, wnid in ALL_WNIDS}
    assert "val/ is the test split" in caplog.text and "no texture_clusters.csv" in caplog.text
    of_train, of_val = warned(caplog)
    assert "train 84, not 54600" in of_train
    assert "val dog 10, not 250" in of_val and "and 5 more" in of_val


def test_imagenet_9_with_imagenet_a_and_clusters(tmp_path):
    root = imagenet(tmp_path, content=picture())
    # ImageNet-A has other wnids too, and not all of ours.
    write(
        root,
        [f"imagenet-a/{wnid}/1.jpg" for wnid in ("n02085620", "n02206856", "n01498041")],
        picture(),
    )
    paths = [f"val/{wnid}/{wnid}_{i}.JPEG" for _, wnid in ALL_WNIDS for i in (1, 0)]
    clusters(root, [*paths, "val/n01440764/other.JPEG"])
    listing = listed(root, "imagenet-9")
    assert listing.name == "imagenet-9"
    assert Counter(listing.split) == {"train": 84, "val": 84, "test": 2}
    data = open_images(
        listing, image_size=2, cache_size=2, cache_dir=tmp_path / "cache", progress=False
    )
    assert data.splits["train"].clusters is None and data.splits["test"].clusters is None
    val = data.splits["val"]
    assert val.clusters.shape == (3, 84) and val.clusters.dtype == torch.int64
    expected = [[paths.index(p), paths.index(p) % 3, paths.index(p) % 2] for p in val.paths]
    assert val.clusters.T.tolist() == expected
    (root / "texture_clusters.csv").unlink()
    assert listed(root, "imagenet-9").fingerprint != listing.fingerprint


def test_imagenet_9_with_wrong_clusters(capsys, tmp_path):
    root = imagenet(tmp_path, 1)
    paths = [f"val/{wnid}/{wnid}_0.JPEG" for _, wnid in ALL_WNIDS]
    clusters(root, paths[:-1])
    line = refused(capsys, root, "imagenet-9")
    assert "1 of 42 images of val/ have no row" in line and paths[-1] in line
    clusters(root, [*paths, paths[3]])
    assert "line 44" in refused(capsys, root, "imagenet-9")
    clusters(root, paths, columns="path,cluster_1,cluster_2,texture")
    assert "no column `cluster_3`" in refused(capsys, root, "imagenet-9")
    clusters(root, paths)
    table = root / "texture_clusters.csv"
    table.write_text(table.read_text().replace(",5,2,1", ",-5,2,1"))
    assert "line 7: a cluster is -5" in refused(capsys, root, "imagenet-9")


@pytest.mark.parametrize(
    ("extra", "gone", "told"),
    [
        ("train/cat/1.jpg", None, "cat: not named as an ImageNet class"),
        (
            None,
            "train/n02492035",
            "1 of the 42 folders needed are not there, first n02492035 (monkey)",
        ),
        (None, "val/n01641577", "first n01641577 (frog)"),
        (None, "val", "no folder val/"),
        ("imagenet-a/n01498041/1.jpg", None, "42 of the 42 folders"),
    ],
)
def test_imagenet_9_laid_out_otherwise(capsys, tmp_path, extra, gone, told):
    root = imagenet(tmp_path, 1)
    if extra:
        write(root, [extra])
    if gone:
        (root / gone).rename(tmp_path / "elsewhere")
    line = refused(capsys, root, "imagenet-9")
    assert told in line and BENCHMARKS["imagenet-9"].tree in line


# --- UrbanCars -----------------------------------------------------------------------------------

KINDS = ("urban", "country")


def urbancars(root, both=6, one=2, none=1, evaluated=1):
    """Images of a class in train: with both shortcuts, with one of them, without; in each cell.

    Beside each image lie, as published, the masks of the car and of the object.
    """
    paths = []
    for y, bg, obj in product(range(2), repeat=3):
        group = f"obj-{KINDS[y]}_bg-{KINDS[bg]}_co_occur_obj-{KINDS[obj]}"
        count = {2: both, 1: one, 0: none}[(bg == y) + (obj == y)]
        paths += [f"bg-0.95_co_occur_obj-0.95/train/{group}/{i:03d}.jpg" for i in range(count)]
        for split in ("val", "test"):
            name = f"bg-0.5_co_occur_obj-0.5/{split}/{group}"
            paths += [f"{name}/{i:03d}.jpg" for i in range(evaluated)]
    ends = ("_mask.png", "_co_occur_obj_mask.png")
    return write(root, paths + [p.replace(".jpg", end) for p in paths for end in ends])


def test_urbancars_as_published(tmp_path, caplog):
    root = urbancars(tmp_path, 3610, 190, 10, 125)
    with caplog.at_level(logging.INFO):
        listing = listed(root, "urbancars")
    (line,) = (record.getMessage() for record in caplog.records)
    assert "20000 other files ignored, first 000_co_occur_obj_mask.png" in line
    assert listing.classes == KINDS and listing.factors == (("background", 2), ("co_object", 2))
    assert listing.biases[1] == "bg urban, object country" and listing.aligned_bias == (0, 3)
    assert Counter(listing.split) == {"train": 8000, "val": 1000, "test": 1000}
    train = groups(listing, "train")
    assert [train[0, a] for a in range(4)] == [3610, 190, 190, 10]
    assert [train[1, a] for a in range(4)] == [10, 190, 190, 3610]
    for entry in listing.entries:
        name = entry.path.split("/")[2]
        assert name.startswith(f"obj-{KINDS[entry.y]}_bg-{KINDS[entry.a // 2]}_")
        assert name.endswith(f"_co_occur_obj-{KINDS[entry.a % 2]}")
    assert not warned(caplog)


def test_urbancars_reads_no_mask_whatever_its_extension(tmp_path):
    root = urbancars(tmp_path)
    found = set(listed(root, "urbancars").paths)
    assert found == {p.relative_to(root).as_posix() for p in root.rglob("*.jpg")}
    group = "bg-0.95_co_occur_obj-0.95/train/obj-urban_bg-urban_co_occur_obj-urban"
    write(root, [f"{group}/000_mask.jpg"])
    assert set(listed(root, "urbancars").paths) == found


def test_urbancars_of_another_size_keeps_its_factors(tmp_path, caplog):
    root = urbancars(tmp_path)
    for file in root.rglob("*.jpg"):
        file.write_bytes(picture())
    listing = listed(root, "urbancars")
    (line,) = warned(caplog)
    assert "train urban, bg urban, object urban 6, not 3610" in line
    data = open_images(
        listing, image_size=2, cache_size=2, cache_dir=tmp_path / "cache", progress=False
    )
    assert data.factors == listing.factors and data.splits["train"].clusters is None
    assert data.groups("test").bias_aligned.sum() == 2


@pytest.mark.parametrize(
    ("extra", "gone", "told"),
    [
        ("train/obj-urban_bg-sea_co_occur_obj-urban/1.jpg", None, "obj-urban_bg-sea_co_occur"),
        (None, "train/obj-urban_bg-urban_co_occur_obj-urban", "no folder obj-urban_bg-urban"),
        (None, "train", "no folder bg-0.95_co_occur_obj-0.95/train/"),
    ],
)
def test_urbancars_laid_out_otherwise(capsys, tmp_path, extra, gone, told):
    root = urbancars(tmp_path)
    top = root / "bg-0.95_co_occur_obj-0.95"
    if extra:
        write(top, [extra])
    if gone:
        (top / gone).rename(tmp_path / "elsewhere")
    line = refused(capsys, root, "urbancars")
    assert told in line and BENCHMARKS["urbancars"].tree in line


# --- what every listing promises -----------------------------------------------------------------


def entries(**changes):
    pixels = np.zeros((1, 1, 3), np.uint8)
    return tuple(Entry(f"{i}.png", i % 2, "train", pixels, i % 4, **changes) for i in range(8))


def test_factors_must_make_the_biases():
    given = {"name": "cars", "classes": ("a", "b"), "entries": entries()}
    Listing(**given, biases=tuple("0123"), factors=(("x", 2), ("z", 2)))
    for biases, factors in ((tuple("0123"), (("x", 3),)), (None, (("x", 2),))):
        with pytest.raises(ValueError, match="do not make the") as error:
            Listing(**given, biases=biases, factors=factors)
        assert "\n" not in str(error.value)


def test_clusters_are_of_all_images_of_a_split_or_of_none():
    every = entries(clusters=(1, 2))
    Listing(name="x", classes=("a", "b"), entries=every)
    with pytest.raises(ValueError, match="only some images of train have clusters"):
        Listing(name="x", classes=("a", "b"), entries=every[:4] + entries()[4:])


# --- ddb-fast data -------------------------------------------------------------------------------


def test_the_command_shows_groups_and_checks_images_only_when_asked(capsys, tmp_path):
    root = waterbirds(tmp_path, ((2, 1, 1, 2), (1, 1, 1, 1), (1, 1, 1, 1)), picture())
    broken = root / "002.Bird" / "Bird_0001.jpg"
    assert cli.main(["data", str(root), "--as", "waterbirds", "--check"]) == 0
    shown = capsys.readouterr().out
    assert "landbird, water" in shown and "every image can be read" in shown
    broken.write_bytes(picture()[:40])
    assert cli.main(["data", str(root), "--as", "waterbirds"]) == 0
    assert "Bird_0001" not in capsys.readouterr().out
    assert cli.main(["data", str(root), "--as", "waterbirds", "--check"]) == 2
    captured = capsys.readouterr()
    assert f"{broken}: cannot be read as an image" in captured.out
    line = captured.err.splitlines()[-1]
    assert line.startswith("ddb-fast data: 1 of 14 images cannot be read")
    assert "--data.corrupt skip" in line


@pytest.mark.parametrize("source", ["auto", "folder", "csv", "bar", "urbancars", "imagenet-9"])
def test_the_command_refuses_a_rho_for_images_that_are_read_as_they_are(capsys, tmp_path, source):
    line = refused(capsys, tmp_path, source, "--rho", "0.9")
    assert f"--rho: images are read as they are (source {source}); rho is for digits" in line


def test_the_command_reads_what_a_run_of_the_preset_reads(capsys, tmp_path):
    assert cli.main(["data", str(bar(tmp_path, (10,) * 6, (10,) * 6)), "--as", "bar"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["all", "60", "0", "60"] in rows, "the preset holds nothing out"
    faces = bffhq(tmp_path / "faces")
    bffhq(faces, (("align", 3), ("conflict", 1)), percent="2pct")
    for words, aligned in (((), 4), (("--rho", "0.98"), 3)):
        assert cli.main(["data", str(faces), "--as", "bffhq", *words]) == 0
        assert f"young, female{aligned:>9}" in capsys.readouterr().out


def test_the_command_refuses_a_set_it_does_not_know(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", str(tmp_path), "--as", "celeba"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "urbancars" in lines[0]
