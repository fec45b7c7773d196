"""Models to take away: a run's classifiers, its bias amplifier and its generator.

Each is an `nn.Module` that holds a network with all that is needed to use it, comes out of a run
with `from_run`, and goes to and from a folder or the Hugging Face Hub: `save_pretrained`,
`from_pretrained`, `push_to_hub`. Such a folder holds `model.safetensors` (what a run's own file
is: `load_classifier` and `--diffusion` read it too), `config.json` and a model card.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ddb_fast import checkpoint
from ddb_fast.classification import bare_network, load_classifier, save_classifier
from ddb_fast.config import ClassifierConfig, DiffusionConfig, SamplingConfig
from ddb_fast.data.augment import amplifier_view, centre
from ddb_fast.data.listing import read_image
from ddb_fast.data.pixels import check_input, normalise
from ddb_fast.data.store import FITS, centre_square
from ddb_fast.diffusion.generate import generate_within_memory, sampling_options
from ddb_fast.fields import from_dict
from ddb_fast.generator import build_unet, load_diffusion, save_diffusion
from ddb_fast.model_card import card
from ddb_fast.provenance import FinishedRun, facts, read_json

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
_BATCH = 256
_READS = {"centre-square": centre_square, **FITS}


@dataclass(frozen=True, kw_only=True)
class Files:
    """How the run made its pixels of a file: side in pixels, and the part of the image kept."""

    size: int
    fit: Literal["centre-square", "squash", "pad"]


class _Card(ModelCard):
    def save(self, filepath: Path | str) -> None:
        """Whole or not at all: the next `save_pretrained` would take half a card for another's."""
        checkpoint.write_atomically(Path(filepath), str(self))


class _Model(nn.Module, PyTorchModelHubMixin):
    """What the three kinds share: folders, the Hub, and the description in config.json."""

    kind: ClassVar[str]
    network: nn.Module
    classes: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """The contents of config.json, which are the arguments of the class."""
        return self._hub_mixin_config

    @property
    def device(self) -> torch.device:
        """Where the weights are, and answers are computed."""
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The model in a local folder, without any network, or in a repository of the Hub.

        In eval mode, on the CPU. ValueError, one line, for a folder of another kind or format, or
        one that is damaged; OSError where the Hub cannot be read. Only safetensors are read: the
        mixin's own method falls back on a pickle.
        """
        source = pretrained_model_name_or_path
        if Path(source).is_dir():
            description, weights = (Path(source) / name for name in (DESCRIPTION, WEIGHTS))
        else:
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options |= {"force_download": force_download, "local_files_only": local_files_only}
            try:
                description, weights = (
                    Path(hf_hub_download(str(source), name, **options))
                    for name in (DESCRIPTION, WEIGHTS)
                )
            except HFValidationError:
                raise ValueError(f"{source}: no such folder") from None
            except OSError as error:
                raise OSError(
                    f"{source}: no such folder, and no such model on the Hub that can be read "
                    f"({' '.join(str(error).split())})"
                ) from error
        arguments = read_json(description)
        try:
            cls._check(arguments)
            model = cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{description}: {error}") from None
        tensors, _ = checkpoint.load_tensors(weights)
        checkpoint.load_into(model.network, tensors, source=str(weights))
        return model.eval()

    @classmethod
    def _check(cls, arguments: dict[str, Any]) -> None:
        """Refuse with ValueError a description that is not of this class."""
        form, kind, classes = (arguments.get(name) for name in ("format", "kind", "classes"))
        if form != FORMAT or isinstance(form, bool):
            raise ValueError(f"format {form!r}, not {FORMAT}, which this version of ddb_fast reads")
        if kind != cls.kind:
            known = {other.kind: other.__name__ for other in _Model.__subclasses__()}
            instead = f"; use {known[kind]}.from_pretrained" if kind in known else ""
            raise ValueError(f"holds a {kind}, not a {cls.kind}{instead}")
        if wrong := sorted(arguments.keys() ^ cls._hub_mixin_init_parameters.keys() - {"self"}):
            raise ValueError(f"{wrong[0]} is missing or unknown")
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError("classes are no list of names")
        if not isinstance(arguments["run"], dict):
            raise ValueError("run holds no fields")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the folder: weights, config.json and, where there is none yet, README.md.

        ValueError, before anything is written, if a README.md there is not this model's card.
        """
        path = Path(save_directory) / "README.md"
        if path.exists() and path.read_text("utf-8") != str(self.generate_model_card()):
            raise ValueError(
                f"{path}: another model's card, or edited; move it or name another folder"
            )
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._save_weights(save_directory)
        self.save_description(save_directory)  # after them: a folder without it is not believed

    def save_description(self, folder: Path) -> None:
        """Write config.json, in its own order, whole or not at all."""
        text = json.dumps(self.description, indent=2)
        checkpoint.write_atomically(folder / DESCRIPTION, text + "\n")

    def generate_model_card(self, *, file: str | None = None) -> ModelCard:
        """The card that `save_pretrained` writes; file: as in `model_card.card`."""
        return _Card(card(self.kind, type(self).__name__, self.description, file=file))


