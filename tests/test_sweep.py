"""Sweeps: what would be run, runs that fail, interruption and resumption, and no bias at all."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fork_server
import small
from ddb_fast import cli
from ddb_fast.compared_runs import read_run
from ddb_fast.fields import to_json
from ddb_fast.presets import PRESETS
from ddb_fast.sweep import build_parser, harm, plan

SHORT = {
    "diffusion__images": "256",
    "amplifier__images": "640",
    "classifier__images": "640",
    "methods": "erm ddb-ii",
}


def planned(*words):
    return plan(build_parser("sweep").parse_args(list(map(str, words))))


def test_every_preset_and_rho_is_a_run_in_a_folder_of_its_own(tmp_path):
    words = ["digits", "colored-mnist", "--data", "mnist", "--rho", ".9", "0.95"]
    runs = planned(*words, "--out", tmp_path, "--seeds", "4", "5", "--methods", "erm")
    names = [Path(run.folder).name for run in runs]
    sets = ("digits", "colored-mnist")
    assert names == [f"{preset}-rho{rho}" for preset in sets for rho in (0.9, 0.95)]
    assert [run.config.data.rho for run in runs] == [0.9, 0.95] * 2
    assert all(run.config.seeds == (4, 5) and run.config.methods == ("erm",) for run in runs)
    assert [run.config.data.path for run in runs] == [None, None, "mnist", "mnist"]
    (alone,) = planned("digits", "--out", tmp_path)
    assert Path(alone.folder) == tmp_path / "digits"


def test_the_words_of_a_run_mean_its_configuration(tmp_path):
    from ddb_fast.arguments import parse_run

    words = ["lean", "digits", "--data", "lean=photos", "--diffusion.unet.channel_multipliers"]
    words += ["1", "2", "--diffusion.ema_half_life", "none", "--seeds", "7", "--out", tmp_path]
    runs = planned(*words)
    assert len(runs) == 2
    for run in runs:
        assert parse_run(run.words, prog="run") == (run.config, False, False)


def test_data_for_all_and_data_for_one(tmp_path):
    words = ["tiny", "lean", "digits", "--out", tmp_path, "--data", "photos", "lean=others"]
    assert [run.config.data.path for run in planned(*words)] == ["photos", "others", None]
    (own,) = planned("digits", "--data", "digits=a=b", "--out", tmp_path)
    assert (own.config.data.path, own.config.data.source) == ("a=b", "auto")


def test_a_configuration_from_a_file_goes_by_its_name(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(to_json(PRESETS["digits"]()))
    (run,) = planned(file, "--out", tmp_path)
    assert Path(run.folder) == tmp_path / "mine"


def test_no_bias_is_one_in_as_many_colours_as_classes(tmp_path):
    runs = planned("digits", "--rho", "0.95", "0.1", "--do-no-harm", "--out", tmp_path)
    assert [(run.config.data.rho, run.unbiased) for run in runs] == [(0.95, False), (0.1, True)]
    runs = planned("digits", "--do-no-harm", "--out", tmp_path)
    assert [Path(run.folder).name for run in runs] == ["digits", "digits-rho0.1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("tiny --data photos --rho .9", "--rho: tiny reads images as they are"),
        ("tiny --data photos --do-no-harm", "--do-no-harm: tiny"),
        ("bar-rho --data bar --do-no-harm", "no unbiased version"),
        ("digits --data digits=photos --rho .9", "source auto"),
        ("digits --do-no-harm --methods ddb-i", "add erm to --methods"),
        ("digits --rho 1.5", "data.rho: 1.5 is outside 0.0 to 1.0"),
        ("digits --rho often", "invalid float value: 'often'"),
        ("digits digits", "named twice"),
        ("digits tinny", "unknown preset 'tinny'"),
        ("digits tiny", "--data PATH"),
        ("digits --data photos", "no preset of this sweep is left to take it"),
        ("tiny lean --data one two", "one PATH for all"),
        ("digits --methods magic", "magic"),
        ("digits --launch '", "No closing quotation"),
        ("digits --launch absent-launcher", "absent-launcher: cannot be started"),
    ],
)
def test_what_a_person_can_get_wrong_is_one_line_before_anything_begins(
    capsys, tmp_path, monkeypatch, words, told
):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    out = tmp_path / "out"
    try:
        code = cli.main(["sweep", *words.split(), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1, err
    assert not out.exists()


def test_a_sweep_never_runs_on_top_of_a_run(capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert cli.main(["sweep", "digits", "--out", str(tmp_path)]) == 2
    assert "holds a run of its own" in capsys.readouterr().err


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Digits with bias and without, and runs that their launcher refuses: (folder, answer)."""
    out = tmp_path_factory.mktemp("swept") / "out"
    refused, launcher = out.parent / "refused.json", out.parent / "launcher"
    refused.write_text(to_json(PRESETS["digits"]()))
    launcher.write_text(
        f"""#!/bin/sh
        case "$*" in *refused-rho0.9*) echo "launcher: not today" >&2; echo ---- >&2; exit 3;; esac
        case "$*" in *refused-rho0.1*) kill -KILL $$;; esac
        exec {out.parent}/launch "$@"
        """
    )
    launcher.chmod(0o755)
    words = small.arguments(out, **SHORT)
    words = ["sweep", str(refused), *words, "--do-no-harm", "--launch", str(launcher)]
    with fork_server.executables(out.parent):
        return out, small.forked(words)


