"""Every plain ViT that timm knows by name takes a plan, or is refused with the reason."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vitreuse
from vitreuse import measure_damage, measure_redundancy, parse_plan
from vitreuse.cost.counters import fvcore_macs, torch_flops
from vitreuse.io.progress import WorkProgress
from vitreuse.model.keywords import REASONS, read_keywords

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module)]
IMAGE_PX = {8: 40, 14: 70, 16: 80, 32: 160}  # of five patches a side, by the side of a patch
# One name of each family, with what sets it apart from a plain ViT.
FAMILIES = {
    "augreg": ("vit_tiny_patch16_224.augreg_in21k", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"init_values": 1e-5, "num_classes": 0}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"num_prefix_tokens": 5}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {"gated": True}),
    "dino": ("vit_small_patch8_224.dino", {}),
    "clip": ("vit_base_patch32_clip_224.openai", {"pre_norm": True}),
    "clip of openai": ("vit_base_patch32_clip_quickgelu_224.openai", {"pre_norm": True}),
    "siglip": ("vit_base_patch16_siglip_224", {"global_pool": "map"}),
    "siglip by mean": ("vit_base_patch16_siglip_gap_224", {"global_pool": "avg"}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"num_prefix_tokens": 2}),
    "deit3": ("deit3_small_patch16_224", {"no_embed_class": True}),
    "mae": ("vit_base_patch16_224.mae", {}),
    "aimv2": ("aimv2_large_patch14_224", {"gated": True, "global_pool": "avg"}),
    "so150m": ("vit_so150m_patch16_reg4_map_256", {"global_pool": "map"}),
    "mean, fc_norm": ("vit_medium_patch16_reg4_gap_256", {"global_pool": "avg"}),
}


def pair(name: str, plan: str = "exact*3", **keywords):
    """timm's model of a name, three narrow layers of it for small images, with random weights everywhere, and ours
    with the same; both in float64."""
    with torch.device("meta"):
        side = timm.create_model(name, depth=1).patch_embed.patch_size[0]
    shape = {"img_size": IMAGE_PX[side], "depth": 3, "embed_dim": 96, "num_heads": 3, **keywords}
    plain = timm.create_model(name, **shape).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5)
    ours = vitreuse.create_model(name, plan=plan, **shape).double().eval()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    """By name why it takes no plan, None where it takes one."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        with torch.device("meta"):
            plain = timm.create_model(name, weight_init="skip")
            try:
                ours, keywords = read_keywords(plain)
            except ValueError as error:
                found[name] = str(error)
                continue
            made = timm.create_model(ours, plan=f"exact*{len(plain.blocks)}", weight_init="skip", **keywords)
        assert shapes(made) == shapes(plain), name
        found[name] = None
    return found


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.proof
def test_most_names_take_a_plan_and_the_others_are_told_why(verdicts):
    refused = {name: said for name, said in verdicts.items() if said is not None}
    assert len(refused) <= 0.07 * len(verdicts)
    kinds = "|".join(REASONS)
    for name, said in refused.items():
        reason = rf"takes no plan, since it has a ({kinds}) in layer 0, which [^:]+: give [^.]+\."
        assert re.fullmatch(f"{name} {reason}", said)