class _OfImages:
    """What classifier and amplifier share: images in, logits out, as in the run's evaluation."""

    def __init__(
        self,
        *,
        format: int,
        kind: str,
        classes: Sequence[str],
        network: dict[str, Any],
        images: dict[str, Any],
        run: dict[str, Any],
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.config = config = from_dict(ClassifierConfig, network, prefix="network.")
        self.files = from_dict(Files, images, prefix="images.")
        self.network = bare_network(config, len(classes))

    @classmethod
    def _taken(
        cls, run: FinishedRun, weights: Path, files: Files, method: str | None, seed: int
    ) -> Self:
        network, config, classes = load_classifier(weights)
        if config.weights not in (None, "imagenet"):
            config = replace(config, weights="file")  # its place is nobody's business
        about = facts(run, classes=len(classes), method=method, seed=seed)
        model = cls(
            format=FORMAT,
            kind=cls.kind,
            classes=list(classes),
            network=asdict(config),
            images=asdict(files),
            run=about,
        )
        model.network.load_state_dict(network.state_dict())
        return model.eval()

    def read(self, *files: str | Path) -> Tensor:
        """Image files as the run saw them, (N, 3, S, S) uint8, S the side of its decoded copy.

        ValueError for one that is broken, and for what is no path.
        """
        for file in files or (None,):
            if not isinstance(file, str | Path):
                got = "none" if file is None else type(file).__name__
                raise ValueError(f'read takes paths, as in read("a.png", "b.png"); got {got}')
        fitted = _READS[self.files.fit]
        return torch.stack([fitted(read_image(Path(file)), self.files.size) for file in files])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) fp32 of RGB images (N, 3, H, W) of any size, uint8 or floats in [0, 1].

        The view and normalisation are those of the run's evaluation: of the decoded images the
        logits are the same, bit for bit in batches of the same size. ValueError for other shapes,
        types and ranges.
        """
        check_input(images)
        if images.is_floating_point():
            images = images.float() * 255
        pixels = normalise(self._view(images), self.config.pixel_norm)
        return self.network(pixels.to(next(self.network.parameters()).dtype)).float()

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[str]:
        """The name of each image's likeliest class; images as in `forward`, on any device."""
        check_input(images)
        self.eval()
        batches = images.split(_BATCH)
        best = [self(batch.to(self.device)).argmax(1).cpu() for batch in batches]
        return [self.classes[label] for label in torch.cat(best).tolist()]

    def _save_weights(self, folder: Path) -> None:
        save_classifier(folder / WEIGHTS, self.network, self.config, self.classes)


