"""Folders and CSVs as people have them, right and wrong."""

import logging
import os
from collections import Counter

import pytest
from PIL import Image

from ddb_fast.config import DataConfig
from ddb_fast.data.sources import check_outside, describe, list_csv, list_folder, open_listing


def photo(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(path)
    return path


def photos(root, classes=("cat", "dog"), count=10):
    for name in classes:
        for i in range(count):
            photo(root / name / f"{i}.png")
    return root


def per_split(listing):
    return Counter(listing.split)


def one_line(function, *arguments, **options):
    """The message of the ValueError that a call ends in."""
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_of_classes(tmp_path):
    listing = list_folder(photos(tmp_path / "pets", classes=("dog", "cat", "Ant")))
    assert listing.name == "pets"
    assert listing.classes == ("Ant", "cat", "dog")
    assert listing.biases is None and listing.a is None
    assert per_split(listing) == {"train": 21, "val": 3, "test": 6}
    for i, path in enumerate(listing.paths):
        assert listing.classes[listing.y[i]] == path.split("/")[0]
    assert listing.read(0).size == (3, 2)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("training", "validation", "testing"),
        ("train", "valid", "test"),
        ("train", "dev", "test"),
        ("Train", "Val", "TEST"),
    ],
)
def test_a_folder_with_splits(tmp_path, train, val, test):
    for split, count in ((train, 4), (val, 2), (test, 3)):
        photos(tmp_path / split, count=count)
    listing = list_folder(str(tmp_path))
    assert listing.classes == ("cat", "dog")
    assert per_split(listing) == {"train": 8, "val": 4, "test": 6}
    assert listing.paths[0] == f"{train}/cat/0.png"
    assert {
        p.split("/")[0] for p, s in zip(listing.paths, listing.split, strict=True) if s == "val"
    } == {val}


def test_splits_without_a_folder_are_held_out_of_train(tmp_path):
    photos(tmp_path / "train", count=20)
    photos(tmp_path / "test", classes=("cat",), count=3)
    assert per_split(list_folder(tmp_path)) == {"train": 36, "val": 4, "test": 3}


def test_the_shares_are_the_configurations(tmp_path):
    root = photos(tmp_path)
    listing = open_listing(DataConfig(path=str(root), validation_share=0.5, test_share=0.0))
    assert per_split(listing) == {"train": 10, "val": 10}
    again = open_listing(DataConfig(source="folder", path=str(root)))
    assert per_split(again) == {"train": 14, "val": 2, "test": 4}


def test_folders_inside_a_class_are_read(tmp_path):
    photos(tmp_path, count=1)
    photo(tmp_path / "cat" / "2019" / "summer" / "x.jpg")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat")
    assert "cat/2019/summer/x.jpg" in list_folder(tmp_path).paths
    assert len(list_folder(tmp_path)) == 3


def test_links_that_give_a_class_the_images_of_another_are_refused(tmp_path):
    root = photos(tmp_path / "up", count=2)
    (root / "cat" / "up").symlink_to("..")
    line = one_line(list_folder, root)
    assert "dog/0.png is the same file as cat/up/dog/0.png; keep one" in line
    root = photos(tmp_path / "file", count=2)
    (root / "cat" / "x.png").symlink_to(root / "dog" / "0.png")
    assert "dog/0.png is the same file as cat/x.png" in one_line(list_folder, root)
    outside = photos(tmp_path / "outside", count=2)
    root = photos(tmp_path / "linked", classes=("cat",), count=2)
    (root / "fox").symlink_to(outside / "cat")
    (root / "cat" / "more").symlink_to(outside / "dog")
    assert len(list_folder(root)) == 6


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    pipe = photos(tmp_path, count=2) / "cat" / "pipe.png"
    os.mkfifo(pipe)
    assert "cat/pipe.png is no file" in one_line(list_folder, tmp_path)
    pipe.unlink()
    pipe.symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"pipe\.png"):
        list_folder(tmp_path)


