"""Finished runs side by side: hand-made results, so that every cell can be read off here."""

import json
import re
from dataclasses import replace

import pytest

from ddb_fast import cli
from ddb_fast.compare import compare
from ddb_fast.compared_runs import read_run
from ddb_fast.config import with_fields
from ddb_fast.fields import to_json
from ddb_fast.metrics import summarise, wilson_interval
from ddb_fast.presets import PRESETS
from ddb_fast.published import PUBLISHED
from ddb_fast.tabular import COLUMNS


def entry(*, groups=(), **metrics):
    """A method's part of results.json; each metric as its values over the seeds."""
    return {"metrics": {k: summarise(v) for k, v in metrics.items()}, "groups": list(groups)}


def group(name, n, *accuracy):
    low, high = wilson_interval(sum(accuracy) / len(accuracy) * n, n)
    row = {"name": name, "y": 0, "a": 0, "n": n}
    return row | {"accuracy": list(accuracy), "low": low, "high": high}


def finished(
    folder, methods, *, preset="digits", dataset=None, images=None, seeds=(0, 1), **fields
):
    """Write a run's folder as `ddb-fast run` leaves it; returns its path as text."""
    config = with_fields(PRESETS[preset](), {k.replace("__", "."): v for k, v in fields.items()})
    config = replace(config, out=str(folder), methods=tuple(methods), seeds=tuple(seeds))
    results = {"format": 1, "dataset": dataset or config.data.source, "preset": preset}
    results |= {"split": "test", "selection": "last", "seeds": list(seeds), "methods": methods}
    results |= {"synthetic": None, "amplifier": None, "seconds": {"erm/seed0": 1.0}}
    data = {"data.fingerprint": images or f"{results['dataset']} {config.data.rho}"}
    manifest = {"stages": {"data": {"done": True, "fields": data}}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def cells(text, title=None):
    """The first Markdown table (below a title) as {row's name: [its cells]}."""
    after = text if title is None else text.split(f"### {title}\n")[1]
    lines = after[after.index("|") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({len(row) for row in rows if not set("".join(row)) <= set("-|")}) == 1
    return {row[0]: row[1:] for row in [rows[0], *rows[2:]]}


def told(*paths, **options):
    return compare([read_run(path) for path in paths], **options)


@pytest.fixture
def two_rho(tmp_path):
    """Colored MNIST at .98 and .995; DDB-II at one of them only."""
    less = {
        "erm": entry(unbiased_accuracy=[0.6, 0.64], average_accuracy=[0.5, 0.5]),
        "ddb-ii": entry(unbiased_accuracy=[0.7, 0.9], average_accuracy=[0.7, 0.7]),
    }
    more = {"erm": entry(unbiased_accuracy=[0.3, 0.4], average_accuracy=[0.3, 0.3])}
    change = {"preset": "colored-mnist", "data__path": "mnist"}
    return [
        finished(tmp_path / "less", less, data__rho=0.98, **change),
        finished(tmp_path / "more", more, data__rho=0.995, **change),
    ]


def test_one_run_is_a_row_a_method_and_a_column_a_metric(tmp_path):
    methods = {
        "erm": entry(average_accuracy=[0.5, 0.6], worst_group_accuracy=[0.0, 0.0]),
        "ddb-i": entry(average_accuracy=[0.7, 0.7], worst_group_accuracy=[None, 0.1]),
    }
    text = told(finished(tmp_path / "run", methods))
    assert cells(text, "digits, rho 0.95") == {
        "method": ["average", "worst group"],
        # The standard deviation of 50 and 60 with ddof 1 is 7.07.
        "erm": ["55.0 ± 7.1", "0.0 ± 0.0"],
        "ddb-i": ["70.0 ± 0.0", "-"],
    }
    assert "over seeds 0 1 (generator and amplifier shared)" in text


def test_one_seed_has_no_deviation_and_the_note_says_none(tmp_path):
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5])}, seeds=(3,))
    text = told(run)
    assert cells(text)["erm"] == ["50.0"] and "±" not in text and "deviation" not in text


def test_runs_that_differ_in_rho_share_their_rows(two_rho):
    text = told(*two_rho)
    assert cells(text, "colored-mnist: unbiased") == {
        "method": ["rho 0.995", "rho 0.98"],
        "erm": ["35.0 ± 7.1", "62.0 ± 2.8"],
        "ddb-ii": ["-", "80.0 ± 14.1"],
    }
    assert "### colored-mnist: average" in text
    only = told(*two_rho, metrics=["unbiased_accuracy"])
    assert only.count("###") == 1 and "colored-mnist: unbiased" in only


