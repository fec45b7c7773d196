"""The configuration of a whole run: frozen dataclasses and JSON.

Only the standard library is imported, so that `ddb-fast --help` and tools that only read a
configuration start at once. Lengths are counted in *images* shown to a network, never in steps, so
that learning-rate ramps and the EMA's half-life do not change with batch size or number of devices.
Points that the paper leaves open are fields here, never constants elsewhere.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ddb_fast.fields import flatten, from_dict

_MOST = 2**63 - 1  # what PyTorch counts to
_COUNT, _SHARE, _POSITIVE = (1, _MOST), (0.0, 1.0), (0.0, math.inf)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("images", "batch_size", "accumulate", "per_class", "steps"), _COUNT),
    **dict.fromkeys(("timesteps", "image_size", "cache_size", "threads", "width"), _COUNT),
    **dict.fromkeys(("looks",), _COUNT),
    **dict.fromkeys(("channels", "blocks_per_level", "norm_groups", "embedding"), _COUNT),
    **dict.fromkeys(("head_channels", "ema_half_life", "checkpoint_images"), _COUNT),
    **dict.fromkeys(("channel_multipliers",), _COUNT),
    **dict.fromkeys(("rho", "validation_share", "test_share", "warmup_from"), _SHARE),
    **dict.fromkeys(("dropout", "class_dropout", "momentum", "beta_start", "beta_end"), _SHARE),
    **dict.fromkeys(("lr", "weight_decay", "grad_clip", "guidance_scale"), _POSITIVE),
    **dict.fromkeys(("step_size", "adjustment", "checkpoint_minutes"), _POSITIVE),
    **dict.fromkeys(("seed", "seeds", "attention_levels"), (0, _MOST)),
    "moving_average": (0.0, 0.999),
    **dict.fromkeys(("q", "first_share"), (1e-6, 1.0)),
    **dict.fromkeys(("upweight", "draws"), _COUNT),
    **dict.fromkeys(("inverse_strengths", "min_snr_gamma"), (1e-6, math.inf)),
    "guidance_interval": _SHARE,
    "clip_percentile": (0.0, 100.0),
    "warmup": (0.0, 0.99),
    "ema_rampup": (1e-6, math.inf),
}
"""Allowed values, ends included, of the fields of each name."""

METHODS = (
    "erm", "lff", "jtt", "dfr", "group-dro",
    "ddb-i", "ddb-i-error-set", "ddb-i-predicted", "ddb-ii",
    "real-amplifier-i", "real-amplifier-ii",
)  # fmt: skip

AMPLIFIED = frozenset({"ddb-i", "ddb-i-error-set", "ddb-i-predicted", "ddb-ii"})
"""Methods that need the amplifier trained on synthetic images."""
CONTROLS = frozenset({"real-amplifier-i", "real-amplifier-ii"})
"""Methods that need the amplifier trained on the real images."""

TAKES_RHO = ("digits", "colored-mnist", "waterbirds", "bffhq", "bar-rho")
"""Data sources whose training images depend on `data.rho`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are read, and how they are held out and cached."""

    source: Literal[
        "auto", "folder", "csv", "digits", "colored-mnist", "waterbirds", "bffhq", "bar", "bar-rho",
        "imagenet-9", "urbancars",
    ] = "auto"  # fmt: skip
    """What lies at `path`. auto: a folder or a CSV, by what it is. digits: embedded, no `path`. The
    others are published sets, read from disk; `ddb-fast data PATH --as NAME` shows what is found
    or, where that is wrong, what is expected and where the set is published."""
    path: str | None = None
    """Folder (`<class>/*`, may lie below `train/ val/ test/`), CSV (path, y[, a][, split]), or the
    root of a published set: of colored-mnist the folder of MNIST's four idx files."""
    cache_size: int = 256
    """Side in pixels of the classifier's decoded copy: shorter side resized to it, centre crop."""
    rho: float = 0.95
    """Share of bias-aligned training images where there is a choice: digits, colored-mnist and
    bar-rho any; waterbirds 0.95 (the official split), 0.9, 0.8, 0.7, 0.6; bffhq that of
    its `<percent>pct` folder, 0.995 for 0.5pct. Other sources take none."""
    validation_share: float = 0.1
    """Share of the training images held out where the data names no validation split: folder, csv,
    bar, colored-mnist (published without one: 0). Other sources do not look at it."""
    test_share: float = 0.2
    """Share of the training images held out where a folder or csv names no test split."""
    corrupt: Literal["error", "skip"] = "error"
    """What an unreadable image does to the run."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How one network is trained. `batch_size` is the global batch, shared by all devices."""

    images: int
    """Length of training: images shown, all devices together."""
    batch_size: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    """sgd only."""
    lr_schedule: Literal["constant", "cosine", "cosine-cut"] = "cosine"
    """cosine ends at zero; cosine-cut starts after the warm-up, is laid over the whole length and
    so cut before zero, as in the authors' generator."""
    warmup: float = 0.0
    """Share of `images` over which the rate rises linearly."""
    warmup_from: float = 0.0
    """Share of the peak rate at which the warm-up starts."""
    grad_clip: float | None = None
    """Largest gradient norm."""
    accumulate: int = 1
    """Micro-batches a step: `batch_size` is divided by it, and so is what GroupDRO sees at once."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the class-conditional U-Net (method: DDB's generator is `preset ddb`)."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    dropout: float = 0.15
    norm_groups: int = 32
    attention_levels: tuple[int, ...] = (0, 1, 2, 3)
    """Levels (0 = full resolution) whose down blocks attend; see attention_up."""
    attention_up: bool = False
    """Whether the up path attends at the same levels."""
    head_channels: int | None = None
    """Channels of an attention head; None: one head over all channels."""
    embedding: int = 512
    """Width of the time and class embeddings."""
    time_table: bool = True
    """A trainable table of sinusoids (authors); otherwise fixed sinusoids of any real t."""
    resample: Literal["authors", "conv"] = "authors"
    """authors: down = 3x3 + 5x5 stride-2 convolutions, up = 5x5 transposed then 3x3. conv: one 3x3
    stride-2 convolution down, nearest-neighbour then 3x3 up."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Optimisation):
    """The class-conditional diffusion model and its training."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    load: str | None = None
    """A trained diffusion model's folder (`--diffusion`): enter the road after this stage."""
    image_size: int = 64
    pixel_norm: Literal["symmetric", "imagenet"] = "symmetric"
    """symmetric: [-1, 1]. imagenet: the authors' mean and deviation, inverted on sampling."""
    timesteps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.028
    target: Literal["eps", "v"] = "eps"
    loss_scale: Literal["mean", "authors"] = "mean"
    """authors: the squared error summed over everything, divided by batch_size squared."""
    loss_weight: Literal["none", "min-snr"] = "none"
    """min-snr: images with little noise count less (Hang et al. 2023), so that the error of the
    implied x0 weighs min(signal-to-noise ratio, min_snr_gamma) whatever the target."""
    min_snr_gamma: float = 5.0
    class_dropout: float = 0.1
    """Probability that a label is replaced by the null class (classifier-free guidance)."""
    class_dropout_per: Literal["sample", "batch"] = "sample"
    ema_half_life: int | None = 100_000
    """In images; None: no moving average."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the images seen (EDM), so that early weights fade."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The synthetic set."""

    load: str | None = None
    """A folder per class with synthetic images (`--synthetic`): enter the road after this stage."""
    per_class: int = 1000
    sampler: Literal["ddpm", "ddpm-authors", "ddim", "dpm-solver-pp-2m", "unipc"] = (
        "dpm-solver-pp-2m"
    )
    steps: int = 20
    """ddpm-authors always walks every timestep."""
    guidance_scale: float = 2.0
    """1 = off; the paper's w = guidance_scale - 1."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts where low < noise <= high, the noise being its share 1 - alpha_bar of the noisy
    image's variance (0 a clean image, 1 noise alone; a published sigma is sigma^2 / (1 + sigma^2));
    steps outside cost half. Equal ends: nowhere."""
    clip_x0: bool = True
    """Clamp the predicted image to the range of real pixels at every step."""
    clip_percentile: float | None = None
    """99.5, say: before that, shrink the image until so many per cent of its values lie in range
    (dynamic thresholding), against the flat areas of strong guidance. None: clamp only."""
    batch_size: int = 128
    """Images per batch on one device; short ones are padded, so any split gives the same images.
    Halved where memory does not suffice, which may change them by rounding, and the log says so."""

    def __post_init__(self):
        interval = self.guidance_interval
        if len(interval) != 2 or interval[0] > interval[1]:
            raise ValueError(f"sampling.guidance_interval: {interval}: two shares, the lower first")
        if self.clip_percentile is not None and not self.clip_x0:
            raise ValueError("sampling.clip_percentile: needs sampling.clip_x0 true")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Optimisation):
    """A classifier and its training: the target of every method, or the amplifier."""

    model: str = "resnet18"
    """resnet18, resnet50, densenet121, cnn, mlp, or timm:NAME."""
    width: int | None = None
    """cnn and mlp only."""
    weights: str | None = None
    """None: from scratch; 'imagenet': from the Hub, what timm has for timm:NAME; else a local
    safetensors file with timm's names."""
    image_size: int = 224
    """Side of the network's input."""
    pixel_norm: Literal["symmetric", "imagenet", "double-255"] = "imagenet"
    """double-255: divided by 255 twice, as in the published Colored MNIST code; ERM is 8 to 14
    points worse for it, so only figures with it compare with the published ones."""
    augment: Literal["none", "flip", "shift-flip", "shift", "crop-flip"] = "crop-flip"
    """shift: up to an eighth of the side, edges repeated. crop-flip: RandomResizedCrop and flip."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig:
    """Which real images the amplifier's verdict calls bias-conflicting (paper, Recipe I)."""

    load: str | None = None
    """A scores.csv of the training images, another run's or one you have gone over (`--scores`):
    enter the road after the amplifier."""
    gamma: float = 3.0
    stats_over: Literal["all", "correct", "wrong"] = "correct"
    """Open in the paper: images of a class over which the loss's mean and deviation are taken."""
    filter: Literal["threshold", "none"] = "threshold"
    """none: the plain error set."""
    pseudo_groups: Literal["conflicting", "predicted"] = "conflicting"
    """Groups of ddb-i: (class, pseudo label), the paper's, or (class, predicted class)."""


