"""What becomes of a command whose output is closed, full, left by its reader, or in ASCII."""

import io
import os
import subprocess
import sys

import pytest

from ddb_fast import cli, train
from ddb_fast.streams import printing


@pytest.fixture
def streams(monkeypatch):
    """Put another standard output in place of this one's: a path, or the reader's end closed."""
    opened = []

    def replace(name, path=None):
        if path is None:
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(path, os.O_WRONLY)
        opened.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, name, opened[-1])
        return opened[-1]

    yield replace
    for stream in opened:
        stream.close()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert printing(lambda: print("x", file=getattr(sys, name)) or 0, prog="x") == 0
    getattr(sys, name).close()


@pytest.mark.parametrize("command", [train.main, lambda words: cli.main(["run", *words])])
def test_both_roads_to_a_run_take_closed_streams(monkeypatch, command):
    monkeypatch.setattr(sys, "stdout", None)
    assert command(["tiny", "--dry-run"]) == 0
    sys.stdout.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_full_disk_is_one_line(streams, capsys, at_once):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    streams("stdout", "/dev/full").reconfigure(write_through=at_once, line_buffering=at_once)
    assert cli.main(["--help"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("ddb-fast --help: ") and line.endswith("No space left on device\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_left_ends_what_is_not_finished_without_a_word(streams, name, capsys):
    stream = streams(name)

    def work():
        print("x" * 100_000, file=stream, flush=True)
        raise AssertionError

    assert printing(work, prog="x") == 141
    assert not capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1])
def test_a_reader_that_left_changes_nothing_about_what_is_finished(streams, status):
    streams("stdout")
    assert printing(lambda: print("x") or status, prog="x") == status


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert printing(lambda: print("90.0 ± 0.5") or 0, prog="x") == 0
    assert shown.buffer.getvalue() == b"90.0 \\xb1 0.5\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("can't start new thread"), "new thread"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "calculation"),
        (OverflowError("Python int too large"), "too large"),
    ],
)
def test_a_machine_without_room_is_one_line(monkeypatch, capsys, error, told):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "show_data", fail)
    assert cli.main(["data", "x"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("ddb-fast data: ") and told in line and line.count("\n") == 1
    monkeypatch.setattr(cli, "show_data", lambda _: [][0])
    with pytest.raises(IndexError):
        cli.main(["data", "x"])


@pytest.mark.parametrize(("utf8", "lines"), [("0", 1), ("1", 0)])
def test_a_locale_that_spoils_names_is_warned_of(utf8, lines):
    answer = subprocess.run(
        [sys.executable, "-c", "from ddb_fast.streams import log_to_stderr as log; log()"],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"},
    )
    assert answer.stderr.count("this locale is not UTF-8") == lines
    assert len(answer.stderr.splitlines()) == lines
