"""Ten minutes of healing for a searched plan, and as many for constant merging of the same time: rows of searched.md.

    python -m docs.study.dinov2 --healed    # after --searched

Both are fitted first, and learn from the images that they were fitted on, without labels.
"""

from __future__ import annotations

from docs.study.dinov2.measure import Line, complete, read_lines
from docs.study.dinov2.searched import BATCH, HEALED, SEARCHED, distances, images_to_learn_from, show
from docs.study.dinov2.weights import trained
from vitreuse import parse_plan
from vitreuse.compress.fitting import convert_on_images
from vitreuse.compress.search.healing import heal_for
from vitreuse.model.copies import exact_copy

WANTED = [(224, "0.6"), (518, "0.4")]  # image sizes in pixels, and shares of the MACs
MINUTES = 10.0
NAMES = {"searched": "searched, healed", "constant merging": "constant merging, healed"}


def healed(image_size_px: int, share_text: str) -> Line:
    """The line of a size and a share of the MACs, with a row for each of NAMES.

    Raises:
        ValueError: Its plans are not searched yet.
    """
    lines = read_lines(SEARCHED)
    if (image_size_px, share_text) not in lines:
        raise ValueError(f"no plan of {share_text} at {image_size_px} px in {SEARCHED.name}: run --searched first.")
    original = exact_copy(trained(image_size_px, global_pool=""))
    fitted, tried = images_to_learn_from(image_size_px)
    rows = []
    for row in lines[image_size_px, share_text]["rows"]:
        if row["name"] in NAMES:
            converted = convert_on_images(original, parse_plan(row["plan"]), fitted).conversion.model
            pupil = heal_for(original, converted, fitted, tried, MINUTES, BATCH[image_size_px])
            how = {"rate": pupil.rate, "num_steps": pupil.num_steps, "seconds": pupil.seconds}
            kept = {key: row[key] for key in ("plan", "predicted", "speedup")}
            blank = {"forecast": None, "tried": None}
            rows.append({"name": NAMES[row["name"]], **kept, **blank, **distances(image_size_px, pupil.model), **how})
    return {"image_size_px": image_size_px, "plan": share_text, "rows": rows}


def main() -> None:
    """Completes healed.jsonl and writes searched.md."""
    complete(HEALED, WANTED, healed)
    show()
