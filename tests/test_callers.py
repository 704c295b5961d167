"""What callers have and bring: their model, random state and grad mode are left alone, and their models and images of
every kind go through the functions behind the commands, or are refused in a sentence."""

import contextlib
import logging
import warnings
import weakref

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_verbs import NUM_IMAGES, SIZES, Labelled, build, pixels
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

import vitreuse
from vitreuse.__main__ import main
from vitreuse.compress.search.delivery import deliveries
from vitreuse.compress.search.pieces import Pieces
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.model_card import Provenance, model_card
from vitreuse.files.programs import silenced
from vitreuse.model.copies import evaluating, exact_copy

WORDS = "exact,lowrank:5,none,-2"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_needs_gradients_has_them_in_a_callers_mode(mode):
    model = build()
    expected = vitreuse.convert(model, "exact lowrank:5 exact", pixels()).model.state_dict()
    with mode():
        found = vitreuse.convert(model, "exact lowrank:5 exact", pixels())
        searched = vitreuse.search(model, pixels(), 0.9, "memory", minutes=0, words=WORDS)
        assert searched.expected_of_healing(0.001).num_steps >= 1
        assert vitreuse.similarity(model, pixels(), "reuse,none").damage
    assert all(torch.equal(value, expected[key]) for key, value in found.model.state_dict().items())
    assert found.projections and searched.facts["chosen"]["share"] <= 0.9


CALLS = {
    "convert": lambda model, _: vitreuse.convert(model, "exact lowrank:5 none", pixels()),
    "search": lambda model, _: vitreuse.search(model, pixels(), 0.8, minutes=0, words=WORDS),
    "heal": lambda model, _: vitreuse.heal(model, vitreuse.convert(model, "none*3").model, pixels(), minutes=0.001),
    "similarity": lambda model, _: vitreuse.similarity(model, pixels(), "reuse,none"),
    "export": lambda model, folder: vitreuse.export(model, folder, ("hub", "torch")),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_callers_model_and_random_state_stay_as_they_are(call, tmp_path):
    model = build().train()
    model.blocks[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    CALLS[call](model, tmp_path / "new")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_modes_come_back_after_an_error():
    model = build().train()
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training and model.blocks[1].attn.training


def test_a_callers_logging_stays_off():
    logging.disable(logging.CRITICAL)
    try:
        with silenced():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_images_are_taken_in_the_dtype_of_the_model():
    expected = vitreuse.similarity(build(), pixels(), "reuse,none")
    found = vitreuse.similarity(build(), pixels().double(), "reuse,none")
    assert found.facts == expected.facts


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_models_in_half_precision_are_searched_and_converted(given):
    model = build().bfloat16()
    found = vitreuse.convert(model, "exact reuse none", pixels().to(given))
    assert next(found.model.parameters()).dtype == torch.bfloat16 and found.matches
    searched = vitreuse.search(model, pixels().to(given), 0.9, minutes=0, words="exact,reuse,none,-2")
    assert searched.model(pixels(2).bfloat16()).isfinite().all()


@pytest.mark.parametrize("keywords", [{"num_classes": 0}, {"num_classes": 5}])
def test_a_distilled_model_is_searched_with_classes_and_without(keywords):
    sizes = {"embed_dim": 16, "num_heads": 2, "depth": 3, "patch_size": 2, "img_size": 8}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes, **keywords).eval()
    found = vitreuse.search(model, pixels(), 0.8, minutes=0, words=WORDS)
    assert found.facts["chosen"]["share"] <= 0.8


def test_of_a_model_of_any_size_projections_are_fitted_at_that_of_the_images():
    model = build(dynamic_img_size=True)
    found = vitreuse.convert(model, "exact lowrank:5 exact", pixels(size=12))
    before, after = found.projections[1]
    assert 0 < after <= before < 2


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.randn(8, 1, 8, 8), "images are 1 x 8 x 8 and the model takes 3 channels: convert them."),
        (torch.randn(8, 3, 8, 9), "images are 3 x 8 x 9, no whole patches of 2 x 2 pixels: resize them."),
        (torch.randn(8, 3, 12, 8), "images are 12 x 8 and the model was built for 8 x 8"),
    ],
)
def test_images_that_a_model_of_any_size_does_not_take_are_one_sentence(images, said):
    with pytest.raises(ValueError) as error:
        vitreuse.search(build(dynamic_img_size=True), images, 0.8, minutes=0, words=WORDS)
    assert said in str(error.value)


def test_projections_of_an_attention_that_says_nothing_stay_numbers():
    model = build()
    torch.nn.init.zeros_(model.blocks[1].attn.proj.weight)
    torch.nn.init.zeros_(model.blocks[1].attn.proj.bias)
    found = vitreuse.convert(model, "exact lowrank:5 exact", pixels())
    assert found.model.blocks[1].attn.key_proj.isfinite().all() and found.projections[1] == (0.0, 0.0)