class Classifier(_OfImages, _Model):
    """A run's classifier: `model(images)`, `model.predict(images)`, `model.classes`."""

    kind = "classifier"

    @classmethod
    def from_run(
        cls, run: str | Path, *, method: str | None = None, seed: int | None = None
    ) -> Self:
        """Take one classifier out of a run's folder.

        method: may be left out where the run has only one debiased classifier, or only erm; seed:
        the first one there. ValueError, one line, for what the folder lacks.
        """
        finished = FinishedRun.open(run)
        method, seed = finished.choose(method, seed)
        folder = finished.path / "classifiers" / method / f"seed{seed}"
        files = Files(size=finished.config.data.cache_size, fit="centre-square")
        return cls._taken(finished, folder / WEIGHTS, files, method, seed)

    def _view(self, images: Tensor) -> Tensor:
        side = min(images.shape[2:])
        top, left = ((n - side) // 2 for n in images.shape[2:])
        square = images[:, :, top : top + side, left : left + side]
        return centre(square, self.config.image_size)


class BiasAmplifier(_OfImages, _Model):
    """A run's bias amplifier; its loss on an image tells how much that is at odds with its class.

    Biased on purpose: its predictions are no classifier's.
    """

    kind = "bias-amplifier"

    @classmethod
    def from_run(cls, run: str | Path) -> Self:
        """Take the amplifier trained on synthetic images out of a run's folder.

        ValueError, one line, where none is finished, or the decoded images are gone.
        """
        finished = FinishedRun.open(run)
        if "amplifier" not in finished.done:
            raise ValueError(finished.without("bias amplifier"))
        try:
            meta = read_json(finished.path / "cache" / "meta.json")
        except ValueError as error:
            raise ValueError(f"{error}; the run's own command makes it again") from None
        files = Files(size=meta["sizes"]["small"], fit=meta["fit"])
        weights = finished.path / "amplifier" / WEIGHTS
        return cls._taken(finished, weights, files, None, finished.config.seed)

    def _view(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if images.shape[2] != images.shape[3]:
            shape = (size, size)
            images = F.interpolate(images.float(), shape, mode="bilinear", antialias=True)
        return amplifier_view(images, size)


class Generator(_Model):
    """A run's class-conditional diffusion model: `generator.sample(labels, seeds)`."""

    kind = "generator"

    def __init__(
        self,
        *,
        format: int,
        kind: str,
        classes: Sequence[str],
        network: dict[str, Any],
        sampling: dict[str, Any],
        run: dict[str, Any],
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.config = from_dict(DiffusionConfig, network, prefix="network.")
        self.sampling = from_dict(SamplingConfig, sampling, prefix="sampling.")
        self.network = build_unet(self.config, len(classes))

    @classmethod
    def from_run(cls, run: str | Path) -> Self:
        """Take the generator out of a run's folder; ValueError, one line, if it has none."""
        finished = FinishedRun.open(run)
        if "diffusion" not in finished.done:
            raise ValueError(finished.without("generator"))
        unet, config, classes = load_diffusion(finished.path / "diffusion")
        seed = finished.config.seed
        about = facts(finished, classes=len(classes), method=None, seed=seed)
        model = cls(
            format=FORMAT,
            kind=cls.kind,
            classes=list(classes),
            network=asdict(config),
            sampling=asdict(replace(finished.config.sampling, load=None)),
            run=about,
        )
        model.network.load_state_dict(unet.state_dict())
        return model.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One evaluation of the network, see `models.unet.UNet`."""
        return self.network(x, t, y)

    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int] | Tensor,
        *,
        guidance_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Images of the classes numbered `labels` from their seeds, (N, 3, S, S) uint8 on the CPU.

        Guidance, steps and sampler are the run's where none are given. An image depends on weights,
        label and seed alone, bit for bit where `batch_size` is the same: images are drawn in
        batches padded to it, by default N or the run's (`sampling.batch_size`), whichever is
        smaller, and halved where memory does not suffice. ValueError for labels, seeds or options
        that there are not.
        """
        try:
            labels, seeds = map(torch.as_tensor, (labels, seeds))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"labels and seeds must be whole numbers: {error}") from error
        if labels.numel() and (labels.is_floating_point() or seeds.is_floating_point()):
            raise ValueError("labels and seeds must be whole numbers, not floating point")
        labels, seeds = labels.long(), seeds.long()
        if labels.ndim != 1 or labels.shape != seeds.shape or not len(labels):
            raise ValueError(
                f"labels {tuple(labels.shape)} and seeds {tuple(seeds.shape)} must be as many, and "
                "at least one"
            )
        known = range(len(self.classes))
        if wrong := [label for label in labels.tolist() if label not in known]:
            raise ValueError(f"label {wrong[0]} is not one of 0 to {known[-1]}")
        if seeds.min() < 0:
            raise ValueError(f"seed {seeds.min()} is negative")
        own = self.sampling
        size = min(own.batch_size, len(labels)) if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size {size} must be at least 1")
        asked = {"guidance_scale": guidance_scale, "steps": steps, "sampler": sampler}
        asked = {name: value for name, value in asked.items() if value is not None}
        options = sampling_options(self.config, replace(own, **asked))
        self.eval()
        images, _ = generate_within_memory(self.network, labels, seeds, at_once=size, **options)
        return images

    def _save_weights(self, folder: Path) -> None:
        save_diffusion(folder, self.network.state_dict(), self.config, self.classes)