def test_published_rows_stand_below_ours_and_say_so(two_rho):
    text = told(*two_rho, metrics=["unbiased_accuracy"], published=True)
    table = cells(text)
    assert list(table) == [
        "method",
        "erm",
        "ERM, published",
        "LfF, published",
        "JTT, published",
        "GroupDRO, true groups, published",
        "ddb-ii",
        "DFA, published",
        "LC, published",
        "DeNetDM, published",
    ]
    assert table["ERM, published"] == ["35.34", "62.29"]
    assert table["DeNetDM, published"] == ["74.72", "89.29"]
    assert "double-255" in text and text.count("### ") == 1


def test_the_bar_jtt_row_carries_its_caution(tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5]), "ddb-ii": entry(average_accuracy=[0.7])}
    run = finished(
        tmp_path / "bar", methods, preset="tiny", data__source="bar", dataset="bar", seeds=(0,)
    )
    text = told(run, published=True)
    assert cells(text, "bar")["JTT, published [1]"] == ["68.53 ± 3.29"]
    assert cells(text)["DDB-II, published"] == ["72.81 ± 1.02"]
    assert "[1] JTT on BAR" in text and "mixes protocols" in text
    assert "mixes protocols" not in told(run)


def test_published_figures_of_a_set_without_any(tmp_path):
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5, 0.6])})
    assert "nothing known to stand beside" in told(run, published=True)


def test_ones_own_folder_of_a_published_name_is_another_data_set(tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.6])}
    change = {"preset": "tiny", "dataset": "bar"}
    own = finished(tmp_path / "own", methods, data__source="auto", data__path="bar", **change)
    text = told(own, published=True)
    assert ", published" not in text and "nothing known" in text
    assert not any(
        e["published"] for e in json.loads(told(own, format="json", published=True))["results"]
    )
    theirs = finished(tmp_path / "theirs", methods, data__source="bar", **change)
    both = told(own, theirs, published=True)
    assert both.count("### bar") == 2 and both.count("ERM, published") == 1


def test_published_figures_stand_under_their_rho_only(tmp_path):
    methods = {"erm": entry(worst_group_accuracy=[0.5, 0.6])}
    change = {"preset": "tiny", "data__source": "waterbirds", "dataset": "waterbirds"}
    official = finished(tmp_path / "official", methods, data__rho=0.95, **change)
    ablation = finished(tmp_path / "ablation", methods, data__rho=0.9, **change)
    table = cells(told(official, ablation, published=True))
    assert table["method"] == ["rho 0.95", "rho 0.9"]
    assert table["GroupDRO, true groups, published"] == ["91.40 ± 1.10", "-"]
    assert "published: nothing" in told(ablation, published=True)


def test_gaps_come_with_the_average_they_are_measured_from(tmp_path):
    metrics = {"average_accuracy": [0.8], "adjusted_average_accuracy": [0.95]}
    plain = finished(tmp_path / "plain", {"erm": entry(**metrics)}, seeds=(0,))
    assert cells(told(plain))["method"] == ["average"]
    gaps = {"background_gap": [0.1], "co_object_gap": [0.2], "both_gap": [0.3]}
    change = {"preset": "tiny", "data__source": "urbancars", "dataset": "urbancars"}
    run = finished(tmp_path / "cars", {"ddb-i": entry(**metrics, **gaps)}, seeds=(0,), **change)
    text = told(run, published=True)
    assert cells(text)["ddb-i"] == ["80.0", "95.0", "10.0", "20.0", "30.0"]
    assert cells(text)["DDB-I, published"] == ["-", "86.39", "1.85", "0.52", "0.12"]
    assert "positive = worse" in text


def test_runs_that_differ_otherwise_have_rows_of_their_own(tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.5])}
    longer = {"classifier__images": 96000}
    one = finished(tmp_path / "one", methods)
    two = finished(tmp_path / "two", methods, **longer)
    lengths = [f"erm (classifier.images {images})" for images in (48000, 96000)]
    assert list(cells(told(one, two))) == ["method", *lengths]
    three = finished(tmp_path / "three", methods, preset="tiny", data__source="digits")
    assert list(cells(told(one, three))) == ["method", "erm (digits)", "erm (tiny)"]
    again = finished(tmp_path / "again", methods)
    repeated = list(cells(told(one, again)))
    assert repeated == ["method", f"erm ({one})", f"erm ({again})"], "no cell is overwritten"
    elsewhere = finished(tmp_path / "elsewhere", methods, threads=1, data__rho=0.9)
    assert list(cells(told(one, elsewhere))) == ["method", "erm"]