@pytest.mark.proof
def test_readme_says_how_many(verdicts):
    number = sum(said is None for said in verdicts.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{number} of the {len(verdicts)} names" in " ".join(readme.split())


@pytest.mark.parametrize(("name", "has"), FAMILIES.values(), ids=FAMILIES)
def test_an_exact_plan_is_timms_model(name, has):
    plain, ours = pair(name)
    for key, value in has.items():
        if key in ("num_prefix_tokens", "no_embed_class", "global_pool", "num_classes"):
            assert getattr(ours, key) == value
    assert isinstance(ours.norm_pre, torch.nn.Identity) != has.get("pre_norm", False)
    assert (type(ours.blocks[0].mlp).__name__ in ("SwiGLU", "GluMlp")) == has.get("gated", False)
    images = torch.randn(2, 3, *plain.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        expected, found = plain(images), ours(images)
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert torch.equal(ours.forward_head(ours.forward_features(images)).argmax(-1), expected.argmax(-1))
    assert ours.pretrained_cfg["mean"] == plain.pretrained_cfg["mean"]
    assert ours.pretrained_cfg["crop_pct"] == plain.pretrained_cfg["crop_pct"]


MORE_PLANS = [pytest.param(plan, marks=pytest.mark.proof) for plan in ("lowrank:5 reuse skip", "span:3 none exact-2")]


@pytest.mark.parametrize("plan", ["exact reuse-3 linear", *MORE_PLANS])
@pytest.mark.parametrize(("name", "has"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_counts_as_both_counters_do(name, has, plan):
    ours = pair(name, plan)[1].float()
    images = torch.randn(1, 3, *ours.patch_embed.img_size)
    macs = sum(vitreuse.count_macs(ours).values())
    assert macs == fvcore_macs(ours, images)[""]
    assert 2 * macs == torch_flops(ours, images)[""]


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "aimv2_large_patch14_224"])
def test_a_gated_mlp_takes_every_word_but_fewer_units(name):
    with torch.device("meta"):
        made = vitreuse.create_model(name, plan="exact reuse-3 none linear skip", depth=5)
        assert str(made.plan) == "exact reuse-3 none linear skip"
        with pytest.raises(ValueError, match=r"'exact/64' sets the hidden units .* may be gated"):
            vitreuse.create_model(name, plan="exact/64*5", depth=5)


@pytest.mark.parametrize("size_px", [56, 98])
def test_positions_are_resampled_as_timm_does(size_px, tmp_path):
    name = "vit_small_patch14_dinov2"
    trained, _ = pair(name)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "input_size": (3, 70, 70)}
    keywords = {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": size_px, "pretrained_cfg_overlay": overlay}
    plain = timm.create_model(name, pretrained=True, **keywords).eval()
    ours = vitreuse.create_model(name, plan="exact*3", pretrained=True, **keywords).eval()
    assert torch.equal(ours.pos_embed, plain.pos_embed)
    assert ours.patch_embed.grid_size == (size_px // 14,) * 2
    images = torch.randn(1, 3, size_px, size_px)
    with torch.no_grad():
        assert torch.allclose(ours(images), plain(images), rtol=1e-5, atol=1e-5 * float(plain(images).abs().max()))


def test_keywords_of_training_reach_the_model_and_those_of_the_shape_too():
    made = vitreuse.create_model(
        "deit3_small_patch16_224", plan="exact*2 reuse", depth=3, drop_path_rate=0.3, img_size=64, num_classes=5,
        reuse_backend="map", init_values=0.1,
    )
    assert made.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    assert made.head.out_features == 5
    assert float(made.blocks[0].ls1.gamma[0].detach()) == pytest.approx(0.1)
    assert made.plan_options.reuse_backend == "map"
    features = vitreuse.create_model("vit_tiny_patch16_224", plan="exact*12", features_only=True, out_indices=(1, 3))
    assert len(features(torch.randn(1, 3, 224, 224))) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "resnet18 takes no plan, since it is no VisionTransformer of timm"),
        ("vit_smal_patch16_224", "'vit_smal_patch16_224' is not a model of timm or vitreuse, did you mean"),
        ("vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_224 takes no plan, since it embeds patches by a HybridEmbed"),
    ],
)
def test_what_takes_no_plan_is_refused_by_its_name(name, said):
    with pytest.raises(ValueError, match=said):
        vitreuse.create_model(name, plan="exact*12")


@pytest.mark.parametrize(
    "command",
    [
        ["vitreuse", "plan", "exact-2*12", "--model", "vit_small_patch14_dinov2", "--image-size", "98"],
        ["eval", "flops", "vit_small_patch14_dinov2", "--plan", "exact-2*12", "--image-size", "98"],
        ["eval", "flops", "vit_base_patch32_clip_224.openai", "--plan", "exact-2*12"],
    ],
    ids=" ".join,
)
@pytest.mark.proof
def test_commands_take_any_name(command):
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "exact" in result.stdout


@pytest.mark.parametrize("name", [of for of, _ in FAMILIES.values()], ids=FAMILIES)
@pytest.mark.proof
def test_every_family_is_measured_converted_and_folded(name):
    plain, _ = pair(name)
    plain = plain.float()
    images = torch.randn(3, 3, *plain.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    progress = WorkProgress("x", "images", 3, enabled=False)
    redundancy = measure_redundancy(plain, [(images,)], progress)
    assert redundancy.entropy.isfinite().all()
    damage = measure_damage(plain, [(images,)], parse_plan("none span:3").specs, redundancy, progress)
    assert all(amount > 0 for change, amount in damage.items() if change.layer < 2)  # a class row sees all of a window
    converted = vitreuse.convert(plain, "exact-2 none exact").model
    with torch.no_grad():
        expected = converted(images)
        assert expected.shape == plain(images).shape and not torch.equal(expected, plain(images))
        assert (vitreuse.fold(converted)(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
        same = vitreuse.convert(plain, "exact*3").model(images)
        assert (same - plain(images)).abs().max() <= 1e-5 * same.abs().max()
