"""A converted model that learns from its original for some minutes, and what that regained of the distance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group

from vitreuse.compress.search.audit import batch_of
from vitreuse.compress.search.healing import heal_for, regained
from vitreuse.files.hub import plan_text
from vitreuse.io.tables import Shown, table_of, titled
from vitreuse.model.copies import exact_copy, seeded
from vitreuse.model.keywords import architecture
from vitreuse.verbs.search.table import of_healing
from vitreuse.verbs.split import split_apart

SHARED = ("num_classes", "num_features", "num_prefix_tokens")  # attributes in which the two must agree


@dataclass(frozen=True, eq=False, repr=False)
class Healed(Shown):
    """What a healing hands over.

    Attributes:
        model: A healed copy of the converted model, in evaluation mode.
        facts: How long it learned, and how far it is from the original, before and after.
    """

    model: Any
    facts: dict[str, Any]

    def table(self) -> Group:
        return table(self.facts)


@torch.inference_mode(False)
def heal(original: Any, converted: Any, images: Any, minutes: float = 10.0, shown: Any = None, seed: int = 0) -> Healed:
    """A copy of a converted model that wins back what the conversion cost, with its original as the teacher.

    It learns from images without labels for so many minutes, at the best of three rates, each of which is tried for a
    tenth of the time before; what takes it no nearer is not kept. A run of ``python -m train`` with train.heal takes
    more images than fit into minutes, and labels, augmentation, ranks and annealing.

    Args:
        original: A plain ViT of timm, or one of ours whose layers are exact; it stays as it is.
        converted: What convert or search made of it, on the same device; it stays as it is.
        images: What Images takes, as a tensor, a data set or a loader: most to learn from, others to choose a rate on.
        minutes: At the best rate.
        shown: Other images, on which the result is measured; an eighth of the images by default.
        seed: Of which images are for what.

    Raises:
        ValueError: The converted model is none of this original, or not in float32; there are too few such images, or
            the minutes are none.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"{minutes} is no time in minutes: give a number above 0.")
    _refuse_other(original, converted)
    split, teacher = split_apart(original, images, shown, seed), exact_copy(original)
    with seeded(seed):
        pupil = heal_for(teacher, converted, split.fitted, split.tried, minutes, 2 * batch_of(teacher))
        found = regained(teacher, converted, pupil, split.shown)
    facts = {
        "name": architecture(converted),
        "plan": plan_text(converted),
        "images": {part: len(images) for part, images in split._asdict().items()},
        **asdict(found),
    }
    return Healed(pupil.model, facts)


def _refuse_other(original: Any, converted: Any) -> None:
    """Raises ValueError for a model that is none of the original's, elsewhere, or too coarse to train."""
    if not hasattr(converted, "plan"):
        raise ValueError(f"a {type(converted).__name__} has no plan: convert the original first.")
    for name in SHARED:
        given, wanted = (getattr(model, name) for model in (converted, original))
        if given != wanted:
            of = f"the converted model has {given} {name} and the original {wanted}"
            raise ValueError(f"{of}: give the original that it was made of.")
    sizes = [(model.patch_embed.img_size, model.patch_embed.patch_size) for model in (converted, original)]
    if sizes[0] != sizes[1]:
        of = f"the converted model takes images and patches of {sizes[0]} and the original of {sizes[1]}"
        raise ValueError(f"{of}: give the original that it was made of.")
    place, wanted = (next(model.parameters()).device for model in (converted, original))
    if place != wanted:
        raise ValueError(f"the converted model is on {place} and the original on {wanted}: move one of them.")


def table(result: dict[str, Any]) -> Group:
    """How far the model was and is from its original, and by what healing."""
    rows = (("before", f"{result['before']:.3g}"), ("after", f"{result['after']:.3g}"))
    fitted = result["images"]["fitted"]
    title = f"{result['name']}, plan {result['plan']}, healed on {fitted:,} images"
    return titled(title, table_of(("healing", "distance"), rows, ("healing",)), of_healing(result))
