"""Configuration: JSON round trip, typed options, presets, and the fields each stage depends on."""

import dataclasses
import json
import subprocess
import sys

import pytest

import small
from ddb_fast.arguments import field_texts, parse_run
from ddb_fast.config import (
    METHODS,
    DFRConfig,
    JTTConfig,
    LfFConfig,
    from_json,
    with_fields,
)
from ddb_fast.fields import fields_hash, flatten, to_json
from ddb_fast.presets import PRESETS, load_config
from ddb_fast.stages import STAGE_FIELDS, stage_fields


@pytest.fixture(params=sorted(PRESETS))
def preset(request):
    return load_config(request.param)


def test_json_round_trip(preset):
    assert from_json(to_json(preset)) == preset


def test_a_configuration_written_before_a_section_existed_loads(preset):
    written = json.loads(to_json(preset))
    for section in ("lff", "jtt", "dfr"):
        del written[section]
    defaults = {"lff": LfFConfig(), "jtt": JTTConfig(), "dfr": DFRConfig()}
    assert from_json(json.dumps(written)) == dataclasses.replace(preset, **defaults)


def test_every_leaf_is_an_option_that_round_trips_as_text(preset):
    words = {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in flatten(preset).items()
    }
    assert with_fields(preset, words) == preset


def test_presets_are_frozen_and_named_after_themselves(preset):
    assert PRESETS[preset.preset]() == preset
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.seed = 1


def test_ddb_is_the_authors_schedule():
    d = load_config("ddb").diffusion
    assert (d.batch_size, d.images) == (32, 32 * 100_000)
    assert (d.beta_start, d.beta_end, d.timesteps, d.target) == (1e-4, 0.028, 1000, "eps")
    assert (d.lr * d.warmup_from, d.lr) == (pytest.approx(1e-4), 2.5e-4)
    assert d.unet.channel_multipliers == (1, 2, 2, 2)
    assert (d.unet.channels, d.unet.blocks_per_level, d.unet.embedding) == (128, 2, 512)
    assert (d.unet.dropout, d.unet.norm_groups, d.unet.head_channels) == (0.15, 32, None)
    assert (d.unet.attention_levels, d.unet.attention_up) == ((0, 1, 2, 3), False)
    assert d.unet.time_table and d.unet.resample == "authors"
    assert (d.optimizer, d.weight_decay, d.grad_clip) == ("adamw", 1e-4, 1.0)
    assert (d.warmup, d.lr_schedule, d.schedule) == (0.1, "cosine-cut", "linear")
    assert (d.image_size, d.class_dropout) == (64, 0.1)


def test_the_papers_figures_are_the_defaults():
    """What the paper and the works it builds on fix (docs/reproducing.md)."""
    config = load_config("ddb")
    assert (config.sampling.per_class, config.sampling.guidance_scale) == (1000, 2.0)
    amplifier, pseudo = config.amplifier, config.pseudo_labels
    assert (amplifier.model, amplifier.optimizer) == ("densenet121", "adamw")
    assert (amplifier.lr, amplifier.weight_decay, amplifier.image_size) == (1e-4, 1e-2, 64)
    assert (pseudo.gamma, pseudo.stats_over, pseudo.filter) == (3.0, "correct", "threshold")
    assert pseudo.pseudo_groups == "conflicting"
    assert (config.group_dro.step_size, config.group_dro.adjustment) == (0.01, 0.0)
    assert (config.reweighting.moving_average, config.reweighting.class_maximum) == (None, False)
    assert (config.lff.q, config.lff.moving_average) == (0.7, 0.7)
    assert (config.jtt.first_share, config.jtt.upweight) == (60 / 300, 100)
    assert config.dfr.inverse_strengths == (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    assert config.dfr.draws == 10


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("colored-mnist", 60_000),
        ("waterbirds", 3498 + 184 + 56 + 1057),
        ("bffhq", 19_104 + 96),
        ("bar", 1_941),
        ("bar-rho", 1_551 + 82),
        ("imagenet-9", 54_600),
        ("urbancars", 2 * (3610 + 190 + 190 + 10)),
    ],
)
def test_presets_of_published_sets_are_as_the_table_says(name, images):
    """Target, length and kept weights in docs/reproducing.md, and the published training images."""
    text = (small.ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    row, config = rows[name], load_config(name)
    if name == "bar-rho":
        row = rows["bar"]
    target = config.classifier
    shown = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mlp": "MLP 2352-100-100-100-10"}
    start = "scratch" if target.weights is None else "ImageNet"
    assert f"| {shown[target.model]}, {start} |" in row
    epochs, rest = divmod(target.images, images)
    assert rest == 0 and f"| {epochs} epochs, batch {target.batch_size}, " in row
    rate = next(rate for rate in ("1e-3", "1e-4") if float(rate) == target.lr)
    plain = target.weight_decay == 0
    rule = "SGD" if target.optimizer == "sgd" else "Adam" if plain else "AdamW"
    assert f", {rule} {rate}" in row
    assert ("decay 1e-4" in row) == (target.optimizer == "sgd") == (target.weight_decay == 1e-4)
    kept = "best worst group on validation" if "worst" in config.selection else config.selection
    assert f"| {kept} |" in row
    constant = target.lr_schedule == "constant"
    assert constant == (name in ("colored-mnist", "waterbirds", "urbancars"))
    assert config.data.source == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion.images": "many"}, "diffusion.images: 'many' is not a whole number"),
        ({"diffusion.images": "1.5"}, "not a whole number"),
        ({"diffusion.lr": "fast"}, "diffusion.lr: 'fast' is not a number"),
        ({"sampling.clip_x0": "maybe"}, "sampling.clip_x0: 'maybe' is not true or false"),
        ({"sampling.sampler": "euler"}, "sampling.sampler: 'euler' is none of ddpm"),
        ({"diffusion.speed": 1}, "unknown field: diffusion.speed"),
        ({"nothing.at.all": 1}, "unknown field: nothing.at.all"),
        ({"methods": ["erm", "magic"]}, "magic"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"diffusion.batch_size": 0}, "diffusion.batch_size: 0"),
        ({"diffusion.images": -5}, "diffusion.images: -5"),
        ({"sampling.steps": 0}, "sampling.steps: 0"),
        ({"data.rho": 1.5}, "data.rho: 1.5"),
        ({"classifier.lr": "inf"}, "classifier.lr: inf"),
        ({"pseudo_labels.gamma": "inf"}, "pseudo_labels.gamma: inf"),
        ({"classifier.lr": "nan"}, "classifier.lr: nan"),
        ({"threads": 0}, "threads: 0"),
        ({"diffusion.timesteps": 2**63}, "diffusion.timesteps: 9223372036854775808"),
        ({"seeds": [2**63]}, "seeds: 9223372036854775808"),
        ({"out": ""}, "out: it is empty"),
    ],
)
def test_wrong_fields_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        with_fields(load_config("digits"), change)