def test_a_failing_run_is_one_line_and_the_others_go_on(swept):
    out, answer = swept
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("sweep: ")]
    assert [line.split("out/")[1] for line in lines] == [
        "refused-rho0.9",
        "refused-rho0.9 failed (exit 3): launcher: not today",
        "refused-rho0.1",
        "refused-rho0.1 failed (exit -9): ended by SIGKILL",
        "digits-rho0.9",
        "digits-rho0.1",
    ]
    assert lines[-1].startswith("sweep: run 4 of 4")
    failed = json.loads((out / "results.json").read_text())["failed"]
    assert [entry["status"] for entry in failed] == [3, -9]
    assert "refused-rho0.9 failed" in (out / "results.md").read_text()


def test_the_runs_are_compared_at_the_end(swept):
    out, answer = swept
    text = (out / "results.md").read_text()
    assert text in answer.stdout
    assert "### digits: average" in text and "rho 0.9 " in text and "rho 0.1 " in text
    run = read_run(str(out / "digits-rho0.9"))
    data = json.loads((out / "results.json").read_text())
    assert {(e["rho"], e["method"]) for e in data["results"]} == {
        (rho, method) for rho in (0.9, 0.1) for method in ("erm", "ddb-ii")
    }
    ours = [e for e in data["results"] if (e["rho"], e["method"]) == (0.9, "ddb-ii")]
    assert ours[0]["metrics"] == run.results["methods"]["ddb-ii"]["metrics"]
    assert len(ours[0]["groups"]) == 100


def test_without_bias_every_method_is_compared_with_erm_seed_by_seed(swept):
    """At rho 0.1 digits have as many images of each colour, and everything runs as elsewhere."""
    out, answer = swept
    run = read_run(str(out / "digits-rho0.1"))
    erm = run.results["methods"]["erm"]["metrics"]
    # The test split has every digit in every colour, so all averages are one figure.
    assert erm["average_accuracy"]["mean"] == pytest.approx(
        erm["unbiased_accuracy"]["mean"], abs=0.05
    )
    assert all(run.metric("erm", n)["mean"] is not None for n in erm)
    assert run.results["amplifier"]["auroc"] is not None
    difference = harm(run)
    assert list(difference) == ["ddb-ii"]
    for method, summary in difference.items():
        one, two = (np.array(run.metric(m, "average_accuracy")["seeds"]) for m in (method, "erm"))
        assert summary["mean"] == pytest.approx((one - two).mean())
        assert summary["std"] == pytest.approx((one - two).std(ddof=1))
        assert f"| {method} " in answer.stdout.split("without bias: difference to erm")[1]
    data = json.loads((out / "results.json").read_text())
    assert data["difference_to_erm_without_bias"] == {run.path: difference}


def test_ctrl_c_ends_the_run_too(tmp_path):
    out = tmp_path / "out"
    words = small.arguments(out, methods="erm", seeds="0", classifier__images="100_000_000")
    process = subprocess.Popen(
        [sys.executable, "-m", "ddb_fast.cli", "sweep", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore it, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoint = out / "digits-rho0.9/classifiers/erm/seed0/checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().endswith("ddb-fast sweep: interrupted; the same command continues")
    with (out / "digits-rho0.9/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more
    assert not (out / "results.json").exists()
