"""Images for a finished run: listed as a run would, or less strictly; decoded batch by batch."""

import pytest
from PIL import Image
from three_digits import write_photos, write_table

from ddb_fast.config import DataConfig
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import squash
from ddb_fast.data.unseen import batches, list_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("three digits"))


@pytest.mark.parametrize("name", ["table.csv", "."])
def test_what_a_run_could_train_on_is_listed_as_a_run_lists_it(photos, name):
    config = DataConfig(path=str(photos / name))
    listing = open_listing(config)
    images = list_images(config, listing.classes)
    assert images.entries == listing.entries and images.labelled
    assert images.biases == listing.biases and images.name == listing.name


def test_numbers_are_those_that_a_run_reads_however_they_are_written(tmp_path):
    rows = [
        {"path": f"{i}.png", "y": y, "a": a}
        for i, (y, a) in enumerate([("00", "01"), ("1", " 00"), ("+1", "1"), ("0", "0")])
    ]
    for row in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / row["path"])
    config = DataConfig(path=str(write_table(tmp_path / "table.csv", rows)))
    listing = open_listing(config)
    images = list_images(config, listing.classes)
    assert (images.entries, images.biases) == (listing.entries, listing.biases)
    assert {entry.path: (entry.y, entry.a) for entry in images.entries} == {
        "0.png": (0, 1), "1.png": (1, 0), "2.png": (1, 1), "3.png": (0, 0)
    }  # fmt: skip
    # Folders are named as they are.
    classes = ("0", "+1", "1", "00")
    assert [e.y for e in list_images(config, classes).entries] == [0, 1, 2, 3]


def test_splits_are_held_out_as_in_a_run(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    config = DataConfig(path=str(tmp_path), test_share=0.25)
    listing = open_listing(config)
    assert listing.split.count("test") == 10
    assert list_images(config, ("cat", "dog")).entries == listing.entries


def test_classes_are_matched_by_name(tmp_path):
    for name in ("10", "2"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    classes = tuple(str(label) for label in range(11))
    entries = list_images(DataConfig(path=str(tmp_path)), classes).entries
    assert {entry.path: entry.y for entry in entries} == {"10/a.png": 10, "2/a.png": 2}
    rows = [{"path": "10/a.png", "y": " dog"}, {"path": "2/a.png", "y": "cat"}]
    table = write_table(tmp_path / "named.csv", rows)
    entries = list_images(DataConfig(path=str(table)), ("dog", "bird", "cat")).entries
    assert {entry.path: entry.y for entry in entries} == {"10/a.png": 0, "2/a.png": 2}
    images = list_images(DataConfig(source="digits"), tuple("9876543210"))
    assert {(entry.path.split("/")[1], entry.y) for entry in images.entries} == {
        (str(digit), 9 - digit) for digit in range(10)
    }


def test_no_row_of_a_table_searches_through_the_names(tmp_path):
    """With 1,000 classes that took a third of the listing."""

    class Names(tuple):
        searches = 0

        def index(self, name):
            self.searches += 1
            return super().index(name)

    names, rows = Names(("cat", "dog")), []
    for i in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "y": names[i % 2]})
    table = write_table(tmp_path / "table.csv", rows)
    entries = list_images(DataConfig(path=str(table)), names).entries
    assert sorted((entry.path, entry.y) for entry in entries) == [
        (f"{i}.png", i % 2) for i in range(4)
    ]
    assert names.searches == 0


def test_a_split_alone_is_enough(tmp_path):
    (tmp_path / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "test/cat/a.png")
    (entry,) = list_images(DataConfig(path=str(tmp_path)), ("cat", "dog")).entries
    assert (entry.split, entry.y) == ("test", 0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"path": "a.png", "y": "bird"}], r"line 2: class 'bird' is none of the run's: cat, dog"),
        ([{"path": "a.png", "y": "cat"}, {"path": "b.png", "y": ""}], "line 3: y is empty"),
        ([{"path": "a.png", "y": "cat", "a": ""}], "line 2: a is empty"),
        ([{"path": "none.png"}], "no file"),
        ([{"path": "a.png"}, {"path": "a.png"}], r"a\.png is listed twice"),
        ([{"path": "a.png"}, {"path": "x/../a.png"}], r"x/\.\./a\.png is listed twice"),
        ([{"path": "a.png", "y": "cat", "split": "all"}], "split is 'all'"),
        ([{"file": "a.png"}], "no column `path`"),
    ],
)
def test_wrong_tables(tmp_path, rows, told):
    (tmp_path / "x").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(ValueError, match=told):
        list_images(DataConfig(path=str(table)), ("cat", "dog"))


def test_wrong_folders(tmp_path):
    for name, told in (("none", "no such file or folder"), ("empty", "no images found")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=told):
            list_images(DataConfig(path=str(tmp_path / name)), ("cat", "dog"))
    (tmp_path / "bird").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "bird/a.png")
    with pytest.raises(ValueError, match=r"bird: class 'bird' is none of the run's: cat, dog"):
        list_images(DataConfig(path=str(tmp_path)), ("cat", "dog"))


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        list_images(DataConfig(path=str(tmp_path)), ("cat", "dog"))


def test_memory_is_flat(photos):
    """No more than two batches are decoded ahead of what was handed out."""
    entries = list_images(DataConfig(path=str(photos)), ("0", "1", "2")).entries
    decoded = []

    def fitted(image):
        decoded.append(None)
        return squash(image, 16)

    handed = 0
    for part, pixels in batches(entries, fitted, size=20):
        assert pixels.shape == (len(part), 16, 16, 3)
        handed += len(part)
        assert len(decoded) - handed < 2 * 20
    assert handed == len(decoded) == len(entries)
