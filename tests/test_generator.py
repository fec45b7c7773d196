"""A generator taken over from elsewhere: its classes are those of the data, by name."""

from dataclasses import replace
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddb_fast.checkpoint import load_tensors
from ddb_fast.config import with_fields
from ddb_fast.data.listing import Listing
from ddb_fast.generator import (
    build_unet,
    import_diffusion,
    import_synthetic,
    load_diffusion,
    save_diffusion,
)
from ddb_fast.presets import PRESETS


@pytest.fixture
def take(tmp_path):
    """Take over a small generator of some classes into a run of others; both networks."""
    small = {"channels": 16, "channel_multipliers": "1 2", "attention_levels": "1"}
    base = PRESETS["digits"]()
    base = with_fields(base, {f"diffusion.unet.{name}": value for name, value in small.items()})

    def take(theirs, ours):
        source, folder = tmp_path / "source", tmp_path / "folder"
        torch.manual_seed(0)
        unet = build_unet(base.diffusion, len(theirs)).eval()
        save_diffusion(source, unet.state_dict(), base.diffusion, tuple(theirs))
        context = SimpleNamespace(
            config=replace(base, diffusion=replace(base.diffusion, load=str(source))),
            data=SimpleNamespace(classes=tuple(ours)),
            accelerator=SimpleNamespace(is_main_process=True),
        )
        import_diffusion(context, folder)
        taken, _, classes = load_diffusion(folder)
        assert classes == tuple(ours)
        return unet, taken

    return take


def table_rows(unet):
    return unet.class_table.weight.detach()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["disc", "square"], ["disc", "square"]),
        (["disc", "square", "star"], ["star", "disc", "square"]),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"]),
        (["0", "1", "2"], ["2", "0", "1"]),
    ],
)
def test_classes_are_taken_by_name(take, theirs, ours):
    unet, taken = take(theirs, ours)
    for label, name in enumerate(ours):
        assert torch.equal(table_rows(taken)[label], table_rows(unet)[theirs.index(name)])
    assert torch.equal(table_rows(taken)[-1], table_rows(unet)[-1])
    changed = [n for n, t in unet.state_dict().items() if not torch.equal(t, taken.state_dict()[n])]
    assert changed == ([] if theirs == ours else ["class_table.weight"])


def test_numbered_classes_are_taken_in_order_and_the_log_says_so(take, caplog):
    caplog.set_level("INFO", "ddb_fast")
    unet, taken = take(["0", "1"], ["disc", "square"])
    assert torch.equal(table_rows(taken), table_rows(unet))
    (line,) = caplog.messages
    assert "taken in the data's order" in line


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (["disc", "square"], ["asquare", "zdisc"], "'disc', 'square'; the data has 2: 'asquare'"),
        (["disc", "square"], ["0", "1"], "'disc', 'square'; the data has 2: '0', '1'"),
        (["0", "1"], ["a", "b", "c"], "2 classes: '0', '1'; the data has 3: 'a', 'b', 'c'"),
        (["x" * 300, "y"], [f"c{i}" for i in range(900)], "'c7' and 892 more"),
    ],
)
def test_other_classes_are_refused(take, theirs, ours, told):
    with pytest.raises(ValueError) as refusal:
        take(theirs, ours)
    assert told in str(refusal.value) and len(str(refusal.value)) < 400


def test_synthetic_images_of_ones_own_are_decoded_by_every_core(tmp_path, monkeypatch):
    for name in ("disc", "square"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(3):
            grey = Image.new("RGB", (6, 4), (40 * i, 0, 9 * len(name)))
            grey.save(tmp_path / "own" / name / f"{i}.png")
    context = SimpleNamespace(
        config=with_fields(
            PRESETS["digits"](),
            {"sampling.load": str(tmp_path / "own"), "diffusion.image_size": "4"},
        ),
        data=SimpleNamespace(classes=("square", "disc"), fit="squash"),
        accelerator=SimpleNamespace(is_main_process=True),
    )
    threads, read = [], Listing.read
    monkeypatch.setattr(
        Listing, "read", lambda self, i: threads.append(get_ident()) or read(self, i)
    )
    import_synthetic(context, tmp_path / "new")
    assert len(threads) == 6 and get_ident() not in threads
    tensors, _ = load_tensors(tmp_path / "new" / "images.safetensors")
    found = zip(tensors["labels"].tolist(), tensors["images"][:, :, 0, 0].tolist(), strict=True)
    expected = [(1, [40 * i, 0, 36]) for i in range(3)] + [(0, [40 * i, 0, 54]) for i in range(3)]
    assert sorted(found) == sorted(expected)
    (tmp_path / "own" / "disc" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1\.png"):
        import_synthetic(context, tmp_path / "again")


@pytest.mark.parametrize(("fit", "corner"), [("pad", 0), ("squash", 200)])
def test_synthetic_images_of_ones_own_get_the_numbers_of_their_classes(tmp_path, fit, corner):
    """Folders sort b, z; the data counts z, b. They are fitted to the generator's size as it is."""
    for name, grey, count in (("z", 100, 2), ("b", 200, 3)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (grey, grey, grey)).save(tmp_path / "own" / name / f"{i}.png")
    fields = {"diffusion.image_size": "8", "sampling.load": str(tmp_path / "own")}
    context = SimpleNamespace(
        config=with_fields(PRESETS["digits"](), fields),
        data=SimpleNamespace(classes=("z", "b"), fit=fit),
        accelerator=SimpleNamespace(is_main_process=True),
    )
    import_synthetic(context, tmp_path / "synthetic")
    tensors, _ = load_tensors(tmp_path / "synthetic" / "images.safetensors")
    images, labels = tensors["images"], tensors["labels"]
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    assert torch.equal(images[:, 0, 4, 4].int(), torch.where(labels == 1, 200, 100).int())
    assert images[labels == 1][0, 0, 0, 0] == corner
    assert (tensors["seeds"] == -1).all()
    context.data.classes = ("z", "c")
    with pytest.raises(ValueError, match="its classes"):
        import_synthetic(context, tmp_path / "synthetic")
