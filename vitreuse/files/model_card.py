"""The README of a hub folder: what the model is, what it costs, how to load it."""

from dataclasses import dataclass
from typing import Any

from timm.models._hub import generate_readme

from vitreuse.cost.macs import count_params
from vitreuse.io.file_names import printable
from vitreuse.model.class_names import has_classes

TASKS = {  # a hub's word, and ours, by whether a model has classes
    True: ("image-classification", "An image classifier"),
    False: ("image-feature-extraction", "A model of image features"),
}
USAGE = """```python
import timm
import vitreuse  # makes timm know the plan

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # of a folder: "local-dir:FOLDER"
```"""


@dataclass(frozen=True)
class Provenance:
    """What is known of a trained model beside the model itself.

    Attributes:
        name: For the title of its card.
        accuracy: One line, where it is known.
        training: How far it was trained, where that is not to the end: for the card and the metadata of every file.
    """

    name: str
    accuracy: str | None = None
    training: str | None = None


def model_card(model: Any, known: Provenance, macs: int) -> str:
    """The text, with the header that a hub reads, of a model that takes so many MACs per image."""
    plan = f"`{model.plan}`" if hasattr(model, "plan") else "none, timm's own model"
    rows, columns = model.patch_embed.img_size
    details = {
        "Architecture": model.pretrained_cfg["architecture"],
        "Plan": f"{plan} (one attention spec per layer)",
        "Input": f"{model.patch_embed.proj.in_channels} x {rows} x {columns}",
        "Params": f"{count_params(model) / 1e6:.2f} M",
        "MACs": f"{macs / 1e6:,.1f} M per image",
    }
    details |= {"Top-1": known.accuracy} if known.accuracy is not None else {}
    details |= {"Training": known.training} if known.training is not None else {}
    task, what = TASKS[has_classes(model)]
    card = {
        "tags": [task, "timm", "vitreuse"],
        "license": "unknown",
        "description": f"{what}: a vision transformer, exported by vitreuse.",
        "details": details,
        "usage": USAGE,
    }
    return printable(generate_readme(card, known.name, task))
