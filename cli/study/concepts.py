"""Pictures with captions, in a folder for each concept."""

from pathlib import Path
from typing import Any, Final, NamedTuple

from .sources import columns, from_folder, from_hub, need

LEAST: Final = 3
"""Pictures of a concept: the last one tests, the one before validates, the others train."""


class Picture(NamedTuple):
    """An image of Pillow, and its caption."""

    image: Any
    text: str


class Concept(NamedTuple):
    """Pictures to be learned, and those of the kind that are not to be forgotten."""

    name: str
    pictures: list[Picture]
    prior: list[Picture]


def concept_of(folder: Path) -> Concept:
    """Read a folder and, if there, pictures of the kind in general in its folder ``prior``."""
    pictures, prior = pictures_of(folder), folder / "prior"
    if len(pictures) < LEAST:
        msg = f"{folder} must have {LEAST} pictures or more, got {len(pictures)}"
        raise ValueError(msg)
    return Concept(folder.name, pictures, pictures_of(prior) if prior.is_dir() else [])


def pictures_of(folder: Path) -> list[Picture]:
    """Pictures in the order of the table ``metadata``, with ``file_name`` and ``text``."""
    rows = columns(from_folder(folder, "metadata"), "file_name", "text")
    return [Picture(opened(folder / name), text) for name, text in rows]


def opened(path: Path) -> Any:
    """Read a picture whole, in three colours."""
    with need("PIL.Image").open(path) as image:
        return image.convert("RGB")


def concepts_of(folder: Path) -> list[Concept]:
    """Every folder in a folder, by name."""
    found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not found:
        msg = f"expected a folder for each concept in {folder}, found none"
        raise ValueError(msg)
    return [concept_of(path) for path in found]


def concept_from_hub(path: str, text: str) -> Concept:
    """Pictures of a data set of the hub, all with one caption."""
    rows = columns(from_hub(path, None, "train"), "image")
    pictures = [Picture(image.convert("RGB"), text) for (image,) in rows]
    return Concept(path.rpartition("/")[2], pictures, [])