@pytest.mark.parametrize(
    ("typed", "expected"), [("none", None), ("None", None), ("5000", 5000), ("5_000", 5000)]
)
def test_optional_numbers(typed, expected):
    config = with_fields(load_config("digits"), {"diffusion.ema_half_life": typed})
    assert config.diffusion.ema_half_life == expected


def test_scientific_notation_is_a_whole_number():
    assert with_fields(load_config("digits"), {"diffusion.images": "1e5"}).diffusion.images == 10**5


def test_unknown_preset_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'nope'; known: ddb, lean, tiny, digits"):
        load_config("nope")
    with pytest.raises(ValueError, match="No such file"):
        load_config(str(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_config(str(broken))
    broken.write_text(json.dumps({"preset": "x"}))
    with pytest.raises(ValueError, match="diffusion"):
        load_config(str(broken))


def test_a_file_of_changes_alone_is_told_what_it_lacks():
    with pytest.raises(ValueError, match=r"missing field: preset, amplifier, .*--dry-run"):
        from_json('{"diffusion": {"images": 10}}')


def test_every_method_and_stage_names_fields_that_exist():
    leaves = flatten(load_config("ddb"))
    assert set(METHODS) <= set(STAGE_FIELDS)
    for stage, names in STAGE_FIELDS.items():
        for name in names:
            assert any(leaf == name or leaf.startswith(f"{name}.") for leaf in leaves), (
                stage,
                name,
            )


def test_stage_fields_change_only_what_depends_on_them():
    base = load_config("tiny")

    def changed(field, value):
        other = with_fields(base, {field: value})
        return {
            stage
            for stage in STAGE_FIELDS
            if fields_hash(stage_fields(base, stage)) != fields_hash(stage_fields(other, stage))
        }

    everything = set(STAGE_FIELDS)
    ddb = {"ddb-i", "ddb-i-error-set", "ddb-i-predicted", "ddb-ii"}
    real = {"real-amplifier-i", "real-amplifier-ii"}
    jtt = {"jtt-identification", "jtt"}
    audit = {"verdict", "memorisation"}
    generator = {"diffusion", "synthetic"}
    assert changed("diffusion.lr", 1) == generator | {"amplifier", "scores"} | audit | ddb
    amplifiers = {"amplifier", "scores", "real-amplifier", "real-scores"} | audit
    assert changed("amplifier.lr", 1) == amplifiers | ddb | real
    assert changed("classifier.lr", 1) == {"erm", "lff", "dfr", "group-dro"} | jtt | ddb | real
    assert changed("reweighting.class_maximum", True) == {"ddb-ii", "real-amplifier-ii"}
    assert changed("pseudo_labels.gamma", 2) == {"scores", "real-scores"} | ddb | real
    assert changed("lff.q", 0.5) == {"lff"}
    assert changed("jtt.first_share", 0.5) == jtt
    assert changed("jtt.upweight", 7) == {"jtt"}
    assert changed("dfr.draws", 3) == {"dfr"}
    assert changed("data.rho", 0.9) == everything
    free = ["methods", "seeds", "threads", "out", "data.path", "checkpoint_minutes", "progress"]
    free += ["audit", "step"]
    for field in free:
        value = {
            "methods": "erm",
            "seeds": "7",
            "progress": "false",
            "audit": "false",
            "step": "eager",
        }.get(field, "3")
        assert changed(field, value) == set(), field


def test_options_reach_fields():
    argv = "tiny --data photos --out here --methods erm ddb-ii --seeds 3 4 --classifier.lr 1e-5"
    config, dry, _ = parse_run([*argv.split(), "--scores", "own", "--dry-run"], prog="x")
    assert dry
    assert (config.data.path, config.out, config.pseudo_labels.load) == ("photos", "here", "own")
    assert (config.methods, config.seeds, config.classifier.lr) == (("erm", "ddb-ii"), (3, 4), 1e-5)


def test_data_given_to_the_embedded_preset_is_read():
    config, _, _ = parse_run(["digits", "--data", "photos"], prog="x")
    assert (config.data.source, config.data.path) == ("auto", "photos")


def test_fields_of_a_generator_that_is_brought_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(["digits", "--diffusion", "gen", "--diffusion.lr", "1"], prog="x")
    assert stop.value.code == 2
    assert "diffusion.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--synthetic own --diffusion.images 5", "diffusion.images: --synthetic brings images"),
        ("--synthetic own --diffusion gen", "diffusion.load: --synthetic"),
        ("--synthetic own --sampling.steps 5", "sampling.steps: --synthetic"),
        ("--scores s.csv --methods erm lff", "--scores: none of the methods goes by scores"),
        ("--scores s.csv --methods real-amplifier-i", "--scores: none of the methods"),
        ("--scores s.csv --pseudo_labels.gamma 9", "pseudo_labels.gamma: --scores brings scores"),
        ("--scores s.csv --methods ddb-ii --pseudo_labels.pseudo_groups predicted",
         "pseudo_labels.pseudo_groups: --scores brings scores"),
        ("--scores s.csv --amplifier.images 9 --synthetic own",
         "amplifier.images, sampling.load: --scores brings scores"),
        ("--scores s.csv --diffusion gen", "diffusion.load: --scores brings scores"),
    ],
)  # fmt: skip
def test_options_that_nothing_would_look_at_are_refused(capsys, words, told):
    with pytest.raises(SystemExit) as stop:
        parse_run(["digits", *words.split()], prog="x")
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_images_of_ones_own_are_fitted_to_the_size_asked_for_and_scores_go_with_a_method():
    words = "digits --synthetic own --diffusion.image_size 24"
    config, _, _ = parse_run(words.split(), prog="x")
    assert (config.sampling.load, config.diffusion.image_size) == ("own", 24)
    for methods in ("none", "erm ddb-i"):
        words = f"digits --scores s.csv --methods {methods}"
        assert parse_run(words.split(), prog="x")[0].pseudo_labels.load == "s.csv"
    words = "digits --scores s.csv --methods ddb-i --pseudo_labels.pseudo_groups predicted"
    assert parse_run(words.split(), prog="x")[0].pseudo_labels.pseudo_groups == "predicted"
    # Which trains an amplifier and judges what it sees, here.
    words = "digits --scores s.csv --methods ddb-i real-amplifier-i --pseudo_labels.gamma 9"
    assert parse_run(words.split(), prog="x")[0].pseudo_labels.gamma == 9


