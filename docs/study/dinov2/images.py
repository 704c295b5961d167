"""The study's images: objects on backgrounds, whose label is the object, and photographs proper, which have none.

Objects, backgrounds and collections of photographs are split once (objects.csv, backgrounds.csv, collections.csv), so
that nothing of one split is in another:

    224/train, 224/val    what plans are chosen, converted and healed on: photographs, and objects on backgrounds, half
                          of which are these photographs
    224-test/train, /val  what is reported: the memory and the queries of k-NN. They share their objects, without which
                          there would be no label to find, and neither backgrounds nor scales, places and brightness
    224-photographs       a flat folder, reported too: scikit-image's and scikit-learn's, and the photographs among the
                          backgrounds of the test
    518, 518-test, 518-photographs   the same at 518 px, fewer of them

The pixels of an image follow from the seed and its number alone.

Shapes: images (rows, columns, 3) in 8 bits, cut-outs with an alpha channel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from docs.study.dinov2.packages import DATA, package_folder, read_list, read_pinned
from docs.study.dinov2.qt_resource import files_of
from vitreuse.io.durable import durable_folder

SEED = 0
SIZES_PX = (224, 518)
SHARE_OF_AREA = (0.25, 0.75)  # of the image, of the square around an object
BRIGHTNESS = (0.7, 1.3)
CROP = (0.5, 1.0)  # of a background's shorter side
LEAST_PX = 200  # the shorter side of a photograph of a collection; what is smaller there is a detail or a symbol
BACKGROUND_PX = 1200  # the shorter side that backgrounds are kept at


class Part(NamedTuple):
    """Images of one split at one size.

    Attributes:
        folder: Below the data.
        objects: The split of objects.csv.
        backgrounds: The split of backgrounds.csv, and of collections.csv.
        per_object: How many images there are of each object, by image size.
    """

    folder: str
    objects: str
    backgrounds: str
    per_object: dict[int, int]


PARTS = (
    Part("{px}/train", "train", "train", {224: 3, 518: 3}),
    Part("{px}/val", "val", "val", {224: 2, 518: 2}),
    Part("{px}-test/train", "test", "memory", {224: 8, 518: 2}),
    Part("{px}-test/val", "test", "queries", {224: 6, 518: 1}),
)


class Cutout(NamedTuple):
    """An object: its name, which is its label, and its image (rows, columns, 4), cut to what is not transparent."""

    name: str
    image: Image.Image


def composite(cutout: Image.Image, background: Image.Image, size_px: int, rng: np.random.Generator) -> Image.Image:
    """An object at a random place, scale and brightness, mirrored or not, on a random square of a background.

    The side of the square around the object is the root of its share of the image's area; the object lies within the
    image.
    """
    side = math.sqrt(rng.uniform(*SHARE_OF_AREA)) * size_px
    scale = side / max(cutout.size)
    width, height = (max(1, round(length * scale)) for length in cutout.size)
    image = _random_square(background, size_px, rng)
    pasted = cutout.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        pasted = pasted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    place = [int(rng.integers(0, size_px - length + 1)) for length in (width, height)]
    image.paste(_brightened(pasted.convert("RGB"), rng), (place[0], place[1]), pasted.getchannel("A"))
    return _brightened(image, rng)


def _random_square(background: Image.Image, size_px: int, rng: np.random.Generator) -> Image.Image:
    side = round(rng.uniform(*CROP) * min(background.size))
    left, top = (int(rng.integers(0, length - side + 1)) for length in background.size)
    square = background.resize((size_px, size_px), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square


def _brightened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = rng.uniform(*BRIGHTNESS)
    return image.point([min(255, round(value * factor)) for value in range(256)] * 3)


def composites(
    cutouts: Sequence[Cutout],
    groups: Sequence[Sequence[Image.Image]],
    size_px: int,
    per_object: int,
    seed: Sequence[int],
) -> Iterator[tuple[str, Image.Image]]:
    """Images of every object by their paths, OBJECT/NUMBER.jpg; the random numbers of each are its own."""
    images = {cutout.name: cutout.image for cutout in cutouts}
    for path, name, background, rng in choices([*images], groups, per_object, seed):
        yield path, composite(images[name], background, size_px, rng)


def choices(
    names: Sequence[str], groups: Sequence[Sequence[Any]], per_object: int, seed: Sequence[int]
) -> Iterator[tuple[str, str, Any, np.random.Generator]]:
    """Of every composite its path, its object, what is behind it, and the random numbers for all else.

    Each group of backgrounds is as likely as another.
    """
    for number in range(len(names) * per_object):
        rng = np.random.default_rng([*seed, number])
        name, backgrounds = names[number // per_object], groups[int(rng.integers(len(groups)))]
        yield f"{name}/{number % per_object}.jpg", name, backgrounds[int(rng.integers(len(backgrounds)))], rng


def apart(part: Part, size_px: int, debian: Path) -> list[str]:
    """Paths of images of a part of which no two show the same object, or the same photograph or drawing behind one.

    What is fitted, what a fit is kept by, and what plans are chosen on share nothing then, however they are dealt out.
    """
    names = [Path(line["path"]).stem for line in read_list("objects.csv") if line["split"] == part.objects]
    drawn = [line["path"] for line in read_list("backgrounds.csv") if line["split"] == part.backgrounds]
    collected = [name for name, _ in collected_photographs(part.backgrounds, debian)]
    groups = [group for group in (drawn, collected) if group]
    shown = [
        (path, {("object", name), ("behind", behind)})
        for path, name, behind, _ in choices(names, groups, part.per_object[size_px], part_seed(part, size_px))
    ]
    shown += [(f"photographs/{name}.jpg", {("behind", name)}) for name in collected]
    found, seen = [], set()
    for path, what in shown:
        if not seen & what:
            found.append(path)
            seen |= what
    return found


def part_seed(part: Part, size_px: int) -> tuple[int, int, int]:
    """Of the composites of a part at a size."""
    return SEED, size_px, PARTS.index(part)


def central_square(image: Image.Image, size_px: int) -> Image.Image:
    """The middle of an image, as large as fits, in a size."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


