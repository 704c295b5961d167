"""Merging of tokens against its definition, image by image and token by token."""

import pytest
import timm
import torch
from cases import CASES, Case, images
from timm.layers import GluMlp, SwiGLU

from vitreuse.files.networks import resolve_targets
from vitreuse.model import merge as merging_file
from vitreuse.model.merge import are_decided, choice_margins, choose_merging, merge, unmerge


def naive(x, keys, sizes, num_prefix, num_merged):
    """Tokens, sizes and the place of each token after a merge of one image."""
    num_tokens = len(x)
    likeness = keys.float().mean(0)
    first, second = range(num_prefix, num_tokens, 2), range(num_prefix + 1, num_tokens, 2)
    ties = []
    for a in first:
        cosines = [float(torch.cosine_similarity(likeness[a], likeness[b], dim=0)) for b in second]
        best = max(cosines)
        ties.append((best, a, second[cosines.index(best)]))
    strongest = sorted(ties, key=lambda tie: -tie[0])[:num_merged]
    goes = {a: b for _, a, b in strongest}
    kept = [i for i in range(num_tokens) if i not in goes]
    made = {i: [i, *(a for a, b in goes.items() if b == i)] for i in kept}
    tokens = torch.stack([sum(x[j] * sizes[j] for j in made[i]) / sum(sizes[j] for j in made[i]) for i in kept])
    places = [kept.index(goes.get(i, i)) for i in range(num_tokens)]
    return tokens, torch.stack([sum(sizes[j] for j in made[i]) for i in kept]), places


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("num_merged", [0, 1, 4, 7])
def test_merging_is_its_definition_layer_after_layer(num_prefix, num_merged):
    torch.manual_seed(num_merged)
    x = torch.randn(3, num_prefix + 29, 5, dtype=torch.float64)
    sizes, places = torch.ones(x.shape[:2], dtype=torch.float64), torch.arange(x.shape[1]).expand(3, -1)
    wanted = [(image, torch.ones(len(image), dtype=torch.float64), list(range(len(image)))) for image in x]
    for _ in range(2):
        keys = torch.randn(3, 2, x.shape[1], 4, dtype=torch.float64)
        merging = choose_merging(keys.mean(1, dtype=torch.float32), num_prefix, num_merged)
        x, sizes = merge(x, sizes, merging)
        places = merging.moved().gather(1, places)
        found = [naive(w, k, s, num_prefix, num_merged) for (w, s, _), k in zip(wanted, keys, strict=True)]
        wanted = [(w, s, [moved[p] for p in old[2]]) for (w, s, moved), old in zip(found, wanted, strict=True)]
    for image, (tokens, of_sizes, of_places) in enumerate(wanted):
        torch.testing.assert_close(x[image], tokens)
        torch.testing.assert_close(sizes[image], of_sizes)
        assert places[image].tolist() == of_places
        torch.testing.assert_close(unmerge(x, places)[image], tokens[of_places])


def test_of_equals_the_first_merges_into_the_first():
    merging = choose_merging(torch.ones(1, 8, 2), 2, 2)
    assert merging.merged.tolist() == [[2, 4]] and merging.kept.tolist() == [[0, 1, 3, 5, 6, 7]]
    assert merging.into.tolist() == [[2, 2]] and merging.moved().tolist() == [[0, 1, 2, 2, 2, 3, 4, 5]]


@pytest.mark.parametrize("num_tokens", [3, 4, 5, 12])
@pytest.mark.parametrize("num_merged", [1, 2, 4])
def test_margins_are_those_to_the_next_tie_and_to_the_next_partner(num_tokens, num_merged):
    num_prefix, num_merged = 1, min(num_merged, (num_tokens - 1) // 2)
    likeness = torch.randn(7, num_tokens, 3, generator=torch.Generator().manual_seed(num_tokens))
    for image, margin in zip(likeness, choice_margins(likeness, num_prefix, num_merged).tolist(), strict=True):
        patches = image[num_prefix:]
        ties = [sorted((float(torch.cosine_similarity(a, b, dim=0)) for b in patches[1::2]), reverse=True)
                for a in patches[::2]]  # fmt: skip
        ties.sort(reverse=True)
        leads = [tie[0] - tie[1] for tie in ties[:num_merged] if len(tie) > 1]
        to_next = [ties[num_merged - 1][0] - ties[num_merged][0]] if num_merged < len(ties) else []
        assert margin == pytest.approx(min(leads + to_next, default=float("inf")), abs=1e-6)


@pytest.mark.parametrize("name", ["merge before reuse", "merge mixture by values", "exact"])
def test_images_of_equal_patches_are_undecided_where_tokens_merge(name):
    model, x = CASES[name].build(), images(num_images=3)
    with torch.no_grad():
        model.pos_embed.zero_()
    x[1] = 0.5
    assert are_decided(model, x).tolist() == [True, name == "exact", True]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_merges_does_not_run_alone():
    block = Case("exact-2 exact").build().blocks[0]
    with pytest.raises(ValueError, match=r"^'exact-2' merges tokens, whose sizes the next layer needs: call the whole"):
        block(torch.zeros(1, 16, 15, dtype=torch.float64))


@pytest.mark.parametrize("kind", [SwiGLU, GluMlp])
def test_hidden_units_of_an_mlp_that_is_gated_are_refused_and_all_other_words_run(kind):
    with pytest.raises(ValueError, match=rf"'exact/0' sets the hidden units of a layer.*{kind.__name__} may"):
        Case("exact/0 exact").build(mlp_layer=kind)
    model = Case("exact-2 linear exact skip none").build(mlp_layer=kind)
    assert model(images()).isfinite().all()


def test_places_are_kept_only_where_all_tokens_are_asked_for(monkeypatch):
    model, gathered = Case("exact-2 exact-3 exact").build(), []
    monkeypatch.setattr(merging_file, "unmerge", lambda x, places: gathered.append(places) or unmerge(x, places))
    outputs = []
    for block in model.blocks[:2]:
        block.merge.register_forward_hook(lambda module, args, output: outputs.append(output[2]))
    model(images())
    assert outputs == [None, None] and not gathered
    tokens = model.forward_features(images())
    assert tokens.shape[1] == 16 and len(gathered) == 1  # at the end
    assert [places.shape[1] for places in outputs[2:]] == [16, 16]


def test_a_plan_may_fit_the_images_that_it_is_measured_on_alone():
    name, plan = "vit_tiny_patch16_224", "exact-20*12"
    (target,) = resolve_targets([name], [plan], [272])
    assert str(target.model.plan) == plan
    for sizes in ([None], [272, 224]):
        with pytest.raises(ValueError, match=r"layer 8 is 'exact-20', but 36 patch tokens are left there, of which"):
            resolve_targets([name], [plan], sizes)


def test_a_preset_that_merges_nothing_says_so():
    with pytest.warns(UserWarning, match="vit_merge_tiny_patch16_224 merges nothing: its images have fewer than two"):
        small = timm.create_model("vit_merge_tiny_patch16_224", img_size=64)
    assert str(small.plan) == "exact*12"
