"""Files are whole or absent, and training state survives the round trip through safetensors."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ddb_fast import checkpoint


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    checkpoint.write_atomically(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .*results\.json"):
        checkpoint.write_atomically(path, "new")
    with pytest.raises(OSError, match=r"No space left .*results\.json"):
        checkpoint.save_tensors(path, {"x": torch.zeros(2)}, {})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_processes_that_write_one_file_have_a_name_each(tmp_path, monkeypatch):
    names = set()
    monkeypatch.setattr(checkpoint, "_replace", lambda temporary, _: names.add(temporary.name))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        checkpoint.write_atomically(tmp_path / "x", "")
        checkpoint.save_tensors(tmp_path / "x", {"x": torch.zeros(1)}, {})
    assert names == {".x.1.part", ".x.2.part"}


def test_a_link_stays_and_what_is_no_file_is_written_to(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    checkpoint.write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        checkpoint.write_atomically(pipe, "told")
        assert os.read(reader, 10) == b"told" and pipe.is_fifo()
    finally:
        os.close(reader)


def test_equal_files_are_equal_byte_for_byte(tmp_path):
    metadata = {name: "é" for name in "hgfedcba"}
    for name in ("a", "b"):
        checkpoint.save_tensors(tmp_path / name, {"x": torch.arange(3)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, again = checkpoint.load_tensors(tmp_path / "a")
    assert again == metadata and tensors["x"].tolist() == [0, 1, 2]


def test_an_empty_folder_that_is_there_stays(tmp_path, monkeypatch):
    """It may be a mount point or a link, or where somebody stands."""
    place, link, moved = tmp_path / "place", tmp_path / "link", []
    place.mkdir()
    link.symlink_to(place)
    before, rename = place.stat().st_ino, os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(a.name), rename(a, b)))
    for out in (place, link, Path()):
        monkeypatch.chdir(place)
        (place / ".part").mkdir()  # of a process that was killed
        with checkpoint.whole_folder(out, last="b") as folder:
            for name in "abc":
                (folder / name).touch()
        assert sorted(os.listdir(place)) == ["a", "b", "c"] and moved == ["a", "c", "b"]
        assert place.stat().st_ino == before and link.is_symlink()
        with (
            pytest.raises(ValueError, match="not an empty folder"),
            checkpoint.whole_folder(out),
        ):
            pass
        moved.clear()
        for name in "abc":
            (place / name).unlink()
    with pytest.raises(KeyError), checkpoint.whole_folder(link):
        raise KeyError
    assert not os.listdir(place)


def test_a_folder_is_named_where_a_write_does_not_say_where(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"No space left .*/out'"), checkpoint.whole_folder(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"^x: full$"), checkpoint.whole_folder(out):
        raise OSError("x: full")
    assert not list(tmp_path.iterdir())


def test_safetensors_that_the_disk_refuses_is_an_os_error(tmp_path):
    """A real refusal in the writing library: the process may write files of 4 KiB at most."""
    code = f"""
import pathlib, resource, torch
from ddb_fast import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = pathlib.Path({str(tmp_path)!r}) / "model.safetensors"
try:
    checkpoint.save_tensors(path, {{"x": torch.zeros(10**5)}}, {{}})
except OSError as error:
    print("refused:", error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.startswith("refused:"), answer.stderr
    assert not list(tmp_path.glob("*safetensors*"))


def test_tensors_of_every_layout_and_type_round_trip(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "transposed": shared.t(),
        "slice": shared[:, 1],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "bf16": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "deep" / "x.safetensors"
    checkpoint.save_tensors(path, tensors, {"a": [1, {"b": None}], "c": "text"})
    loaded, metadata = checkpoint.load_tensors(path)
    assert metadata == {"a": [1, {"b": None}], "c": "text"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_a_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not one of our safetensors files"):
        checkpoint.load_tensors(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save_tensors(path, {"x": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not one of our safetensors files"):
        checkpoint.load_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.safetensors"):
        checkpoint.load_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 5), r"weight \(5, 3\) instead of \(4, 3\) and 1 more"),
        (nn.Linear(3, 4, bias=False), "bias is missing"),
        (nn.Sequential(nn.Linear(3, 4)), r"0\.weight|weight is missing"),
    ],
)
def test_another_shape_is_one_line(other, message):
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load_into(nn.Linear(3, 4), other.state_dict(), source="x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_continues_exactly(tmp_path, kind, layout):
    """Fused optimisers walk memory; a state in another layout than its weights is mixed up."""

    def make():
        torch.manual_seed(0)
        network = nn.Conv2d(5, 3, (2, 4)).to(memory_format=layout)
        if kind == "adamw":
            return network, torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def steps(network, optimizer, numbers):
        for i in numbers:
            x = torch.linspace(0, i + 1, 80).view(2, 5, 2, 4)
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = make()
    steps(*straight, range(6))
    first = make()
    steps(*first, range(3))
    path = tmp_path / "state.safetensors"
    state = checkpoint.with_prefix("model", first[0].state_dict())
    state |= checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(first[1]))
    checkpoint.save_tensors(path, state, {})
    second = make()
    loaded, _ = checkpoint.load_tensors(path)
    checkpoint.load_into(second[0], checkpoint.select(loaded, "model"), source="x")
    checkpoint.load_optimizer(second[1], checkpoint.select(loaded, "optimizer"))
    steps(*second, range(3, 6))
    assert torch.equal(second[0].weight, straight[0].weight)
    assert torch.equal(second[0].bias, straight[0].bias)