def test_rows_are_told_apart_by_the_fields_their_method_depends_on(tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.6]), "jtt": entry(average_accuracy=[0.6, 0.6])}
    one = finished(tmp_path / "one", methods)
    two = finished(tmp_path / "two", methods, classifier__images=64)
    three = finished(tmp_path / "three", {"jtt": methods["jtt"]}, jtt__upweight=20)
    rows = list(cells(told(one, two, three)))
    assert rows == [
        "method",
        "erm (classifier.images 48000)",
        "erm (classifier.images 64)",
        "jtt (classifier.images 48000, jtt.upweight 100)",
        "jtt (classifier.images 64, jtt.upweight 100)",
        "jtt (classifier.images 48000, jtt.upweight 20)",
    ]
    # Too many differences for a name: the folders.
    four = finished(tmp_path / "four", methods, classifier__lr=0.1, classifier__batch_size=8)
    assert f"jtt ({four})" in cells(told(one, two, three, four))


def test_each_data_set_has_its_table(tmp_path, two_rho):
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5, 0.5])})
    text = told(run, two_rho[0])
    assert re.findall("### (.*)", text) == ["digits, rho 0.95", "colored-mnist, rho 0.98"]


def test_the_same_images_under_two_rho_are_pointed_out(tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.6])}
    change = {"preset": "tiny", "data__source": "bffhq", "dataset": "bffhq", "images": "same"}
    one = finished(tmp_path / "one", methods, data__rho=0.995, **change)
    two = finished(tmp_path / "two", methods, data__rho=0.98, **change)
    assert "the same images at rho 0.98 and 0.995" in told(one, two)


def test_groups_with_their_sizes_and_intervals(tmp_path):
    rows = [group("y=0 a=0", 10, 0.7, 0.9), group("y=0 a=1", 100, 0.5, 0.5)]
    rows.append({**group("y=1 a=0", 1, 0.0), "n": 0, "accuracy": [None, None]})
    rows[-1] |= {"low": None, "high": None}
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5, 0.6], groups=rows)})
    text = told(run, groups=True)
    assert cells(text, "digits, rho 0.95, groups") == {
        "group": ["n", "erm"],
        # 8 of 10 and 50 of 100: Wilson's intervals of test_metrics.py.
        "y=0 a=0": ["10", "80.0 [49.0, 94.3]"],
        "y=0 a=1": ["100", "50.0 [40.4, 59.6]"],
        "y=1 a=0": ["0", "-"],
    }
    assert "Wilson" in text and "groups" not in told(run)


def test_json_has_everything_as_fractions(tmp_path, two_rho):
    rows = [group("y=0 a=0", 10, 0.7, 0.9)]
    methods = {"erm": entry(average_accuracy=[0.5, 0.6], groups=rows)}
    run = finished(tmp_path / "run", methods)
    data = json.loads(told(run, *two_rho, format="json", published=True))
    first = data["results"][0]
    assert first["groups"] == rows and first["rho"] == 0.95 and first["run"] == run
    assert first["metrics"]["average_accuracy"] == summarise([0.5, 0.6])
    assert not first["published"]
    theirs = [e for e in data["results"] if e["published"]]
    assert len(theirs) == 7 * 4 and all(e["dataset"] == "colored-mnist" for e in theirs)
    (lff,) = [e for e in theirs if e["method"] == "lff" and e["rho"] == 0.99]
    assert lff["metrics"] == {"unbiased_accuracy": {"mean": 0.7401, "std": None}}
    assert lff["source"]
    less = json.loads(told(*two_rho, format="json", metrics=["average_accuracy"]))
    assert all(list(e["metrics"]) == ["average_accuracy"] for e in less["results"])


