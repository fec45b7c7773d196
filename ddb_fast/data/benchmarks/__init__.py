"""The published data sets, one file each: read from what lies on disk, never downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddb_fast.config import DataConfig
from ddb_fast.data.benchmarks.bar import list_bar, list_bar_rho
from ddb_fast.data.benchmarks.bffhq import list_bffhq
from ddb_fast.data.benchmarks.colored_mnist import list_colored_mnist
from ddb_fast.data.benchmarks.imagenet9 import list_imagenet9
from ddb_fast.data.benchmarks.layout import LayoutError
from ddb_fast.data.benchmarks.urbancars import list_urbancars
from ddb_fast.data.benchmarks.waterbirds import list_waterbirds
from ddb_fast.data.listing import Listing


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set: how it is listed, what is expected on disk, and where it comes from."""

    load: Callable[[Path, DataConfig], Listing]
    tree: str
    published: str


_BAR = {
    "tree": "ROOT/train/<class>_<n>.jpg and ROOT/test/<class>_<n>.jpg, classes climbing, diving, "
    "fishing, pole vaulting, racing, throwing",
    "published": "https://github.com/alinlab/BAR",
}
BENCHMARKS = {
    "colored-mnist": Benchmark(
        load=lambda root, config: list_colored_mnist(
            root, rho=config.rho, validation_share=config.validation_share
        ),
        tree="ROOT/ with MNIST's train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each as it is, .gz or .xz",
        published="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "waterbirds": Benchmark(
        load=lambda root, config: list_waterbirds(root, rho=config.rho),
        tree="ROOT/metadata.csv (img_id, img_filename, y, split, place, place_filename) and the "
        "images it names, or the same in ROOT/waterbird_complete95_forest2water2/",
        published="https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz",
    ),
    "bffhq": Benchmark(
        load=lambda root, config: list_bffhq(root, rho=config.rho),
        tree="ROOT/0.5pct/{align,conflict}/{0,1}/<id>_<age>_<gender>.png, ROOT/valid/*.png and "
        "ROOT/test/*.png",
        published="https://github.com/kakaoenterprise/Learning-Debiased-Disentangled",
    ),
    "bar": Benchmark(
        load=lambda root, config: list_bar(root, validation_share=config.validation_share), **_BAR
    ),
    "bar-rho": Benchmark(load=lambda root, config: list_bar_rho(root, rho=config.rho), **_BAR),
    "imagenet-9": Benchmark(
        load=lambda root, config: list_imagenet9(root),
        tree="ROOT/train/<wnid>/*.JPEG and ROOT/val/<wnid>/*.JPEG with the 42 wnids of the nine "
        "classes, optionally ROOT/imagenet-a/<wnid>/*.jpg and ROOT/texture_clusters.csv (path, "
        "cluster_1, cluster_2, cluster_3)",
        published="https://image-net.org (ILSVRC2012) and "
        "https://github.com/hendrycks/natural-adv-examples (ImageNet-A)",
    ),
    "urbancars": Benchmark(
        load=lambda root, config: list_urbancars(root),
        tree="ROOT/bg-0.95_co_occur_obj-0.95/train/<group>/*.jpg and "
        "ROOT/bg-0.5_co_occur_obj-0.5/{val,test}/<group>/*.jpg, groups "
        "obj-{urban,country}_bg-{urban,country}_co_occur_obj-{urban,country}",
        published="https://github.com/facebookresearch/Whac-A-Mole",
    ),
}
"""Every published set by the name that `data.source` has for it."""


def open_benchmark(root: Path, config: DataConfig) -> Listing:
    """List the set that `config.source` names; ValueError, one line, for what is wrong.

    Where the layout is, the line ends with the expected tree and where the set is published.
    """
    benchmark = BENCHMARKS[config.source]
    try:
        if not root.is_dir():
            raise LayoutError(f"{root}: no such folder")
        return benchmark.load(root, config)
    except LayoutError as error:
        raise LayoutError(
            f"{error}; expected {benchmark.tree}; published at {benchmark.published}"
        ) from None
