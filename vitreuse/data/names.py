"""What a name says: an image, something that a system left behind, a split, or a twin that only looks the same.

One rule for folders, tars, shards and builders, for training and for validation.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable

from vitreuse.io.errors import DataError

# The file endings that count as images are those of torchvision's ImageFolder; timm's readers know png, jpg and jpeg.
IMAGE_EXTENSIONS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)

# What operating systems and file servers leave among images without a dot before its name.
LEFTOVERS = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),  # Synology, QNAP
        *("lost+found", "lost.dir"),  # Linux, Android
    )
)

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "dev", "devel", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "testset"), "test"),
}
# Words beside these that say nothing: train_images is train.
IDLE_WORDS = frozenset(("set", "data", "dataset", "image", "images", "img", "imgs", "split", "folder"))


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system, and so never looked at."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(ENDINGS) and not is_leftover(name)


def kind_of(name: str) -> str:
    """The kind by which a file or folder that is no image is counted: its ending, or what a system left behind."""
    if name.startswith("._"):
        return "._*"
    kind = name if is_leftover(name) else os.path.splitext(name)[1].lower() or "without an ending"
    return kind if kind.isprintable() else ascii(kind)


def split_named(name: str) -> str | None:
    """The split that a name by itself stands for, 'train', 'val' or 'test': of valid, Testing or train_images."""
    split, rest = _read_split(name)
    return None if rest else split


def name_splits(names: Iterable[str]) -> dict[str, str]:
    """The split of each name that stands for one, by itself or beside its like, as seg_train does beside seg_test."""
    read = {name: (split, rest) for name in names for split, rest in [_read_split(name)] if split is not None}
    num_splits = Counter(rest for _, rest in {*read.values()})
    return {name: split for name, (split, rest) in read.items() if not rest or num_splits[rest] > 1}


def _read_split(name: str) -> tuple[str | None, str]:
    """The split of the one word of a name that stands for one, and its other words."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    rest = " ".join(word for word in words if word not in SPLIT_WORDS and word not in IDLE_WORDS)
    return splits[0] if len(splits) == 1 else None, rest


def find_lookalike(name: str, others: Collection[str]) -> str | None:
    """Another name that looks the same, as a letter may be one code point or two, which ascii() shows; None without."""
    composed = unicodedata.normalize("NFC", name)
    return next((other for other in others if other != name and unicodedata.normalize("NFC", other) == composed), None)


def refuse_lookalikes(place: str, names: Iterable[str]) -> None:
    """Refuses class folders that differ in Unicode normalisation alone: copies between systems make two of one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"class folders {other!a} and {name!a} of {place} differ only in Unicode normalisation: "
                "put the images of one into the other."
            )
