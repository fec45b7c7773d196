"""What the loaders of published sets share: a layout that is wrong, counts that differ."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from ddb_fast.data.files import few, image_files, subfolders

logger = logging.getLogger(__name__)

_NAMED = 4
"""Differences named in a warning."""


class LayoutError(ValueError):
    """Not the files of this set; `open_benchmark` adds what is expected and where it is from."""


def folder_at(root: Path, *parts: str) -> Path:
    """A folder below the root; LayoutError if it is not there."""
    folder = root.joinpath(*parts)
    if not folder.is_dir():
        raise LayoutError(f"{root}: no folder {'/'.join(parts)}/")
    return folder


def folders_named(folder: Path, names: Collection[str]) -> list[Path]:
    """The folders of these names, in their order; LayoutError if one lacks or another is there."""
    found = [p.name for p in subfolders(folder)]
    other = [name for name in found if name not in names]
    if other:
        raise LayoutError(f"{folder}: {other[0]}/ is none of {', '.join(names)}")
    return [folder_at(folder, name) for name in names]


def images_in(folder: Path) -> list[Path]:
    """The images below a folder, sorted by folder, then name; what else lies there is logged."""
    ignored: list[Path] = []
    files = list(image_files(folder, ignored))
    if ignored:
        logger.info("%s: %d other files ignored, first %s", folder, len(ignored), ignored[0].name)
    return files


def compare_counts(name: str, found: Mapping[str, int], published: Mapping[str, int]) -> None:
    """Log a warning that says which parts of a set have another number of images than published.

    found, published: images of each part, named for people; a part that is missing has none.
    """
    parts = [*published, *(part for part in found if part not in published)]
    counts = [(part, found.get(part, 0), published.get(part, 0)) for part in parts]
    wrong = [f"{part} {here}, not {there}" for part, here, there in counts if here != there]
    if wrong:
        logger.warning(
            "%s: other counts than published, so figures do not compare with published ones: %s",
            name, few(wrong, _NAMED),
        )  # fmt: skip