def test_a_run_and_the_images_are_apart(tmp_path):
    root = photos(tmp_path / "photos", count=2)
    config = DataConfig(path=str(root))
    for out in (root, root / "runs" / "a", root / "cat" / "a", root / "x" / ".." / "a"):
        line = one_line(check_outside, config, out)
        assert "lies within the images" in line and "--out" in line
    for out in (tmp_path / "runs", tmp_path / "photos-2", root / ".runs" / "a"):
        check_outside(config, out)
    path = table(tmp_path, "path,y\na.png,0\nb.png,1\n")
    check_outside(DataConfig(path=str(path)), tmp_path / "runs")
    check_outside(DataConfig(source="digits"), tmp_path)

    photo(root / "runs" / "a" / "synthetic" / "grid.png")
    for name in ("manifest.json", "config.json"):
        (root / "runs" / "a" / name).touch()
    assert "runs/a: a run's folder among the images; move it" in one_line(list_folder, root)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    scan = os.scandir
    locked = photos(tmp_path, classes=("cat", "dog/locked")) / "dog" / "locked"

    def refusing(path):
        if str(path) == str(locked):
            raise PermissionError(13, os.strerror(13), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="locked"):
        list_folder(tmp_path)


def test_every_extension_counts_and_other_files_do_not(tmp_path, caplog):
    photos(tmp_path, classes=("cat",), count=1)
    suffixes = ("jpg", "JPEG", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm")
    for suffix in suffixes:
        photo(tmp_path / "dog" / f"x.{suffix}")
    (tmp_path / "dog" / "notes.txt").write_text("a note")
    (tmp_path / "dog" / "._x.jpg").write_bytes(b"left by another system")
    photo(tmp_path / "dog" / ".thumbnails" / "x.png")
    photo(tmp_path / ".trash" / "x.png")
    (tmp_path / "README.md").write_text("read me")
    with caplog.at_level(logging.INFO):
        listing = list_folder(tmp_path)
    assert sum(p.startswith("dog/") for p in listing.paths) == len(suffixes)
    assert listing.classes == ("cat", "dog")
    assert "3 other files ignored" in caplog.text


@pytest.mark.parametrize(
    "name", ["größe 1.png", "a'b\"c.png", "one, two.png", "日本.png", "#?%&.png"]
)
def test_awkward_names(tmp_path, name):
    photos(tmp_path, count=2)
    photo(tmp_path / "katze schön" / name, colour=200)
    listing = list_folder(tmp_path)
    i = listing.paths.index(f"katze schön/{name}")
    assert listing.read(i).getpixel((0, 0)) == (200, 0, 0)


def test_a_class_may_be_called_train(tmp_path):
    listing = list_folder(photos(tmp_path, classes=("bus", "car", "train")))
    assert listing.classes == ("bus", "car", "train")


def test_annotations_beside_the_splits_are_ignored(tmp_path):
    photos(tmp_path / "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").write_text("{}")
    assert list_folder(tmp_path).classes == ("cat", "dog")


TREE = "expected ROOT/CLASS/*.jpg or ROOT/{train,val,test}/CLASS/*.jpg"


def test_wrong_folders(tmp_path):
    def case(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    line = one_line(list_folder, tmp_path / "absent")
    assert "absent: no such folder" in line and TREE in line

    line = one_line(list_folder, case("empty"))
    assert "empty: no images found" in line and TREE in line and ".jpeg" in line

    loose = case("loose")
    photo(loose / "a.png")
    line = one_line(list_folder, loose)
    assert "1 images but none in a class folder" in line and TREE in line

    line = one_line(list_folder, photos(case("one"), classes=("cat",)))
    assert "one: only one class, cat" in line

    lacking = photos(
        photos(case("lacking") / "train").parent / "test", classes=("dog", "fox")
    ).parent
    line = one_line(list_folder, lacking)
    assert "class fox has no training images (10 test)" in line

    hollow = photos(case("hollow"))
    (hollow / "fox").mkdir()
    assert "class fox has no training images (none at all)" in one_line(list_folder, hollow)

    headless = photos(case("headless") / "test").parent
    line = one_line(list_folder, headless)
    assert "test/ but no train/" in line and TREE in line

    mixed = photos(photos(case("mixed") / "train").parent, classes=("fox",))
    line = one_line(list_folder, mixed)
    assert "fox/ holds images beside train/" in line and TREE in line

    double = photos(photos(photos(case("double") / "train").parent / "val").parent / "valid").parent
    assert "both val/ and valid/" in one_line(list_folder, double)

    flat = case("flat")
    photo(flat / "train" / "a.png")
    line = one_line(list_folder, flat)
    assert "1 images but none in a class folder" in line and TREE in line


# --- CSV ---------------------------------------------------------------------------------------


def table(tmp_path, text, names=("a.png", "b.png"), **options):
    for name in names:
        photo(tmp_path / name)
    path = tmp_path / "table.csv"
    path.write_text(text, **{"encoding": "utf-8"} | options)
    return path


def test_all_columns(tmp_path):
    rows = ["id, y ,split,a,path", "7,1,train,0,b.png", "8,0,TRAIN,1,a.png", '9,0,2,0,"x/ü, 1.png"']
    rows += ["1,1,valid,1,./c.png", ""]
    path = table(tmp_path, "\n".join(rows), names=("a.png", "b.png", "c.png", "x/ü, 1.png"))
    listing = list_csv(path)
    assert listing.name == "table"
    assert listing.classes == ("0", "1") and listing.biases == ("0", "1")
    assert listing.paths == ("a.png", "b.png", "c.png", "x/ü, 1.png")
    assert listing.split == ("train", "train", "val", "test")
    assert listing.y.tolist() == [0, 1, 1, 0]
    assert listing.a.tolist() == [1, 0, 1, 0]
    assert listing.read(3).size == (3, 2)


def test_lines_and_cells_without_anything_in_them_are_passed_over(tmp_path):
    text = "\n\npath,y,,\n\na.png,0,,\nb.png,1,,,\n\n"
    assert list_csv(table(tmp_path, text)).paths == ("a.png", "b.png")


def test_wilds_numbers_its_splits(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    rows = [f"{name},{i % 2},{i // 2}" for i, name in enumerate(names)]
    listing = list_csv(table(tmp_path, "\n".join(["path,y,split", *rows]), names=names))
    assert listing.split == ("train",) * 2 + ("val",) * 2 + ("test",) * 2


def test_a_csv_without_splits_is_held_out_like_a_folder(tmp_path):
    names = [f"{y}/{i}.png" for y in (0, 1) for i in range(10)]
    rows = [f"{name},{name[0]}" for name in names]
    listing = list_csv(table(tmp_path, "\ufeff" + "\n".join(["path,y", *rows]), names=names))
    folder = list_folder(table(tmp_path / "x", "", names=names).parent)
    assert listing.biases is None
    assert (listing.paths, listing.split) == (folder.paths, folder.split)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column `path`", "found nothing"]),
        ("path,y\n", ["no rows"]),
        ("path,label\na.png,0\n", ["no column `y`", "found path, label"]),
        ("path;y\na.png;0\n", ["no column `path`", "found path;y"]),
        ("path,y\na.png,0\nmissing.png,1\n", ["line 3", "missing.png"]),
        ("path,y\na.png,0\n,1\n", ["line 3", "''"]),
        ("path,y\na.png,0\nx.npy,1\n", ["line 3", "x.npy", ".jpeg"]),
        ("path,y\na.png,0\nb.png,2\n", ["y must be numbered", "1 is missing", "0..2"]),
        ("path,y\na.png,1\nb.png,2\n", ["y must be numbered", "0 is missing"]),
        ("path,y\na.png,-1\nb.png,0\n", ["-1 is negative"]),
        ("path,y\na.png,cat\nb.png,dog\n", ["line 2", "y is 'cat', not an integer"]),
        ("path,y\na.png,0.0\nb.png,1.0\n", ["line 2", "'0.0'"]),
        ("path,y\na.png,0\nb.png\n", ["line 3", "y is None"]),
        ("path,y,a\na.png,0,red\nb.png,1,0\n", ["line 2", "a is 'red'"]),
        ("path,y,a\na.png,0,0\nb.png,1,3\n", ["a must be numbered", "1 is missing"]),
        ("path,y,split\na.png,0,train\nb.png,1,holdout\n", ["line 3", "'holdout'", "train"]),
        ("path,y,split\na.png,0,train\nb.png,1,\n", ["line 3", "split is ''"]),
        ("path,y,split\na.png,0,train\nb.png,1,test\n", ["class 1 has no training images"]),
        ("path,y\na.png,0\n./a.png,1\n", ["a.png is listed twice"]),
        ("path,y\na.png,0\nb.png,0\n", ["only one class, 0"]),
        ('path,y\na.png,0\n"b.png,1\n', ["line 3", "quote"]),
        ('path,y,x\na.png,0,"?\nb.png,1,\nc.png,1,"ok"\n', ["line 2", "quote"]),
        ('path,y,x\na.png,0,"?\nb.png,1,"\nb.png,1,\n', ["line 3: x holds a line break"]),
        ("path,y, y \na.png,0,1\nb.png,1,0\n", ["column `y` is there twice"]),
        ("path,y,a,a\na.png,0,1,0\nb.png,1,0,1\n", ["column `a` is there twice"]),
        ("path,y\na.png,0,1\nb.png,1,0\n", ["line 2: 3 values for 2 columns"]),
        ("y,path\n0,a.png\n1,b.png,c.png\n", ["line 3: 3 values for 2 columns"]),
    ],
)
def test_wrong_tables(tmp_path, text, words):
    line = one_line(list_csv, table(tmp_path, text))
    assert "table" in line
    assert [word for word in words if word not in line] == [], line


def test_a_file_under_two_spellings_is_listed_twice(tmp_path):
    (tmp_path / "photos").mkdir()
    text = "path,y\na.png,0\nb.png,1\nphotos/../a.png,1\n"
    line = one_line(list_csv, table(tmp_path, text))
    assert "photos/../a.png is listed twice" in line
    (tmp_path / "again").symlink_to(tmp_path)
    line = one_line(list_csv, table(tmp_path, "path,y\na.png,0\nb.png,1\nagain/a.png,1\n"))
    assert "again/a.png is the same file as a.png" in line


def test_a_csv_that_is_not_text(tmp_path):
    line = one_line(list_csv, table(tmp_path, "path,y\nä.png,0\n", encoding="latin-1"))
    assert "UTF-8" in line
    assert "no such file" in one_line(list_csv, tmp_path / "absent.csv")


# --- dispatch ----------------------------------------------------------------------------------


def test_auto_tells_folders_and_tables_apart(tmp_path):
    path = table(tmp_path / "t", "path,y\na.png,0\nb.png,1\n")
    assert open_listing(DataConfig(path=str(path))).name == "table"
    assert open_listing(DataConfig(path=str(photos(tmp_path / "pets")))).name == "pets"
    renamed = path.rename(path.with_suffix(".txt"))
    assert open_listing(DataConfig(source="csv", path=str(renamed))).name == "table"
    line = one_line(open_listing, DataConfig(path=str(renamed)))
    assert ".txt extension" in line and ".csv" in line


def test_dispatch_refuses(tmp_path):
    assert "--data FOLDER" in one_line(open_listing, DataConfig())
    line = one_line(open_listing, DataConfig(path=str(tmp_path / "absent")))
    assert "absent: no such file or folder" in line and TREE in line
    path = table(tmp_path, "path,y\na.png,0\nb.png,1\n")
    assert "no such folder" in one_line(open_listing, DataConfig(source="folder", path=str(path)))
    assert "no such file" in one_line(open_listing, DataConfig(source="csv", path=str(tmp_path)))


def test_the_embedded_digits_take_rho():
    listing = open_listing(DataConfig(source="digits", rho=0.9))
    conflicting = sum(e.a != e.y for e in listing.entries if e.split == "train")
    assert conflicting / listing.split.count("train") == pytest.approx(0.1, abs=0.005)


def test_description(tmp_path):
    for split, count in (("train", 4), ("test", 3)):
        photos(tmp_path / split, count=count)
    photos(tmp_path / "val", classes=("dog",), count=1)
    text = describe(list_folder(tmp_path))
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["class", "train", "val", "test"],
        ["cat", "4", "0", "3"],
        ["dog", "4", "1", "3"],
        ["all", "8", "1", "6"],
    ]
    assert "15 images, 2 classes" in text
    path = table(tmp_path / "t", "path,y,a,split\na.png,0,1,train\nb.png,1,0,train\n")
    rows = [line.split() for line in describe(list_csv(path)).splitlines()]
    assert ["0,", "1", "1", "0", "0"] in rows and ["0,", "0", "0", "0", "0"] in rows