def test_four_images_are_enough_for_the_default_and_three_are_not_fitted():
    found = vitreuse.convert(build(), "exact lowrank:5 exact", pixels(4))
    assert found.facts["lowrank_start"] == "pooled" and found.layers == []
    assert vitreuse.convert(build(), "exact lowrank:5 exact", pixels(5)).facts["lowrank_start"] == "fitted"


def test_what_is_made_by_a_search_shares_the_original():
    original = exact_copy(build())
    images = vitreuse.Images(pixels(), 4)
    made = deliveries(Pieces(original), {"one": vitreuse.parse_plan("exact none exact")}, images, images)
    assert all(delivery.conversion.original is original for delivery in made.values())


class Counted(IterableDataset):
    def __len__(self):
        return NUM_IMAGES

    def __iter__(self):
        return iter(pixels().split(4))


def test_a_stream_that_knows_its_length_gives_batches():
    images = vitreuse.Images(Counted())
    assert len(images) == NUM_IMAGES and torch.equal(torch.cat(list(images)), pixels())


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"images": pixels()}, "images are a dictionary: give the tensor, or the data set, that is in it."),
        (
            DataLoader(Labelled(), batch_sampler=BatchSampler(RandomSampler(Labelled()), 4, False)),
            "a loader that shuffles gives other images each time",
        ),
    ],
)
def test_what_gives_other_images_each_time_is_refused(images, said):
    with pytest.raises(ValueError, match=said):
        vitreuse.Images(images)


def test_a_model_that_cannot_change_has_no_damage():
    found = vitreuse.similarity(build(depth=1), pixels(), "reuse")
    assert found.damage == {}


def test_a_model_in_half_precision_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"the model is in torch.bfloat16: export it in float32, as model.float\(\)."):
        vitreuse.export(build().bfloat16(), tmp_path / "new", "torch")


def test_images_of_an_export_are_in_memory_a_batch_at_a_time(tmp_path):
    live: set[int] = set()
    most: list[int] = []

    class Set(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, number):
            image = pixels()[number % NUM_IMAGES].clone()
            live.add(id(image))
            weakref.finalize(image, live.discard, id(image))
            most.append(len(live))
            return image

    vitreuse.export(build(), tmp_path / "new", "torch", Set())
    assert max(most) <= 24


FOREIGN = "of no export: choose another -o DIR."


def test_weights_that_somebody_else_wrote_are_not_replaced(tmp_path):
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"holds model.safetensors, which is {FOREIGN}"):
        vitreuse.export(build(), tmp_path, "safetensors")
    vitreuse.export(build(), tmp_path / "own", "safetensors")
    vitreuse.export(build(), tmp_path / "own", "safetensors")
    (tmp_path / "own/model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds model.onnx, which is {FOREIGN}"):
        vitreuse.export(build(), tmp_path / "own", ("safetensors", "onnx"))


def test_an_export_is_not_written_over_what_it_reads(tmp_path, capsys):
    save_hub_folder(build(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert main(["export", str(tmp_path), "-o", str(tmp_path), "--image-size", "16"]) == 2
    argv = ["vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "model.safetensors"), "--format", "safetensors"]
    told = capsys.readouterr().err
    said = f"vitreuse export: {tmp_path} holds the weights that are exported: choose another -o DIR."
    assert told.splitlines()[-1] == said
    assert main(["export", *argv, "-o", str(tmp_path)]) == 2
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_card_says_whether_a_model_has_classes():
    with_classes, without = (model_card(build(**of), Provenance("a"), 1) for of in ({}, {"num_classes": 0}))
    assert "pipeline_tag: image-classification" in with_classes and "An image classifier" in with_classes
    assert "pipeline_tag: image-feature-extraction" in without and "classif" not in without


def test_a_head_that_begins_with_zeros_is_a_head():
    model = build()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    copied = exact_copy(model)
    assert torch.allclose(copied.forward_features(pixels(2)), model.forward_features(pixels(2)), atol=1e-5)
    assert vitreuse.convert(model, "none exact*2", pixels()).facts["agreement"] is not None


def test_a_hybrid_cannot_be_searched_and_is_told_why():
    model = timm.create_model("vit_base_r50_s16_224", embed_dim=16, depth=1, num_heads=2, img_size=32)
    with pytest.raises(ValueError, match="HybridEmbed"):
        vitreuse.search(model, torch.randn(8, 3, 32, 32), 0.9, minutes=0)


def test_conversion_on_images_takes_a_plan_as_text():
    found = vitreuse.convert_on_images(build(), "exact/32 none exact", [pixels(8)])
    assert str(found.conversion.model.plan) == "exact/32 none exact" and found.layers
    with pytest.raises(ValueError, match="plan has 2 layers"):
        vitreuse.convert_on_images(build(), "exact none", [pixels(8)])


def test_a_description_of_a_model_warns_of_none_of_its_own_options():
    model = timm.create_model(
        "vit_reuse_tiny_patch16_224", plan="lowrank:5 reuse exact", lowrank_sharing="none", reuse_backend="map", **SIZES
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vitreuse.describe(model)
    assert found.facts["plan"] == "lowrank:5 reuse exact"
