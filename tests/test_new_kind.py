"""A kind of layer that is added as the README says: a class, its entry in the table, its word. All else finds it."""

import pytest
import timm
import torch
from cases import Case, Itself, images
from torch.nn import functional as F

import vitreuse
from vitreuse import convert, count_macs, load_checkpoint, measure_damage, measure_redundancy
from vitreuse.attention import ATTENTION, ExactAttention
from vitreuse.cli.plan import _explained
from vitreuse.compress.damage import Change
from vitreuse.cost.counters import fvcore_macs, torch_flops
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import WORDS, Spec


class CosineAttention(ExactAttention):
    """Softmax attention by the cosines of queries and keys."""

    def project(self, *inputs):
        q, k, *rest = super().project(*inputs)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), *rest


@pytest.fixture(autouse=True)
def cosine(monkeypatch):
    monkeypatch.setitem(ATTENTION, "cosine", CosineAttention)
    monkeypatch.setattr("vitreuse.plan.language.WORDS", (*WORDS, "cosine"))


@pytest.mark.parametrize("backend", ["map", "qk"])
def test_it_is_built_counted_and_held_to_itself(backend):
    case = Case("cosine reuse:2 exact cosine reuse")
    model, x = case.build(reuse_backend=backend).eval(), images()
    assert type(model.blocks[0].attn) is type(model.blocks[3].attn) is CosineAttention
    macs = sum(count_macs(model).values())
    assert macs == fvcore_macs(model, x)[""] and 2 * macs == torch_flops(model, x)[""]
    reference = case.reference(model)
    assert isinstance(reference, Itself)
    torch.testing.assert_close(model(x)[1], reference.logits(x[1]), rtol=1e-9, atol=1e-10)


def test_it_takes_a_plain_checkpoint_and_computes_what_it_says():
    plain, model = Case("exact*2").build(1).eval(), Case("cosine exact").build(2).eval()
    assert load_checkpoint(model, plain.state_dict()).dropped == ()
    attn, x = model.blocks[0].attn, torch.randn(2, 16, 15, dtype=torch.float64)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 5, 3)).permute(2, 0, 3, 1, 4)
    weights = (F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1) * attn.scale).softmax(-1)
    torch.testing.assert_close(attn(x), attn.proj((weights @ v).transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(images()), plain(images()))


def test_it_is_measured_by_running_it_and_converted_into():
    model, batches = Case("exact*2").build(num_heads=5, dtype=torch.float32).eval(), [(images(dtype=torch.float32),)]
    progress = WorkProgress("damage", "images", 2, enabled=False)
    redundancy = measure_redundancy(model, batches, progress)
    damage = measure_damage(model, batches, [Spec("cosine"), Spec("reuse")], redundancy, progress)
    assert damage[Change(0, Spec("cosine"))] > 0 and damage[Change(1, Spec("cosine"))] > 0
    by_anchor = {change.anchor_spec: amount for change, amount in damage.items() if change.anchor == 0}
    assert by_anchor.keys() == {Spec("exact"), Spec("cosine")} and len({*by_anchor.values()}) == 2
    converted = convert(model, "cosine reuse").model
    assert str(converted.plan) == "cosine reuse" and type(converted.blocks[0].attn) is CosineAttention


def test_a_search_tries_it_in_every_layer(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=12, depth=3, num_heads=2, num_classes=5
    )
    options = vitreuse.SearchOptions(trials=tmp_path / "trials.jsonl")
    words = "exact,cosine,none,reuse"
    assert vitreuse.search(model.eval(), torch.randn(12, 3, 8, 8), 0.9, minutes=0, words=words, options=options).plan
    tried = (tmp_path / "trials.jsonl").read_text()
    assert all(f'"{plan}"' in tried for plan in ("cosine exact*2", "exact cosine exact", "exact*2 cosine"))


def test_help_explains_it_as_its_class_does():
    assert _explained("cosine", ATTENTION["cosine"]) == "  cosine    " + str(CosineAttention.__doc__)