def build(debian: Path, data: Path = DATA) -> None:
    """Makes the folders of images that are not there.

    Args:
        debian: Where Debian's packages are unpacked.
        data: Where the images go.
    """
    for size_px in SIZES_PX:
        for name in (f"{size_px}", f"{size_px}-test"):
            parts = [part for part in PARTS if part.folder.format(px=size_px).startswith(f"{name}/")]
            if not (data / name).is_dir():
                with durable_folder(data / name) as folder:
                    for part in parts:
                        _write_part(folder / Path(part.folder).name, part, size_px, debian)
        if not (data / f"{size_px}-photographs").is_dir():
            with durable_folder(data / f"{size_px}-photographs") as folder:
                for name, image in photographs(debian):
                    _write(central_square(image, size_px), folder / f"{name}.jpg")


def _write_part(folder: Path, part: Part, size_px: int, debian: Path) -> None:
    cutouts = [read_cutout(line, debian) for line in read_list("objects.csv") if line["split"] == part.objects]
    lines = [line for line in read_list("backgrounds.csv") if line["split"] == part.backgrounds]
    backgrounds = [_reduced(read_image(line, debian / line["package"])) for line in lines]
    collected = dict(collected_photographs(part.backgrounds, debian))
    groups = [group for group in (backgrounds, [*collected.values()]) if group]
    seed = part_seed(part, size_px)
    for name, image in composites(cutouts, groups, size_px, part.per_object[size_px], seed):
        _write(image, folder / name)
    for name, image in collected.items():
        _write(central_square(image, size_px), folder / f"photographs/{name}.jpg")


def _write(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, subsampling=0)


def read_cutout(line: dict[str, str], debian: Path) -> Cutout:
    """The object of a line of objects.csv."""
    content = read_pinned(debian / line["package"] / line["path"], line["sha256"])
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return Cutout(Path(line["path"]).stem, image.crop(image.getchannel("A").getbbox()))


def read_image(line: dict[str, str], folder: Path) -> Image.Image:
    """The image of a line of another list, in RGB."""
    return Image.open(io.BytesIO(read_pinned(folder / line["path"], line["sha256"]))).convert("RGB")


def _reduced(image: Image.Image) -> Image.Image:
    """An image whose shorter side is at most BACKGROUND_PX."""
    scale = min(1.0, BACKGROUND_PX / min(image.size))
    width, height = (round(length * scale) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def photographs(debian: Path) -> Iterator[tuple[str, Image.Image]]:
    """The photographs proper by their names."""
    for line in read_list("photographs.csv"):
        yield f"{line['package']}-{Path(line['path']).stem}", read_image(line, package_folder(line["package"]))
    for line in read_list("backgrounds.csv"):
        if line["kind"] == "photograph" and line["split"] in ("memory", "queries"):
            path = Path(line["path"])
            name = path.stem if path.parent.name == "nature" else path.parents[2].name
            yield f"{line['package'].split('-')[0]}-{name}", read_image(line, debian / line["package"])


def collected_photographs(split: str, debian: Path) -> Iterator[tuple[str, Image.Image]]:
    """The photographs in the collections of a split, among them some paintings, by their names."""
    for line in read_list("collections.csv"):
        if line["split"] == split:
            for path, content in files_of(read_pinned(debian / line["package"] / line["path"], line["sha256"])):
                image = Image.open(io.BytesIO(content)) if path.endswith(".webp") else None
                if image is not None and image.mode == "RGB" and min(image.size) >= LEAST_PX:
                    yield f"{Path(line['path']).stem}-{Path(path).stem}", image.convert("RGB")
