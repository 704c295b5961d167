"""Folders of images on a disk: one folder a class, as torchvision's ImageFolder reads them.

Unlike torchvision, what is hidden or left behind by a system (see names.py) is no class and no image, and what cannot
be read is refused.
"""

from pathlib import Path

from vitreuse.data.tree import DiskFolder, check_classes, list_below


def list_classes(folder: Path) -> list[str]:
    """Lists the class folders in the order of their labels.

    Raises:
        DataError: the folder cannot be read.
    """
    return [*DiskFolder(str(folder)).level().folders]


def list_images(folder: Path, class_name: str) -> list[str]:
    """Lists a class's images, sub-folders and links included, as paths below the folder.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    inner = DiskFolder(str(folder / class_name))
    images, _ = list_below(inner)
    check_classes(str(folder), {class_name: inner}, [len(images)])
    return [f"{class_name}/{name}" for name in images]