def test_latex_is_one_plain_tabular_with_everything_escaped(tmp_path):
    odd = "cats_&_dogs 100% #1 {x} ~ ^ \\ $"
    rows = [group(odd, 10, 0.8, 0.8)]
    methods = {"ddb-ii": entry(average_accuracy=[0.7, 0.8], groups=rows)}
    change = {"preset": "tiny", "data__source": "bar", "dataset": "bar"}
    run = finished(tmp_path / "under_score", methods, **change)
    other = finished(tmp_path / "other", methods, classifier__images=64, **change)
    text = told(run, other, format="latex", published=True, groups=True)
    assert text.count(r"\begin{tabular}{lr}") == 1 and text.count(r"\begin{tabular}{lrr}") == 2
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")
    assert r"JTT, published {[}1{]} & 68.53 $\pm$ 3.29 \\" in text
    assert r"under\_score" in text and r"classifier.images 64" in text and r"100\%" in text
    bare = re.sub(r"\\[a-z]+\{\}|\\[a-z]+|\\[&%$#_{}]|\\\\|\$\\pm\$", "", text)
    assert not re.search(r"[%#_^~\\]", bare), re.findall(r".{9}[%#_^~\\].{9}", bare)
    assert bare.count("{") == bare.count("}") and bare.count("$") == 0
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) in (1, 2)


def test_a_pipe_in_a_name_does_not_add_a_column(tmp_path):
    rows = [group("y=a|b a=c", 10, 0.8, 0.8)]
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5, 0.5], groups=rows)})
    assert r"| y=a\|b a=c |" in told(run, groups=True)


def test_published_figures_are_plain_numbers_under_known_names():
    figure = re.compile(r"\d+\.\d\d( ± \d+\.\d\d)?")
    for source, columns, rows in PUBLISHED.values():
        assert source and all(name in COLUMNS for name, _ in columns)
        for row in rows:
            assert len(row.figures) == len(columns) and any(row.figures)
            assert all(text is None or figure.fullmatch(text) for text in row.figures)


# --- what a person can get wrong ---------------------------------------------------------------


def refused(capsys, *argv):
    assert cli.main(["compare", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("ddb-fast compare: ") and err.count("\n") == 1, err
    return err


def test_a_folder_that_is_no_run(capsys, tmp_path):
    assert "no run" in refused(capsys, str(tmp_path))
    assert "no run" in refused(capsys, str(tmp_path / "absent"))
    run = finished(tmp_path / "run", {"erm": entry(average_accuracy=[0.5, 0.6])})
    (tmp_path / "run" / "results.json").write_text("[]")
    assert "not a run of this version" in refused(capsys, run)
    (tmp_path / "run" / "results.json").write_text("{")
    assert "not a run of this version" in refused(capsys, run)


def test_an_unfinished_run(capsys, tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.6])}
    run = finished(tmp_path / "run", methods)
    config = read_run(run).config
    (tmp_path / "run" / "config.json").write_text(to_json(replace(config, seeds=(0, 1, 2))))
    assert "unfinished" in refused(capsys, run)
    (tmp_path / "run" / "results.json").unlink()
    assert "unfinished" in refused(capsys, run)


def test_metrics_that_are_unknown_or_not_there(capsys, tmp_path, two_rho):
    line = refused(capsys, two_rho[0], "--metric", "accuracy")
    assert "accuracy: unknown" in line and "worst_group_accuracy" in line
    no_labels = entry(average_accuracy=[0.5, 0.6], unbiased_accuracy=[None, None])
    other = finished(tmp_path / "photos", {"erm": no_labels}, dataset="photos", preset="tiny")
    line = refused(capsys, two_rho[0], other, "--metric", "unbiased_accuracy")
    assert "runs of photos, which have average_accuracy" in line


def test_runs_that_share_a_name_but_not_their_images(capsys, tmp_path):
    methods = {"erm": entry(average_accuracy=[0.5, 0.6])}
    one = finished(tmp_path / "one", methods, images="some")
    two = finished(tmp_path / "two", methods, images="others")
    assert "the images are not the same" in refused(capsys, one, two)
    assert "the images are not the same" in refused(capsys, one, two, "--format", "json")
    shared = finished(tmp_path / "held", methods, images="fewer", data__validation_share=0.5)
    assert "erm" in told(one, shared), "other images by another configuration: rows of their own"
    own = {"dataset": "photos", "data__path": "photos"}
    tiny = finished(tmp_path / "tiny", methods, preset="tiny", images="some", **own)
    for change in ({"preset": "lean"}, {"preset": "tiny", "data__corrupt": "skip"}):
        folder = tmp_path / "-".join(change)
        same = finished(folder / "same", methods, images="some", **own, **change)
        other = finished(folder / "other", methods, images="others", **own, **change)
        assert "erm" in told(tiny, same)
        assert "the images are not the same" in refused(capsys, tiny, other)
    assert "named twice" in refused(capsys, one, str(tmp_path / "two" / ".." / "one"))
