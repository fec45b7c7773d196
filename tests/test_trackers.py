"""What a tracker is sent: steps that never go back, whatever stages came before."""

import json
import resource

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from ddb_fast.trackers import Progress, RunLog


class Recorder(GeneralTracker):
    """Like wandb, which leaves out what does not come after its last step."""

    name, requires_logging_directory, main_process_only = "recorder", False, True

    def __init__(self):
        super().__init__()
        self.kept = []

    @property
    def tracker(self):
        return self.kept

    def log(self, values, step=None, **_):
        if not self.kept or step > self.kept[-1][0]:
            self.kept.append((step, values))


def record(path, *parts):
    """Show (stage, images before, images after a look, ...) as a process of a run would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    accelerator.init_trackers("test")
    log = RunLog(accelerator, path, mirror=True)
    for stage, start, *looks in parts:
        with Progress(log, stage, total=looks[-1], start=start, shown=False) as bar:
            for images in looks:
                bar.update(images - start, torch.tensor(1 / images))
                bar.flush()
                start = images
    return recorder.kept


def numbers(stage, images):
    return {f"{stage}/images": images, f"{stage}/loss": pytest.approx(1 / images)}


def test_every_stage_comes_after_the_last(tmp_path):
    kept = record(tmp_path / "log.jsonl", ("diffusion", 0, 10, 30), ("erm", 0, 10, 20))
    assert kept == [
        (10, numbers("diffusion", 10)),
        (30, numbers("diffusion", 30)),
        (40, numbers("erm", 10)),
        (50, numbers("erm", 20)),
    ]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["images"], r["loss"]) for r in rows] == [
        *(("diffusion", n, pytest.approx(1 / n)) for n in (10, 30)),
        *(("erm", n, pytest.approx(1 / n)) for n in (10, 20)),
    ]


def test_a_resumed_run_has_the_steps_of_one_that_was_not_interrupted(tmp_path):
    """The second process goes on from a checkpoint; the third is given a method before the last."""
    path = tmp_path / "log.jsonl"
    record(path, ("diffusion", 0, 10, 30), ("erm", 0, 10, 20))
    assert [step for step, _ in record(path, ("erm", 10, 20, 40), ("ddb-i", 0, 5))] == [50, 70, 75]
    assert [step for step, _ in record(path, ("lff", 0, 10), ("ddb-i", 0, 5))] == [85, 90]


def test_a_tracker_that_fails_stops_no_run(tmp_path, monkeypatch, caplog):
    def log(*_, step, **__):
        if step > 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "log", log)
    record(tmp_path / "log.jsonl", ("diffusion", 0, 10, 30), ("erm", 0, 10))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the tracker gets nothing more, the run goes on: [Errno 28] No space left on device"
    ]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_log_that_is_damaged_stops_no_run(tmp_path):
    path = tmp_path / "log.jsonl"
    record(path, ("diffusion", 0, 10))
    with path.open("ab") as file:
        file.write(b'{"stage": "erm", "im\xff\n')
    assert [step for step, _ in record(path, ("erm", 0, 10))] == [20]


def test_a_log_that_cannot_grow_is_named_and_keeps_whole_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    record(path, ("diffusion", 0, 10))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk: the beginning of a row is taken, and no more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"log\.jsonl"):
            record(path, ("diffusion", 10, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
