"""Scores worked by hand, the table they stand in, and the files it becomes."""

import csv
import io
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn

from ddb_fast import scoring
from ddb_fast.config import ClassifierConfig, PseudoLabelConfig
from ddb_fast.scoring import (
    COLUMNS,
    ScoreTable,
    joined,
    logits_of,
    read_scores,
    table_format,
    table_of,
    training_statistics,
)

RULES = PseudoLabelConfig()
CONFIG = ClassifierConfig(images=1, batch_size=1, image_size=4, pixel_norm="symmetric")


def logits_of_losses(y, losses):
    """Two classes, and the label's probability is exp(-loss)."""
    rows = []
    for label, loss in zip(y, losses, strict=True):
        row = [math.log(1 - math.exp(-loss))] * 2
        row[label] = -loss
        rows.append(row)
    return torch.tensor(rows)


@pytest.fixture
def statistics():
    """Class cat: losses 0.1, 0.2, 0.3, all right, and 5 wrong; class dog: 0.1, 0.3."""
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    loss = torch.tensor([0.1, 0.2, 0.3, 5.0, 0.1, 0.3])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1])
    return training_statistics(loss, predicted, y, ("cat", "dog"), RULES)


def test_statistics_are_those_of_the_right_ones(statistics):
    spread = math.sqrt((0.01 + 0 + 0.01) / 3)
    torch.testing.assert_close(statistics.mean, torch.tensor([0.2, 0.2]).double())
    torch.testing.assert_close(statistics.std, torch.tensor([spread, 0.1]).double())
    expected = torch.tensor([0.2 + 3 * spread, 0.5]).double()
    torch.testing.assert_close(statistics.threshold, expected)
    assert statistics.by_error_set.tolist() == [False, False]


def test_three_images_by_hand(statistics):
    """As usual; misclassified and far above; right, though above the threshold 0.5."""
    y = torch.tensor([0, 0, 1])
    logits = logits_of_losses(y.tolist(), [0.2, 0.9, 0.6])
    table = table_of(logits, statistics, paths=["a.png", "b.png", "c.png"], split="new", y=y)
    assert table.predicted.tolist() == [0, 1, 1]
    assert table.loss.dtype == np.float32
    assert table.loss == pytest.approx([0.2, 0.9, 0.6])
    assert table.score == pytest.approx([0, 0.7 / math.sqrt(0.02 / 3), 4], abs=1e-5)
    assert table.conflicting.tolist() == [False, True, False]
    expected = torch.softmax(logits, dim=1).numpy()
    assert table.probabilities == pytest.approx(expected, abs=1e-6)
    assert table.columns()["probability_y"] == pytest.approx(np.exp([-0.2, -0.9, -0.6]))
    assert accuracy_score(y, table.predicted) == 2 / 3


def test_a_class_where_nothing_passes_takes_its_errors_elsewhere_too(caplog):
    y = torch.tensor([0, 0, 0, 1, 1])
    loss = torch.tensor([0.1, 0.5, 0.8, 0.2, 0.2])
    predicted = torch.tensor([0, 0, 1, 1, 1])
    with caplog.at_level("WARNING", logger="ddb_fast.scoring"):
        found = training_statistics(loss, predicted, y, ("cat", "dog"), RULES)
    assert found.by_error_set.tolist() == [True, False] and "class cat" in caplog.text
    new = torch.tensor([0, 0, 1])
    table = table_of(logits_of_losses([0, 0, 1], [0.8, 0.1, 0.7]), found, paths=[*"abc"], y=new)
    assert table.predicted.tolist() == [1, 0, 0]
    assert table.conflicting.tolist() == [True, False, True]
    everywhere = PseudoLabelConfig(filter="none")
    found = training_statistics(loss, predicted, y, ("cat", "dog"), everywhere)
    assert found.by_error_set.all()


def test_the_warning_for_many_classes_is_one_line(caplog):
    """Every command that scores gives it: with 1,000 classes there were hundreds of lines."""
    y = torch.arange(8).repeat_interleave(3)
    loss, predicted = torch.tensor([0.1, 0.5, 0.8]).repeat(8), (y + torch.arange(24) % 3 // 2) % 8
    with caplog.at_level("WARNING", logger="ddb_fast.scoring"):
        found = training_statistics(loss, predicted, y, "abcdefgh", RULES)
    assert found.by_error_set.all()
    (record,) = caplog.records
    assert record.getMessage().startswith("class a, b, c, d, e and 3 more: no image passes")


class Answers(nn.Module):
    """A network that knows what to say of each grey level."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits[(x[:, 0, 0, 0] * 127.5 + 127.5).round().long()]


def test_more_images_than_a_batch_are_asked_in_their_order(statistics):
    y = torch.arange(300) % 2
    losses = torch.linspace(0.01, 2, 300).tolist()
    network = Answers(logits_of_losses(y.tolist(), losses)[:256])
    grey = torch.arange(300).remainder(256).byte()
    pixels = grey.view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    logits = logits_of(network, pixels, CONFIG, device=torch.device("cpu"), crop=False)
    paths = [f"{i}.png" for i in range(300)]
    table = table_of(logits, statistics, paths=paths, split="val", y=y)
    assert table.path.tolist() == paths and set(table.split) == {"val"}
    assert table.loss[:256] == pytest.approx(losses[:256], rel=1e-5)
    blind = table_of(logits, statistics, paths=paths)
    assert blind.path[7] == "7.png" and blind.score is None
    assert np.array_equal(blind.probabilities, table.probabilities)
    with pytest.raises(ValueError, match="not of 2 classes"):
        table_of(logits, statistics, paths=paths, y=torch.full((300,), 2))


class Shown(nn.Module):
    """Remembers what it is shown, and in which mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, x))
        return torch.zeros(len(x), 2)


