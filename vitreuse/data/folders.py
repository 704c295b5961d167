"""Folders of images: one folder a class, as torchvision's ImageFolder reads them.

Unlike torchvision, names that start with a dot are no classes and no images.
"""

import os
from pathlib import Path

from vitreuse.data.decode import IMAGE_EXTENSIONS
from vitreuse.data.errors import DataError

ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def is_image_name(name: str) -> bool:
    """Tells whether a file of this name counts as an image."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def list_classes(folder: Path) -> list[str]:
    """Lists the class folders in the order of their labels."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_images(folder: Path, class_name: str) -> list[str]:
    """Lists a class's images, sub-folders and links included, as paths below the folder.

    Raises:
        DataError: there are none.
    """
    paths = []
    for parent, _, names in sorted(os.walk(folder / class_name, followlinks=True)):
        below = os.path.relpath(parent, folder)
        paths += [os.path.normpath(os.path.join(below, name)) for name in sorted(names) if is_image_name(name)]
    if not paths:
        endings = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"class folder {folder / class_name} has no images ({endings}): fill or remove it.")
    return paths