def test_help_says_what_every_field_takes():
    texts = field_texts()
    assert texts.keys() == flatten(load_config("ddb")).keys()
    assert texts["diffusion.target"][0] == "{eps,v}"
    assert texts["classifier.lr"] == ("FLOAT", "Peak learning rate.")
    assert texts["diffusion.ema_half_life"] == ("INT|none", "In images; None: no moving average.")
    assert texts["seeds"][0] == "INT" and texts["methods"][0] == "STR"


@pytest.mark.parametrize(
    "argv",
    [
        ["nope"],
        ["tiny"],
        ["tiny", "--out", "x"],
        ["digits", "--seeds", "a"],
        ["digits", "--foo"],
        [],
    ],
)
def test_wrong_commands_are_one_line_and_exit_2(argv):
    answer = subprocess.run(
        [sys.executable, "-m", "ddb_fast.cli", "run", *argv], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1


def test_dry_run_prints_a_configuration_that_runs_again(tmp_path):
    command = [sys.executable, "-m", "ddb_fast.cli", "run"]
    first = subprocess.run(
        [*command, "digits", "--dry-run", "--diffusion.lr", "0.5"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = tmp_path / "mine.config"
    path.write_text(first.stdout)
    again = subprocess.run(
        [*command, str(path), "--dry-run"], capture_output=True, text=True, check=True
    )
    assert again.stdout == first.stdout
    assert from_json(first.stdout).diffusion.lr == 0.5
