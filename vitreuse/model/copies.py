"""A trained ViT as a model of ours: a copy under any plan, or layers around its own modules; it stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import DropPath, Mlp, PatchDropout
from torch import nn

from vitreuse.model.block import InplaceMlp, PlanBlocks
from vitreuse.model.class_names import name_classes, names_of
from vitreuse.model.keywords import KINDS, layers_of, read_keywords, unsupported
from vitreuse.model.preprocessing import PREPROCESSING, image_settings
from vitreuse.model.vit import PlanVisionTransformer
from vitreuse.plan import EXACT, Plan, Spec

ANY_SEED = 0  # of weights that are replaced
IDLE = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # in inference


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block a model is in evaluation mode; then each of its modules is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block torch draws by a seed, on all devices in use; then it goes on as if nothing had been drawn."""
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=used):
        torch.default_generator.manual_seed(seed)
        if used:
            torch.cuda.manual_seed_all(seed)
        yield


def exact_copy(model: Any) -> Any:
    """A trained ViT as a model of ours with exact attention in all layers and equal outputs, in evaluation mode.

    Raises:
        ValueError: It is no ViT of timm or ours, or has parts that a model with a plan lacks.
    """
    with seeded(ANY_SEED):
        copy = untrained_copy(model, f"exact*{len(layers_of(model))}").eval()
    own, given = copy.state_dict(), model.state_dict()
    odd = [key for key in {**own, **given} if key not in own or key not in given or own[key].shape != given[key].shape]
    if odd:
        raise unsupported(model, f"has a {odd[0]} of its own")
    copy.load_state_dict(given)
    _check_parts(model, copy)
    difference = _difference(copy, model)
    if not difference < torch.finfo(next(model.parameters()).dtype).eps ** 0.5:  # sums in another order
        raise unsupported(model, f"makes something else of the same weights, {difference:.1g} of its largest output")
    return copy


def untrained_copy(model: Any, plan: str | Plan, **options: Any) -> Any:
    """A model of ours of the shape of a ViT, with its preprocessing, device and dtype, a plan, and random weights.

    Args:
        model: One of timm's or ours.
        plan: One spec per layer.
        options: Further keywords, such as lowrank_sharing.

    Raises:
        ValueError: It is no ViT of timm or ours, or the plan does not suit it.
    """
    name, keywords = read_keywords(model)
    overlay = preprocessing_of(model)
    made = timm.create_model(name, plan=str(plan), pretrained_cfg_overlay=overlay, **keywords, **options)
    name_classes(made, names_of(model))
    return made.to(next(model.parameters()))


def preprocessing_of(model: Any) -> dict[str, Any]:
    """What a model's pretrained_cfg says of its images, as an overlay for another's."""
    images = getattr(model, "pretrained_cfg", None) or {}
    size = {"input_size": image_settings(model)["input_size"]}  # that it was built for, which decides what is built
    return size | {key: images[key] for key in PREPROCESSING if images.get(key) is not None}


def adopted_layers(model: Any, spec: Spec = EXACT, grid: tuple[int, int] | None = None) -> PlanBlocks:
    """Layers of ours, all under one spec, around the submodules of a ViT whose layers are exact: nothing is copied.

    Args:
        model: One of timm's or ours.
        spec: Of a kind of layer that has timm's submodules and computes its map; token projections are uninitialised.
        grid: The (rows, columns) of patches that the layers are built for, the model's own when None.

    Raises:
        ValueError: A layer is not a standard one.
    """
    for block in model.blocks:
        attn = block.attn
        if type(block) not in KINDS[""] or type(attn) not in KINDS["attn"]:
            raise ValueError(
                f"layers of {type(block).__name__} around {type(attn).__name__} have no plan: use a model of timm's "
                "Block and Attention, as vit, deit and deit3 are."
            )
        if getattr(attn, "gate", None) is not None or attn.proj.in_features != attn.qkv.in_features:
            raise ValueError("attention that is gated, or not as wide as its tokens, has no plan: use a standard ViT.")
    attn, depth, given = model.blocks[0].attn, len(model.blocks), next(model.parameters())
    trunk = {"depth": depth, "embed_dim": attn.proj.in_features, "num_heads": attn.num_heads, "class_token": False}
    size = {"img_size": grid or model.patch_embed.grid_size, "patch_size": 1, "reg_tokens": model.num_prefix_tokens}
    ours = PlanVisionTransformer(plan=f"{spec}*{depth}", **trunk, **size, global_pool="avg", device="meta")
    layers: Any = ours.blocks
    for layer, block in zip(layers, model.blocks, strict=True):
        layer.attn.scale = block.attn.scale  # 1 where fold has put it into the weights
        for name, projection in layer.attn.named_parameters(recurse=False):
            setattr(layer.attn, name, nn.Parameter(given.new_empty(projection.shape)))
        for own, found in ((layer, block), (layer.attn, block.attn), (layer.mlp, block.mlp)):
            for name, module in found.named_children():
                if name not in ("attn", "mlp"):
                    setattr(own, name, module)
        if type(block.mlp) not in (Mlp, InplaceMlp):
            layer.mlp = block.mlp
    return layers


def _check_parts(model: nn.Module, copy: nn.Module) -> None:
    """Compares what no weight shows: activations, and what norms add to a variance."""
    given, own = _parts(model), _parts(copy)
    for name in {**given, **own}:
        if given.get(name) != own.get(name):
            raise unsupported(model, f"has {name} = {given.get(name)} where ours would have {own.get(name)}")


def _parts(model: nn.Module) -> dict[str, str]:
    """The kind of each module without modules in it that does something in inference; the epsilon of a norm."""
    leaves = {name: part for name, part in model.named_modules() if not any(part.children())}
    return {
        name: f"{type(part).__name__}(eps={part.eps})" if hasattr(part, "eps") else type(part).__name__
        for name, part in leaves.items()
        if not isinstance(part, IDLE)
    }


@torch.no_grad()
def _difference(copy: Any, model: Any) -> float:
    """Largest difference of the outputs for a random image, as a part of the largest output."""
    size = (1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    with evaluating(model):
        expected, found = model(images), copy(images)
        if not expected.any():  # by a head that begins with zeros
            expected, found = model.forward_features(images), copy.forward_features(images)
    return float((found - expected).abs().max() / expected.abs().max())
