"""Similarity of maps: against maps written out naively, over all kinds of layer, fused or not."""

import itertools
import json

import pytest
import timm
import torch
from PIL import Image

from vitreuse.__main__ import main
from vitreuse.compress.recording import attention_maps
from vitreuse.compress.redundancy import Redundancy, map_similarity, measure_head_errors, measure_redundancy
from vitreuse.compress.row_sample import draw_rows
from vitreuse.cost.measure import peak_memory_mib
from vitreuse.files.hub import save_hub_folder
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy

SIZES = {"img_size": 15, "patch_size": 3, "embed_dim": 22, "depth": 4, "num_heads": 2, "num_classes": 7}
H, N = 2, 26


def build(plan=None, **keywords):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224" if plan is None else "vit_reuse_tiny_patch16_224"
    keywords = {**SIZES, **keywords, **({} if plan is None else {"plan": plan})}
    model = timm.create_model(name, **keywords).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # maps far from uniform
    return model


def peaked(plan=None, **keywords):
    """The same with maps of few keys a row."""
    model = build(plan, **keywords)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:44] *= 4  # queries and keys
    return model


def images(number=3):
    return torch.randn(number, 3, 15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive_maps(model, batch):
    """The maps of timm's unfused model, by its own dropout layers, which see them."""
    found, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone())))
    with torch.no_grad():
        model.forward_features(batch)
    for hook in hooks:
        hook.remove()
    return found


def measured(model, *batches, **rows):
    progress = WorkProgress("", "images", 1, enabled=False)
    return measure_redundancy(model, [(batch, None) for batch in batches], progress, **rows)


def naive_similarity(maps):
    similarity = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            variations = [0.5 * (a[n, h, q] - b[n, h, q]).abs().sum()
                          for n in range(len(a)) for h in range(H) for q in range(N)]
            similarity[i, j] = 1 - sum(variations) / len(variations)
    return similarity


