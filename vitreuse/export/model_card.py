"""The README of a hub folder: what the model is, what it costs, how to load it."""

from __future__ import annotations

from typing import Any

from timm.models._hub import generate_readme

from vitreuse.io.file_names import printable

USAGE = """```python
import timm
import vitreuse  # makes timm know the plan

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # of a folder: "local-dir:FOLDER"
```"""


def model_card(model: Any, name: str, macs: int, accuracy: str | None, training: str | None) -> str:
    """The text, with the header that a hub reads.

    Args:
        model: The model itself.
        name: For the title.
        macs: Per image.
        accuracy: One line, where it is known.
        training: One line, where the model was not trained to its end.
    """
    plan = f"`{model.plan}`" if hasattr(model, "plan") else "none, timm's own model"
    rows, columns = model.patch_embed.img_size
    details = {
        "Architecture": model.pretrained_cfg["architecture"],
        "Plan": f"{plan} (one attention spec per layer)",
        "Input": f"{model.patch_embed.proj.in_channels} x {rows} x {columns}",
        "Params": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "MACs": f"{macs / 1e6:,.1f} M per image",
    }
    if accuracy is not None:
        details["Top-1"] = accuracy
    if training is not None:
        details["Training"] = training
    text = generate_readme(
        {
            "tags": ["image-classification", "timm", "vitreuse"],
            "license": "unknown",
            "description": "An image classifier: a vision transformer, exported by vitreuse.",
            "details": details,
            "usage": USAGE,
        },
        name,
    )
    return printable(text)