def test_the_whole_small_image_is_scored():
    """The corners too, which a target classifier's centre crop leaves out."""
    pixels = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    pixels[:, :4, :4] = pixels[:, -4:, -4:] = 255
    network = Shown()
    logits_of(network, pixels, CONFIG, device=torch.device("cpu"), crop=False)
    ((training, x),) = network.seen
    # Of 4 x 4 pixels the first and the last are lighter; a crop of 56 loses the marks.
    assert (x[0, 0] > -1).nonzero().tolist() == [[0, 0], [3, 3]] and not training


def test_target_classifiers_are_asked_of_the_centre():
    pixels = torch.randint(0, 256, (300, 16, 16, 3), dtype=torch.uint8)
    network, config = Shown(), replace(CONFIG, image_size=14)
    logits = logits_of(network, pixels, config, device=torch.device("cpu"), crop=True)
    assert logits.shape == (300, 2) and [t for t, _ in network.seen] == [False, False]
    # 14 of 16 pixels are the share of a plain crop.
    expected = pixels[:, 1:15, 1:15].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(torch.cat([x for _, x in network.seen]), expected)


@pytest.fixture
def table(statistics):
    parts = []
    for split, y, losses in (("train", [0, 1], [0.2, 0.9]), ("test", [1], [0.25])):
        parts.append(
            table_of(
                logits_of_losses(y, losses),
                statistics,
                paths=[f'{split}, "{i}".png' for i in range(len(y))],
                split=split,
                y=torch.tensor(y),
            )
        )
    return joined(parts)


def test_tables_are_joined_row_by_row(table):
    assert len(table) == 3 and table.split.tolist() == ["train", "train", "test"]
    assert table.y.tolist() == [0, 1, 1] and table.probabilities.shape == (3, 2)
    assert table.conflicting.tolist() == [False, True, False]


def test_rows_are_chosen_by_mask_or_in_an_order(table, statistics):
    worst = table.where(table.score.argsort()[::-1])
    assert worst.score.tolist() == sorted(table.score, reverse=True)
    assert worst.path[0] == 'train, "1".png' and worst.classes == table.classes
    assert table.where(table.split == "test").y.tolist() == [1]
    blind = table_of(logits_of_losses([0, 1], [0.2, 0.9]), statistics, paths=["a", "b"])
    assert blind.where(np.array([1])).y is None


def test_csv_holds_every_column_and_reads_back(table, tmp_path):
    path = tmp_path / "new" / "scores.csv"
    table.write(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*COLUMNS, "probability_of_cat", "probability_of_dog"]
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    assert [row["pseudo_conflicting"] for row in rows] == ["0", "1", "0"]
    for row in rows:
        of_label = row["probability_of_dog" if row["y"] == "1" else "probability_of_cat"]
        assert float(of_label) == pytest.approx(float(row["probability_y"]), rel=1e-6)
    back, train = read_scores(path), table.where(table.split == "train")
    for name in ("y", "predicted", "loss", "conflicting"):
        assert torch.equal(getattr(back, name), torch.from_numpy(getattr(train, name))), name
    torch.testing.assert_close(back.score, torch.from_numpy(train.score).float())
    assert not list(tmp_path.rglob("*.part"))
    table.write(path, probabilities=False)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_table_is_read_without_a_dictionary_for_each_of_its_rows(table, tmp_path, monkeypatch):
    """500,000 rows as dictionaries took 350 MB."""
    table.write(tmp_path / "scores.csv")
    alive, most = weakref.WeakSet(), []

    class Row(dict):
        __hash__ = object.__hash__

    class Reader(csv.DictReader):
        def __next__(self):
            row = Row(super().__next__())
            alive.add(row)
            most.append(len(alive))
            return row

    monkeypatch.setattr(csv, "DictReader", Reader)
    assert read_scores(tmp_path / "scores.csv", images=3).y.tolist() == [0, 1]
    assert len(most) == 3 and max(most) <= 2


def test_json_is_a_list_of_rows(table, tmp_path):
    table.write(tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["path"] for row in rows] == table.path.tolist()
    assert rows[1]["pseudo_conflicting"] is True and rows[0]["y"] == 0
    assert [row["score"] for row in rows] == table.score.tolist()