@pytest.mark.parametrize("plan", [None, "exact*4"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_that_of_the_maps(plan, qk_norm):
    model, plain, batch = build(plan, qk_norm=qk_norm), build(qk_norm=qk_norm), images(2)
    plain.load_state_dict(model.state_dict())
    expected = naive_similarity(naive_maps(plain, batch))
    assert 0.1 < expected[0, 1] < 0.98  # neither all alike nor all apart
    assert torch.allclose(map_similarity(model, batch).double(), expected, atol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_redundancy_is_that_of_all_heads_and_images(keywords):
    model = build(**keywords)
    found, maps = measured(model, images(2), images(3)), naive_maps(model, torch.cat([images(2), images(3)]))
    num_prefix = model.num_prefix_tokens
    for i, a in enumerate(maps):
        for h in range(H):
            assert torch.allclose(found.entropy[i, h].double(), -(a[:, h] * a[:, h].log()).sum(-1).mean(), atol=1e-5)
            distances = [naive_distance(image[h], num_prefix) for image in a]
            assert found.distance[i, h].item() == pytest.approx(sum(distances) / 5, abs=1e-5)
            for j, b in enumerate(maps):
                for g in range(H):
                    expected = (a[:, h] - b[:, g]).abs().sum(-1).mean() / 2
                    assert found.variation[i, j, h, g].item() == pytest.approx(expected.item(), abs=1e-5)


def naive_distance(weights, num_prefix):
    """Of one head and image, on 5 x 5 patches."""
    total = weight = 0.0
    for query in range(25):
        for key in range(25):
            seen = weights[num_prefix + query, num_prefix + key].item()
            total += seen * ((query // 5 - key // 5) ** 2 + (query % 5 - key % 5) ** 2) ** 0.5
            weight += seen
    return total / weight


def test_the_best_heads_are_those_that_match():
    """Layer 1 has the heads of layer 0 in another order; layer 2 is none."""
    variation = torch.full((3, 3, 3, 3), torch.nan)
    order = [2, 0, 1]
    variation[:2, :2] = 0.5
    variation[0, 1, range(3), order] = variation[1, 0, order, range(3)] = 0.1
    variation[0, 0].fill_diagonal_(0)
    variation[1, 1].fill_diagonal_(0)
    found = Redundancy(variation, torch.zeros(3, 3), torch.zeros(3, 3))
    assert torch.allclose(found.best_head[:2, :2], torch.tensor([[1, 0.9], [0.9, 1]]))
    assert torch.allclose(found.same_head[:2, :2], torch.tensor([[1, 0.5], [0.5, 1]]))
    assert found.best_head[2].isnan().all() and found.best_head[:, 2].isnan().all()


def test_layers_without_patches_as_keys_have_no_distance():
    found = measured(build("exact none lowrank:5 span:3"), images())
    assert found.distance.isnan().all(1).tolist() == [False, True, True, False]
    assert found.entropy.isnan().all(1).tolist() == [False, True, False, False]
    assert found.distance[3].max() < 2**0.5  # a span of 3 reaches the neighbours alone


def test_memory_does_not_grow_with_the_images(monkeypatch):
    monkeypatch.setattr("vitreuse.compress.redundancy.MAP_NUMBERS", 1)  # image by image
    model, batches = build(), [images(2) for _ in range(16)]
    few, many = (
        peak_memory_mib(lambda count=count: measured(model, *batches[:count]), model.parameters(), torch.device("cpu"))
        for count in (2, 16)
    )
    assert 0 < many < 1.01 * few


@pytest.mark.parametrize("reuse_backend", ["map", "qk"])
def test_a_reuse_layer_has_its_anchors_map(reuse_backend):
    found = map_similarity(build("exact reuse exact reuse", reuse_backend=reuse_backend), images())
    assert found[0, 1] == found[2, 3] == 1
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert found[0, 2] < 0.9


def test_a_partial_layer_has_its_own_heads_last_and_hands_them_on_first():
    model, batch = build("exact reuse:1 reuse:1 exact"), images(1)
    first, second, third, _ = (layer.weights for layer in attention_maps(model, batch))
    assert torch.equal(second[:, 0], first[:, 0])
    assert not torch.allclose(second[:, 1], first[:, 1], atol=0.01)
    assert torch.equal(third[:, 0], second[:, 1])


@pytest.mark.parametrize(("plan", "keywords"), [
    ("exact reuse:1 exact reuse", {}),
    ("span:3 reuse:1 exact span:5", {}),
    ("exact none reuse exact", {"reuse_backend": "qk"}),
    ("lowrank:5 reuse:1*3", {"lowrank_projection": "mean"}),
])
def test_maps_give_the_outputs_of_the_layers(plan, keywords):
    """Values mixed by the maps are what the attention of each layer returns."""
    model, batch, outputs = build(plan, **keywords), images(2), {}
    for layer, block in enumerate(model.blocks):
        if block.has_attention:
            def keep(attn, inputs, output, layer=layer):
                outputs[layer] = attn, inputs[0], output[0]

            block.attn.register_forward_hook(keep)
    maps = attention_maps(model, batch)
    for layer, (attn, x, y) in outputs.items():
        v = x @ (attn.v.weight if hasattr(attn, "v") else attn.qkv.weight[44:]).T
        v = v + (attn.v.bias if hasattr(attn, "v") else attn.qkv.bias[44:])
        if maps[layer].weights.shape[-1] != N:
            v = torch.nn.functional.adaptive_avg_pool1d(v.transpose(1, 2), 5).transpose(1, 2)
        mixed = maps[layer].weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
        assert torch.allclose(attn.proj(mixed.transpose(1, 2).flatten(2)), y, atol=1e-10)


def test_only_maps_over_the_same_keys_are_compared():
    found = map_similarity(build("exact none lowrank:5 lowrank:5"), images())
    assert found.isnan().tolist() == [
        [False, True, True, True], [True] * 4, [True, True, False, True], [True, True, True, False]
    ]
    shared = map_similarity(build("lowrank:5*2 span:3 exact", lowrank_sharing="layerwise"), images())
    assert not shared[:2, :2].isnan().any() and not shared[2:, 2:].isnan().any()
    assert shared[:2, 2:].isnan().all()


def test_maps_are_compared_between_the_same_merges_alone():
    """Of merged tokens a map has fewer rows and columns, and no distance."""
    model = build("exact exact-3 linear exact reuse-2 skip exact/5 exact/0 none", depth=9)
    shapes = [made and tuple(made.weights.shape[-2:]) for made in attention_maps(model, images(2))]
    assert shapes == [(26, 26), (26, 26), None, (23, 23), (23, 23), None, (21, 21), (21, 21), None]
    found = measured(model, images(2), images(1))
    groups = ({0, 1}, {3, 4}, {6, 7})
    for first, second in itertools.product(range(9), range(9)):
        alike = any({first, second} <= group for group in groups)
        assert found.same_head[first, second].isnan() != alike and found.best_head[first, second].isnan() != alike
    assert found.same_head[3, 4] == 1 and found.same_head[6, 7] < 0.98
    assert found.distance.isnan().all(1).tolist() == [False] * 2 + [True] * 7
    assert found.entropy.isnan().any(1).tolist() == [shape is None for shape in shapes]
    unmerged = build("exact*2 linear exact reuse skip exact/5 exact/0 none", depth=9)
    unmerged.load_state_dict(model.state_dict())
    assert torch.equal(measured(unmerged, images(2), images(1)).distance[:2], found.distance[:2])


def test_maps_of_merged_tokens_give_the_outputs_of_the_layers():
    """By sizes, without which the map would be another."""
    model, batch, outputs = build("exact-7 exact-3 exact reuse:1"), images(2), {}
    for layer, block in enumerate(model.blocks):
        def keep(attn, inputs, output, layer=layer):
            outputs[layer] = attn, inputs[0], output[0]

        block.attn.register_forward_hook(keep)
    for (attn, x, y), made in zip(outputs.values(), attention_maps(model, batch), strict=True):
        v = attn.v(x) if hasattr(attn, "v") else attn.qkv(x)[..., 44:]
        mixed = made.weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
        assert torch.allclose(attn.proj(mixed.transpose(1, 2).flatten(2)), y, atol=1e-10)


def test_rows_are_those_of_prefix_tokens_and_of_patches_that_each_image_draws():
    sample = draw_rows(101, 23, 3, 5, torch.Generator().manual_seed(0))
    for num_tokens in (26, 19):  # before and after a merge
        rows, counts = sample.rows(num_tokens), sample.counts(num_tokens)
        assert rows.shape == (101, 8) and torch.equal(rows[:, :3], torch.arange(3).expand(101, 3))
        assert (rows.diff() > 0).all() and rows.max() == num_tokens - 1
        assert counts[:3].tolist() == [1, 1, 1] and counts.sum() == pytest.approx(num_tokens)
        drawn = rows[:, 3:].flatten().bincount(minlength=num_tokens)[3:]
        assert drawn.min() * (num_tokens - 3) / 505 > 0.5 and drawn.max() * (num_tokens - 3) / 505 < 1.6  # about evenly
    assert torch.equal(sample.rows(8), torch.arange(8).expand(101, 8)) and sample.counts(8).tolist() == [1] * 8


@pytest.mark.parametrize(("plan", "keywords"), [
    (None, {"qk_norm": True}),
    ("exact reuse:1-3 exact reuse:1", {"reg_tokens": 2}),
    ("span:3 reuse:1 exact none", {}),
    ("lowrank:5 reuse:1 lowrank:7 reuse", {}),
])
def test_rows_of_maps_are_those_of_whole_maps(plan, keywords):
    model, batch = build(plan, **keywords), images(3)
    sample = draw_rows(3, 25, model.num_prefix_tokens, 7, torch.Generator().manual_seed(0))
    for part, whole in zip(attention_maps(model, batch, sample.rows), attention_maps(model, batch), strict=True):
        assert (part is None) == (whole is None)
        if part is not None:
            rows = sample.rows(part.num_tokens)
            assert part.keys == whole.keys and part.weights.shape[2] == 7 + model.num_prefix_tokens
            expected = whole.weights.take_along_dim(rows[:, None, :, None], dim=2)
            torch.testing.assert_close(part.weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", [None, "exact exact-3 exact exact"])
def test_a_sample_of_rows_is_right_in_the_mean_over_draws(plan):
    """Of an image that comes 401 times, each time with rows of its own; the distance, a ratio, is so nearly."""
    model = peaked(plan, reg_tokens=3)
    found, expected = measured(model, images(1).expand(401, -1, -1, -1), num_rows=7), measured(model, images(1))
    for name, tolerance in (("variation", 0.008), ("entropy", 0.02), ("distance", 0.1)):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=tolerance, equal_nan=True), name


def test_a_sample_of_half_the_rows_of_peaked_maps_errs_by_less_than_a_twentieth():
    """In the variation, a mean over 5 images, between any two heads."""
    model, batch = peaked(), images(5)
    expected = measured(model, batch)
    assert expected.entropy.mean() < 1.5  # of at most log(26) = 3.3
    errors = [(measured(model, batch, num_rows=13, seed=seed).variation - expected.variation).abs().max().item()
              for seed in range(10)]
    assert min(errors) > 0.01 and max(errors) < 0.05


@pytest.mark.parametrize("num_rows", [None, 25, 10**9])
def test_all_rows_are_looked_at_where_there_are_no_more(num_rows):
    model = build("span:3 reuse:1-3 exact reuse")
    found, default = measured(model, images(2), num_rows=num_rows, seed=3), measured(model, images(2))
    for name in ("variation", "entropy", "distance"):
        assert torch.equal(getattr(found, name).nan_to_num(-1), getattr(default, name).nan_to_num(-1))


def test_a_seed_decides_the_rows_and_the_batch_does_not(monkeypatch):
    model, batch = build("exact exact-3 exact exact"), images(5)
    together, apart = measured(model, batch, num_rows=7), measured(model, batch[:2], batch[2:], num_rows=7)
    monkeypatch.setattr("vitreuse.compress.redundancy.MAP_NUMBERS", 1)
    for other in (apart, measured(model, batch, num_rows=7)):
        assert torch.allclose(together.variation, other.variation, atol=1e-6, equal_nan=True)
    another = measured(model, batch, num_rows=7, seed=1)
    assert not torch.allclose(together.variation, another.variation, atol=1e-3, equal_nan=True)


def test_no_rows_is_one_sentence():
    with pytest.raises(ValueError, match="num_rows is 0: give 1 or more rows of patches per image, or None for all"):
        measured(build(), images(1), num_rows=0)


def test_the_model_is_left_as_it_was():
    model = build("exact reuse lowrank:5 none").train()
    map_similarity(model, images(1))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_attention_is_named():
    with pytest.raises(ValueError, match="layer 0 has DiffAttention, whose map is not known"):
        map_similarity(timm.create_model("vit_tiny_patch16_224", **SIZES, attn_layer="diff").double(), images(1))


@pytest.mark.parametrize(("name", "said"), [
    ("swin_tiny_patch4_window7_224", "SwinTransformer has no maps that are known: give a ViT of timm"),
    ("resnet18", "ResNet has no maps that are known"),
    ("vit_small_patch16_18x2_224", "layer 0 has ParallelThingsBlock, whose map is not known"),
])
def test_other_models_are_named(name, said):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=said):
        measured(model, torch.zeros(1, 3, 224, 224))


def test_no_images_is_one_sentence():
    with pytest.raises(ValueError, match="there are no images"):
        measured(build())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and hub folders of an exact model and of one that reuses."""
    root = tmp_path_factory.mktemp("similarity")
    (root / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 40 + 40 * number).convert("RGB").save(root / f"photos/{number}.png")
    save_hub_folder(build().float(), root / "plain")
    save_hub_folder(build("exact reuse*2 none").float(), root / "reuse")
    save_hub_folder(build("exact-3/5 linear exact reuse/0").float(), root / "merge")
    save_hub_folder(build("linear*2 skip none/5").float(), root / "without")
    return root


def similarity(folder, name, *argv):
    return main(["similarity", str(folder / name), "--data", str(folder / "photos"), *argv])


def test_the_command_writes_what_it_found(folder, tmp_path, capsys):
    words = ["--words", "reuse,lowrank:5,none"]
    assert similarity(folder, "plain", *words, "-o", str(tmp_path), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "similarity.json").read_text()) == result
    assert (tmp_path / "similarity.png").read_bytes()[:4] == b"\x89PNG"
    assert result["num_images"] == 3 and result["same_head"][2][2] == 1
    exact = [of for of in result["damage"] if of["spec"] == "reuse" and of["anchor_spec"] == "exact"]
    best = min((of for of in exact if of["layer"] == 3), key=lambda of: of["damage"])
    assert result["layers"][3]["damage"]["reuse"] == {"anchor": best["anchor"], "damage": best["damage"]}
    alike = result["layers"][3]["same_head"]
    assert alike["similarity"] == max(result["same_head"][3][:3]) == result["same_head"][alike["anchor"]][3]
    assert sorted(result["matched_heads"][0]["heads"]) == [0, 1]


def test_the_table_is_readable(folder, capsys):
    assert similarity(folder, "plain", "--words", "reuse,lowrank:12,span:3,none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    heading = "layer entropy distance same head best head reuse lowrank:12 span:3 none"
    assert lines[2].split() == heading.split()


def test_rows_that_were_looked_at_are_told(folder, capsys):
    assert similarity(folder, "plain", "--words", "none", "--rows", "7") == 0
    assert "of each image's maps 8 of 26 rows" in capsys.readouterr().out
    rows = {}
    for given in ("7", "100"):
        assert similarity(folder, "plain", "--words", "none", "--rows", given, "--json") == 0
        rows[given] = json.loads(capsys.readouterr().out)["rows"]
    assert rows == {"7": [8, 26], "100": [26, 26]}
    assert similarity(folder, "plain", "--words", "none") == 0
    assert "of each image's maps" not in capsys.readouterr().out


def test_words_are_few_enough_for_the_model_by_default(folder, capsys):
    assert similarity(folder, "plain", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [*result["layers"][1]["damage"]] == ["reuse", "lowrank:8", "span:3", "none"]


def test_a_plan_that_reuses_has_no_damage(folder, capsys):
    assert similarity(folder, "reuse", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["damage"] == [] and result["plan"] == "exact reuse*2 none"
    assert result["layers"][1]["same_head"] == {"anchor": 0, "similarity": 1.0}
    assert result["layers"][3]["entropy"] is None and result["layers"][3]["best_head"] is None
    assert similarity(folder, "reuse") == 0


@pytest.mark.parametrize(("name", "same_head"), [
    ("merge", [[1, None, None, None], [None] * 4, [None, None, 1, 1], [None, None, 1, 1]]),
    ("without", [[None] * 4] * 4),
])
def test_plans_of_tokens_units_and_layers_have_tables_and_pictures(folder, tmp_path, capsys, name, same_head):
    assert similarity(folder, name, "--json", "-o", str(tmp_path)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["same_head"] == same_head and result["damage"] == []
    assert [pair["layer"] for pair in result["matched_heads"]] == [3] * (name == "merge")
    assert (tmp_path / "similarity.png").read_bytes()[:4] == b"\x89PNG"
    assert similarity(folder, name) == 0
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["1"], ["3"])]
    assert cells[0] == ["1", "-", "-", "-", "-"] and cells[1][2] == "-"


@pytest.mark.parametrize("word", ["exact-8", "reuse-1", "span:3-2", "exact/5", "none/7", "reuse:1/0", "linear", "skip"])
def test_damage_of_more_than_attention_is_refused_in_a_sentence(folder, capsys, word):
    argv = ["similarity", str(folder / "plain"), "--data", str(folder / "photos"), "--words", f"exact,reuse,{word}"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{word} changes more than a layer's attention" in error
    assert "vitreuse convert takes it." in error


@pytest.mark.parametrize("command", ["similarity", "search"])
@pytest.mark.parametrize("name", ["merge", "without"])
def test_damage_to_plans_of_more_than_attention_is_refused_in_a_sentence(folder, capsys, command, name):
    assert main([command, str(folder / name), "--data", str(folder / "photos"), "--words", "exact,reuse"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "layers that are not exact, and damage is measured on exact ones alone" in error


@pytest.mark.parametrize(("name", "argv", "said"), [
    ("plain", ["--words", "reuse,lowrank:26"], "lowrank:26 does not fit a model of 26 tokens: give lowrank:25 or less"),
    ("plain", ["--words", "reuse:3"], "reuse:3 does not fit a model of 2 heads: give reuse:2 or less"),
    ("plain", ["--words", "reus"], "argument --words: in reus, layer 1 is 'reus', but the words are"),
    ("plain", ["--words", "lowrank"], "lowrank needs the number of tokens it keeps"),
    ("reuse", ["--words", "none"], "exact reuse*2 none has layers that are not exact"),
    ("photos", [], "is neither a run folder nor a hub folder"),
])
def test_wrong_input_is_one_sentence(folder, capsys, name, argv, said):
    try:
        code = similarity(folder, name, *argv)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error


def test_a_missing_matplotlib_is_said_first(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert similarity(folder, "plain", "-o", str(tmp_path / "out")) == 2
    assert "pip install 'vitreuse[plots]', or take --json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batches_are_images_or_begin_with_them():
    with_labels, alone = (
        measure_redundancy(build(), batches, WorkProgress("", "", 3, enabled=False))
        for batches in ([(images(), torch.zeros(3))], [images()])
    )
    assert torch.equal(with_labels.same_head, alone.same_head) and not alone.same_head.isnan().all()


def test_heads_of_the_last_layer_are_judged_by_patch_tokens_too_where_they_are_answers():
    """Of a model without a head all rows count, as where no class token is pooled; of one with classes its own row."""
    classes, features, tokens = (
        measure_head_errors(exact_copy(build(**keywords)), [images()], WorkProgress("", "", 3, enabled=False))[:3, -1]
        for keywords in ({}, {"num_classes": 0}, {"num_classes": 0, "global_pool": ""})
    )
    assert torch.equal(features, tokens) and (features > classes).all()