@dataclass(frozen=True, kw_only=True)
class GroupDROConfig:
    """GroupDRO (Sagawa et al. 2020), for group-dro and the ddb-i methods."""

    step_size: float = 0.01
    adjustment: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReweightingConfig:
    """Recipe II. Both of LfF's refinements are open in the paper; defaults by measurement."""

    moving_average: float | None = None
    class_maximum: bool = False


@dataclass(frozen=True, kw_only=True)
class LfFConfig:
    """Learning from Failure (Nam et al. 2020); defaults as published."""

    q: float = 0.7
    """Exponent of the biased network's generalised cross-entropy."""
    moving_average: float = 0.7
    """Of each sample's two losses."""


@dataclass(frozen=True, kw_only=True)
class JTTConfig:
    """Just Train Twice (Liu et al. 2021), tuned for each data set; defaults: its Waterbirds, which
    it trained at lr 1e-5 and weight decay 1."""

    first_share: float = 0.2
    """Share of `classifier.images` after which the identification model stops (epoch 60 of 300)."""
    upweight: int = 100
    """How often an image that it gets wrong stands in the second training's set. The authors' code
    adds as many to the one that is there."""


@dataclass(frozen=True, kw_only=True)
class DFRConfig:
    """Deep Feature Reweighting (Kirichenko et al. 2023) on the validation split; as published."""

    inverse_strengths: tuple[float, ...] = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    """Values of the L1 regression's C to choose from."""
    draws: int = 10
    """Group-balanced draws whose last layers are averaged."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    preset: str
    diffusion: DiffusionConfig
    amplifier: ClassifierConfig
    classifier: ClassifierConfig
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pseudo_labels: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    group_dro: GroupDROConfig = field(default_factory=GroupDROConfig)
    reweighting: ReweightingConfig = field(default_factory=ReweightingConfig)
    lff: LfFConfig = field(default_factory=LfFConfig)
    jtt: JTTConfig = field(default_factory=JTTConfig)
    dfr: DFRConfig = field(default_factory=DFRConfig)
    methods: tuple[str, ...] = ("erm", "ddb-i", "ddb-ii")
    """erm, lff, jtt, ddb-i, ddb-i-error-set, ddb-i-predicted, ddb-ii; with bias labels group-dro,
    dfr (theirs in the validation split; trains erm too); real-amplifier-i and -ii, the paper's
    control: DDB with the amplifier trained on the real images. none: the audit alone, amplifier,
    scores and report without a classifier."""
    seeds: tuple[int, ...] = (0,)
    """A classifier per method and seed; generator and amplifier are shared."""
    audit: bool = True
    """Judge whether there is a bias at all, which takes three more trainings of the amplifier's
    length, and whether the generator copied training images."""
    selection: Literal[
        "last", "average_accuracy", "unbiased_accuracy", "worst_group_accuracy"
    ] = "last"  # fmt: skip
    """Which weights of a target classifier are kept: those of the last step, or those best by this
    figure on the validation split, every method alike."""
    looks: int = 20
    """How often the validation split is looked at in a training, where `selection` asks for it."""
    seed: int = 0
    """Of the diffusion model, the synthetic set and the amplifier."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it."""
    step: Literal["auto", "eager", "graph", "compile"] = "auto"
    """How training steps are launched: op by op (eager), recorded as one CUDA graph, or compiled by
    torch.compile and, on one GPU, recorded. auto: on one GPU a graph where that is measured to be
    faster, else eager; elsewhere eager."""
    threads: int | None = None
    """CPU threads of each process; None: every core, shared by the processes of this machine."""
    out: str = "runs/run"
    """Folder of the run."""
    checkpoint_minutes: float = 5.0
    checkpoint_images: int | None = None
    """Also checkpoint every so many images."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    progress: bool = True

    def __post_init__(self):
        if self.methods == ("none",):
            object.__setattr__(self, "methods", ())
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise ValueError(f"methods: {unknown}; known: {', '.join(METHODS)}; or none alone")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds}: at least one, each once")
        if not self.out:
            raise ValueError("out: it is empty; name a folder")
        for name, value in flatten(self).items():
            low, high = RANGES.get(name.rsplit(".", 1)[-1], (-math.inf, math.inf))
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not (
                    low <= number <= high and math.isfinite(number)
                ):
                    raise ValueError(f"{name}: {number} is outside {low} to {high}")

    @property
    def scored(self) -> bool:
        """Whether scores of the training images are needed: by a method, or as all there is."""
        return not self.methods or not AMPLIFIED.isdisjoint(self.methods)

    @property
    def amplifies(self) -> bool:
        """Whether the amplifier is trained on synthetic images here."""
        return self.scored and self.pseudo_labels.load is None


def from_json(text: str) -> RunConfig:
    """The inverse of `to_json`."""
    return from_dict(RunConfig, json.loads(text))


def with_fields(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """`config` with flattened fields ("diffusion.lr") replaced; values may be strings."""
    nested = dataclasses.asdict(config)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = nested
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise ValueError(f"unknown field: {key}")
        node[leaf] = value
    return from_dict(RunConfig, nested)