def test_a_table_becomes_text_some_rows_at_a_time(table, statistics, tmp_path, monkeypatch):
    """All cells at once as Python objects took gigabytes where there are 1,000 classes."""
    blind = table_of(logits_of_losses([0, 1, 1], [0.2, 0.9, 0.3]), statistics, paths=[*"abc"])
    cases = [(one, form) for one in (table, blind) for form in ("csv", "json")]
    whole = ["".join(one.parts(form)) for one, form in cases]
    converted, cells = [], ScoreTable.columns

    def counted(self, **options):
        converted.append(len(self))
        return cells(self, **options)

    monkeypatch.setattr(scoring, "_AT_ONCE", 2)
    monkeypatch.setattr(ScoreTable, "columns", counted)
    for (one, form), expected in zip(cases, whole, strict=True):
        one.write(tmp_path / "scores", form)
        assert (tmp_path / "scores").read_bytes().decode() == expected == "".join(one.parts(form))
    assert set(converted) == {1, 2}
    empty = table.where(np.array([], dtype=int))
    assert json.loads("".join(empty.parts("json"))) == []
    assert len("".join(empty.parts()).splitlines()) == 1


def test_parquet_keeps_types(table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")
    table.write(tmp_path / "scores.parquet")
    read = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(read) == [*COLUMNS, "probability_of_cat", "probability_of_dog"]
    assert read["score"] == table.score.tolist() and read["path"] == table.path.tolist()
    assert read["pseudo_conflicting"] == [False, True, False]


def test_columns_make_a_data_frame(table):
    pandas = pytest.importorskip("pandas", reason="a frame needs pandas")
    frame = pandas.DataFrame(table.columns())
    assert frame.sort_values("score")["index"].tolist() == np.argsort(table.score).tolist()
    assert frame["pseudo_conflicting"].dtype == bool


def test_without_labels_there_are_predictions_and_nothing_else(statistics):
    logits = logits_of_losses([0, 1], [0.2, 0.9])
    table = table_of(logits, statistics, paths=["a.png", "b.png"])
    assert (table.y, table.loss, table.score, table.conflicting) == (None,) * 4
    rows = list(csv.DictReader(io.StringIO("".join(table.parts()))))
    for name in ("split", "y", "loss", "probability_y", "score", "pseudo_conflicting"):
        assert [row[name] for row in rows] == ["", ""], name
    assert [row["predicted"] for row in rows] == ["0", "0"]
    assert float(rows[1]["probability_of_cat"]) == pytest.approx(1 - math.exp(-0.9))
    assert json.loads("".join(table.parts("json")))[0]["score"] is None


def test_a_class_may_be_called_y():
    y = torch.tensor([0, 1])
    found = training_statistics(torch.tensor([0.1, 0.1]), y, y, ("x", "y"), RULES)
    table = table_of(logits_of_losses([0, 1], [0.1, 0.7]), found, paths=["a", "b"], y=y)
    columns = table.columns()
    assert len(columns) == len(COLUMNS) + 2
    assert columns["probability_of_y"] == pytest.approx([1 - math.exp(-0.1), math.exp(-0.7)])


@pytest.mark.parametrize(
    ("path", "format", "told"),
    [
        ("scores.txt", None, r"scores\.txt: format 'txt' is none of csv, parquet, json"),
        ("scores", None, "format '' is none of"),
        (None, "xml", "^format 'xml' is none of"),
        (None, "parquet", "name a file"),
    ],
)
def test_formats_that_there_are_not(path, format, told):
    with pytest.raises(ValueError, match=told):
        table_format(path, format)


def test_formats_are_asked_for_or_guessed(tmp_path):
    assert table_format(None) == "csv" and table_format("A.JSON") == "json"
    assert table_format("scores.txt", "csv") == "csv"
    with pytest.raises(ValueError, match="a folder; name a file"):
        table_format(tmp_path, "csv")


def test_parquet_says_what_to_install(monkeypatch, table, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"parquet needs pyarrow \(pip install pyarrow\)"):
        table.write(tmp_path / "scores.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "split\ntrain\n", "split,y\ntrain,cat\n", "a,b\n1,2\n"])
def test_what_is_no_table_of_scores_is_refused(text, tmp_path):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.csv: not a table of scores"):
        read_scores(tmp_path / "scores.csv")


def test_paths_are_as_many_as_images(statistics):
    with pytest.raises(ValueError, match="1 paths for 2 images"):
        table_of(logits_of_losses([0, 1], [0.1, 0.1]), statistics, paths=["a.png"])


def test_a_table_that_was_cut_between_two_rows_is_refused(table, tmp_path):
    path = tmp_path / "scores.csv"
    table.write(path)
    assert len(read_scores(path, images=len(table)).y)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=rf"scores\.csv: {len(table) - 1} rows, but the run has"):
        read_scores(path, images=len(table))
