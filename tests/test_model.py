"""Models with a plan under everything that is done to a model: capture, other image sizes, intermediates, counting."""

import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
from cases import CASES, SMALL_CASES, Case, image_size, images, randomized, with_backends
from reference import bilinear
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitreuse import count_macs
from vitreuse.attention import EMPTY_CARRY, Carry
from vitreuse.cost.counters import fvcore_macs, torch_flops

OTHER_GRIDS = {(3, 5): (5, 7), (13, 17): (17, 13), (14, 14): (13, 17), (17, 19): (14, 14), (2, 29): (3, 31)}
REPRESENTATIVE = [
    ("mixture", "qk"),
    ("span tiled reused", "map"),
    ("lowrank layerwise linear reused", "map"),
    ("lowrank none conv reused", "qk"),
    ("extras", "qk"),
    ("distilled", "map"),
    ("merge by values of some heads", "map"),
    ("merge before reuse", "qk"),
    ("merge mixture by values", "map"),
    ("merge tiled", "qk"),
    ("merge distilled", "qk"),
    ("merge extras", "map"),
]

every_case = pytest.mark.parametrize(("name", "backend"), with_backends(CASES))
every_small_case = pytest.mark.parametrize(("name", "backend"), with_backends(SMALL_CASES))


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def gradients(model: nn.Module, logits: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a number that every logit moves."""
    return torch.autograd.grad(logits.sin().sum(), list(model.parameters()))


@pytest.mark.proof
@pytest.mark.parametrize(("name", "backend"), [*REPRESENTATIVE[:3], *REPRESENTATIVE[7:9]])
def test_compiled_in_one_graph_outputs_and_gradients_stay(name, backend):
    torch._dynamo.reset()
    model, x = CASES[name].build(reuse_backend=backend), images(CASES[name].grid)
    logits = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(compiled, logits)
    for actual, wanted in zip(gradients(model, compiled), gradients(model, logits), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["average", pytest.param("merge mixture by values", marks=pytest.mark.proof)])
def test_compiled_to_kernels_outputs_stay(name):
    torch._dynamo.reset()
    model = CASES[name].build().eval()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(images()), model(images()))


@pytest.mark.parametrize("plan", ["exact reuse exact", "exact-5 linear exact reuse-3/7 exact skip"])
def test_compiled_for_several_image_sizes_outputs_stay(plan):
    """From the second size on the number of keys is open, and no rule may fix it."""
    torch._dynamo.reset()
    model = Case(plan).build(dynamic_img_size=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for grid in ((3, 5), (5, 7), (7, 11)):
            assert_close(compiled(images(grid)), model(images(grid)))


EXPORTED = [
    *((name, backend) for name, _ in REPRESENTATIVE[:5] for backend in ("auto", "qk")),
    *((name, "auto") for name, _ in REPRESENTATIVE[-2:]),
    *((name, "auto") for name in ("merge average", "merge average without class")),  # which return all tokens
    *(pytest.param(name, "qk", marks=pytest.mark.proof) for name, _ in REPRESENTATIVE[-2:]),
]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.proof)])
@pytest.mark.parametrize(("name", "backend"), EXPORTED)
def test_an_export_runs_at_any_batch_size(name, backend, strict):
    """A named dimension is refused by torch if anything was decided by the size that it has while exporting."""
    model, x = CASES[name].build(reuse_backend=backend).eval(), images(CASES[name].grid, num_images=3)
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=batch, strict=strict).module()
    assert_close(exported(x), model(x))


@pytest.mark.parametrize(("name", "backend"), EXPORTED)
def test_a_recorded_trace_runs_at_any_batch_size(name, backend):
    model, x = CASES[name].build(reuse_backend=backend).eval(), images(CASES[name].grid, num_images=3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm compares the image's size with the patch embedding's
        assert_close(torch.jit.trace(model, (x[:2],))(x), model(x))


@pytest.mark.proof
@pytest.mark.parametrize("options", [
    {"dynamo": True, "dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}},
    {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}},
], ids=["export", "trace"])
@pytest.mark.parametrize("name", ["mixture", "lazy", "lowrank layerwise linear reused", "linear and skip"])
def test_torchs_own_onnx_file_runs_at_any_batch_size(name, options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = CASES[name].build().float().eval(), images(num_images=3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x[:2],), tmp_path / "model.onnx", input_names=["x"], output_names=["y"], **options)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", ["exact none span:3", "lowrank:3*2", "none*2"])
def test_layers_that_need_no_other_run_as_timms_do(plan):
    model, x = Case(plan).build(), images()
    tokens, _ = model.embed(x)
    one_by_one = tokens
    for block in model.blocks:
        one_by_one = block(one_by_one)
    assert torch.equal(model.norm(one_by_one), model.forward_features(x))
    assert torch.equal(nn.Sequential(*model.blocks)(tokens), one_by_one)
    assert torch.equal(model.blocks[0].attn(tokens), model.blocks[0].attn(tokens, EMPTY_CARRY)[0])


@pytest.mark.parametrize(("plan", "options"), [("exact reuse", {}), ("lowrank:3*2", {"lowrank_sharing": "layerwise"})])
def test_layers_that_need_another_say_what_to_call(plan, options):
    model = Case(plan).build(**options)
    tokens, _ = model.embed(images())
    with pytest.raises(ValueError, match=r"was run without .*: call the whole model"):
        nn.Sequential(*model.blocks)(tokens)


def test_a_mask_reaches_a_layer_called_as_timms_is():
    block, tokens = Case("exact").build().blocks[0], torch.randn(2, 16, 15, dtype=torch.float64)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    assert_close(block(tokens, attn_mask=mask), block(tokens, is_causal=True))
    with pytest.raises(ValueError, match="carry is a Tensor and must be a Carry or None: give attn_mask by name"):
        block(tokens, mask)


@pytest.mark.parametrize(("name", "backend"), [*REPRESENTATIVE, ("exact", "auto"), ("span dense", "auto")])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_vmapped_model_agrees_in_inference(name, backend):
    model, x = CASES[name].build(reuse_backend=backend).eval(), images(CASES[name].grid)
    with torch.no_grad():
        assert_close(torch.func.vmap(lambda image: model(image[None])[0])(x), model(x))


@pytest.mark.parametrize(("name", "backend"), with_backends(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.proof)])
def test_all_of_a_model_on_a_gpu_stays_there(name, backend, dtype, monkeypatch):
    """In shapes, types and devices alone, as no GPU is needed for."""
    monkeypatch.setattr("vitreuse.attention.policy.memory_bytes", lambda device_type: 2**34)
    case, fake = CASES[name], {"dtype": dtype, "device": "cuda"}
    model = case.build(reuse_backend=backend).eval()
    with FakeTensorMode():
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, **fake), requires_grad=False)
        for batch_size in (1, 3):
            x = torch.empty(batch_size, 3, *image_size(case.grid), **fake)
            for y, shape in ((model(x), (7,)), (model.forward_features(x), (tokens_of(model), 15))):
                assert (y.device.type, y.dtype, y.shape) == ("cuda", dtype, (batch_size, *shape))


def tokens_of(model: Any) -> int:
    return model.num_prefix_tokens + model.patch_embed.num_patches


@pytest.mark.parametrize(("name", "backend"), REPRESENTATIVE)
def test_gradients_of_each_image_are_those_of_it_alone(name, backend):
    model, x = CASES[name].build(reuse_backend=backend).eval(), images(CASES[name].grid)
    parameters = dict(model.named_parameters())

    def logit(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without a rule for vmap
        found = torch.func.vmap(torch.func.grad(logit), (None, 0))(parameters, x)
    for number, image in enumerate(x):
        wanted = gradients(model, model(image[None]))
        for actual, gradient in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(actual[number], gradient, rtol=1e-7, atol=1e-9)


@every_small_case
def test_no_image_is_a_batch_too_and_a_model_can_be_pickled(name, backend):
    model, x = CASES[name].build(reuse_backend=backend), images()
    assert model(x[:0]).shape == (0, 7) and model.forward_features(x[:0]).shape == (0, tokens_of(model), 15)
    assert all(not gradient.any() for gradient in gradients(model, model(x[:0])))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(("name", "backend"), REPRESENTATIVE)
def test_timm_extracts_features_by_symbolic_trace(name, backend):
    model, x = CASES[name].build(reuse_backend=backend).eval(), images(CASES[name].grid)
    taken = {}
    model.blocks[1].norm2.register_forward_hook(lambda module, args, output: taken.update(wanted=output))
    traced = create_feature_extractor(model, {"blocks.1.norm2": "norm2", "head": "head"})(x)
    head = model.head(model.forward_features(x)[:, 0])
    assert_close(traced["norm2"], taken["wanted"])
    assert_close(traced["head"], head)


@pytest.mark.parametrize(("name", "backend"), REPRESENTATIVE)
def test_a_dynamic_model_is_traced_too(name, backend):
    model = CASES[name].build(reuse_backend=backend, dynamic_img_size=True).eval()
    x = images(OTHER_GRIDS[CASES[name].grid])
    head = create_feature_extractor(model, {"head": "head"})(x)["head"]
    assert_close(head, model.head(model.forward_features(x)[:, 0]))


@every_case
def test_a_dynamic_model_at_its_own_size_is_the_static_one(name, backend):
    case, x = CASES[name], images(CASES[name].grid)
    static, dynamic = (case.build(reuse_backend=backend, dynamic_img_size=d) for d in (False, True))
    assert_close(dynamic(x), static(x))


@every_case
def test_another_size_is_dynamic_or_set_and_that_of_the_reference(name, backend):
    """Position embeddings and token projections are resampled alike, and spans cut anew."""
    case, grid = CASES[name], OTHER_GRIDS[CASES[name].grid]
    x = images(grid, num_images=1)
    dynamic, model = (case.build(reuse_backend=backend, dynamic_img_size=d) for d in (True, False))
    model.set_input_size(image_size(grid))
    logits = model(x)
    assert_close(dynamic(x), logits)
    if case.grid == (3, 5):
        assert_close(logits[0], case.reference(model, grid).logits(x[0]))
    assert all(g is not None for g in gradients(model, logits))


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
@pytest.mark.parametrize("num_registers", [0, 2])
def test_a_larger_grid_enlarges_projections_bilinearly_and_keeps_prefix_columns(sharing, num_registers):
    model = Case("lowrank:3*2", keywords={"lowrank_sharing": sharing}).build(reg_tokens=num_registers)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("_proj")}
    model.set_input_size(image_size((5, 7)))
    after = dict(model.named_parameters())
    assert before
    for name, old in before.items():
        rows, new_rows = old.flatten(0, -2), after[name].detach().flatten(0, -2)
        prefix = 1 + num_registers
        for row, new_row in zip(rows, new_rows, strict=True):
            assert torch.equal(new_row[:prefix], row[:prefix])
            enlarged = bilinear(row[prefix:].view(3, 5), (5, 7)) * (3 * 5) / (5 * 7)
            assert_close(new_row[prefix:], enlarged.flatten())


@pytest.mark.parametrize("sharing", ["none", "layerwise"])
@pytest.mark.parametrize("projection", ["linear", "conv"])
def test_another_size_in_bfloat16_is_close(sharing, projection):
    keywords = {"lowrank_sharing": sharing, "lowrank_projection": projection, "dynamic_img_size": True}
    model, x = Case("lowrank:3 reuse:2", keywords=keywords).build(), images((5, 7))
    logits = model(x)
    narrow = model.bfloat16()
    assert (narrow(x.bfloat16()) - logits).norm() < 0.05 * logits.norm()
    narrow.set_input_size(image_size((5, 7)))
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert (narrow(x.bfloat16()) - logits).norm() < 0.05 * logits.norm()


@every_small_case
def test_a_model_made_without_memory_can_be_initialised(name, backend):
    """A second initialisation leaves no parameter as it found it."""
    model = CASES[name].build(reuse_backend=backend).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    left = [key for key, parameter in model.named_parameters() if parameter.isnan().any()]
    assert all(key.endswith("gamma") for key in left), left


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco", "skip"])
@pytest.mark.parametrize("fix_init", [False, True])
def test_a_linear_layer_does_nothing_after_every_initialisation(weight_init, fix_init):
    model = Case("linear exact-3/0 none/5 skip exact reuse/0 linear").fresh(weight_init=weight_init, fix_init=fix_init)
    for initialise in (lambda: None, model.init_weights, lambda: model.init_weights("jax")):
        initialise()
        assert not any(p.any() for key, p in model.named_parameters() if ".linear." in key)
        randomized(model)


@pytest.mark.parametrize("plan", ["exact", "exact-3/0", "none/5", "skip linear none exact/5 reuse"])
def test_what_layers_write_is_scaled_by_their_depth_as_timm_does(plan):
    plain, scaled = (Case(plan).fresh(fix_init=fix) for fix in (False, True))
    torch.manual_seed(0)
    plain.init_weights()
    torch.manual_seed(0)
    scaled.init_weights()
    wanted = dict(plain.named_parameters())
    for key, parameter in scaled.named_parameters():
        is_writer = key.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        scale = (2 * (int(key.split(".")[1]) + 1)) ** 0.5 if is_writer else 1
        assert_close(parameter * scale, wanted[key])


@pytest.mark.parametrize("projection", ["linear", "conv"])
@pytest.mark.parametrize("grid", [(5, 7), (2, 3), (7, 2)])
def test_row_sums_of_pooling_projections_outlive_a_new_grid(projection, grid):
    model = Case("lowrank:3", keywords={"lowrank_projection": projection}).build(class_token=False, global_pool="avg")
    with torch.no_grad():
        model.blocks[0].attn.key_proj.fill_(0.25)
    before = model.blocks[0].attn.key_proj.sum(-1)
    model.set_input_size(image_size(grid))
    assert_close(model.blocks[0].attn.key_proj.sum(-1), before)


@every_small_case
def test_setting_the_size_it_has_changes_no_parameter(name, backend):
    model = CASES[name].build(reuse_backend=backend)
    before = dict(model.named_parameters())
    model.set_input_size(image_size((3, 5)))
    assert all(parameter is before[key] for key, parameter in model.named_parameters())


def test_a_smaller_patch_makes_a_larger_grid():
    model = Case("lowrank:3 reuse:2 span:3").build()
    model.set_input_size(img_size=(6, 15), patch_size=(1, 3))
    assert model.patch_embed.grid_size == (6, 5)
    assert model.blocks[0].attn.key_proj.shape == (3, 31)
    reference = Case("lowrank:3 reuse:2 span:3").reference(model, (6, 5))
    reference = type(reference)(**{**reference.__dict__, "patch_size": (1, 3)})
    x = images()
    assert_close(model(x)[0], reference.logits(x[0]))


def all_tokens(x: Tensor, carry: Carry) -> Tensor:
    """A layer's tokens, one for each of the first layer's: of a merged one, what it is part of."""
    if carry.places is None:
        return x
    return torch.stack([tokens[places] for tokens, places in zip(x, carry.places, strict=True)])


@every_small_case
def test_intermediates_are_the_layers_outputs(name, backend):
    model, x = CASES[name].build(reuse_backend=backend), images()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(all_tokens(*output)))
    final = model.forward_features(x)
    wanted, prefix = list(outputs), model.num_prefix_tokens
    features, intermediates = model.forward_intermediates(x)
    assert_close(features, final)
    assert len(intermediates) == len(wanted)
    for actual, tokens in zip(intermediates, wanted, strict=True):
        assert_close(actual, tokens[:, prefix:].mT.unflatten(2, (3, 5)))
    (last,) = model.forward_intermediates(x, [0], norm=True, output_fmt="NLC", stop_early=True, intermediates_only=True)
    assert_close(last, model.norm(wanted[0])[:, prefix:])


@every_small_case
def test_layers_run_in_pieces_give_the_carry_to_each_other(name, backend):
    model, x = CASES[name].build(reuse_backend=backend), images()
    tokens, _ = model.embed(x)
    carry = Carry(layerwise_proj=model.key_proj)
    for block in model.blocks:
        tokens, carry = block(tokens, carry)
    assert_close(model.norm(all_tokens(tokens, carry)), model.forward_features(x))


@every_case
def test_macs_are_those_that_run(name, backend):
    case = CASES[name]
    model, x = case.build(reuse_backend=backend).eval(), images(case.grid, num_images=3)
    parts = count_macs(model)
    assert 2 * sum(parts.values()) == torch_flops(model, x)[""]
    if (name, backend) in REPRESENTATIVE:
        assert sum(parts.values()) == fvcore_macs(model, x)[""]
    assert sum(parts.values()) * len(x) == products_by_plain_fvcore(model, x)


def products_by_plain_fvcore(model: nn.Module, x: Tensor) -> int:
    """As everybody counts, with fvcore's own rules; it counts norms and pooling beside the products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        counts = FlopCountAnalysis(model, x).by_operator()
    return sum(counts[name] for name in ("conv", "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum"))


@every_small_case
def test_macs_at_another_size_are_those_of_a_model_built_for_it(name, backend):
    case = CASES[name]
    wanted = count_macs(Case(case.plan, (5, 7), case.distilled, case.keywords).build(reuse_backend=backend))
    assert count_macs(case.build(reuse_backend=backend), image_size((5, 7))) == wanted


N, C, HIDDEN = 16, 15, 30  # tokens, channels, channels of the MLP
QKV, PROJ, MLP = 3 * N * C * C, N * C * C, 2 * N * C * HIDDEN
STEM, HEAD = 15 * (3 * 6) * C, 7 * C
PAIRS = (2 + 3 + 2) * (2 + 3 + 3 + 3 + 2)  # of 3 x 3 windows on 3 x 5 patches
HAND_COUNTS = {
    "exact": ("exact", {}, QKV + 2 * N * N * C + PROJ + MLP),
    "all heads": (
        "exact reuse",
        {"reuse_backend": "map"},
        QKV + 2 * N * N * C + PROJ + MLP + N * C * C + N * N * C + PROJ + MLP,
    ),
    "lowrank, tokens first": (
        "lowrank:3",
        {},
        (N + 2 * 3) * C * C + 3 * N * C + 2 * N * 3 * C + PROJ + MLP,
    ),
    "lowrank, keys and values": (
        "lowrank:3",
        {"lowrank_sharing": "none"},
        QKV + 2 * 3 * N * C + 2 * N * 3 * C + PROJ + MLP,
    ),
    "lowrank, pooled": ("lowrank:3", {"lowrank_projection": "mean"}, (N + 2 * 3) * C * C + 2 * N * 3 * C + PROJ + MLP),
    "span": ("span:3", {}, QKV + 2 * (N + 15 + PAIRS) * C + PROJ + MLP),
    "none": ("none", {}, MLP),
    "part of the heads": (
        "exact reuse:2",
        {"reuse_backend": "map"},
        QKV + 2 * N * N * C + PROJ + MLP + 2 * N * C * 9 + N * C * C + N * N * 9 + N * N * C + PROJ + MLP,
    ),
}


@pytest.mark.parametrize(("plan", "options", "macs"), HAND_COUNTS.values(), ids=HAND_COUNTS)
def test_theoretical_macs_are_those_counted_by_hand(plan, options, macs):
    model = Case(plan).build(global_pool="avg", **options)
    assert sum(count_macs(model, theoretical=True).values()) == STEM + macs + HEAD


def test_the_last_layer_counts_one_query():
    parts = count_macs(Case("exact*2").build())
    assert parts["blocks.1.attn.qkv"] == C * C + 2 * N * C * C
    assert parts["blocks.1.attn.logits"] == parts["blocks.1.attn.values"] == N * C
    assert parts["blocks.1.attn.proj"] == C * C
    assert parts["blocks.1.mlp.fc1"] == parts["blocks.1.mlp.fc2"] == C * HIDDEN


def test_recomputed_maps_are_counted_only_where_they_run():
    model = Case("exact reuse").build(reuse_backend="qk", global_pool="avg")
    assert count_macs(model)["blocks.1.attn.logits"] == N * N * C
    assert count_macs(model, theoretical=True).get("blocks.1.attn.logits", 0) == 0


@pytest.mark.parametrize("sharing", ["key_value", "layerwise"])
def test_a_pruned_model_has_the_plan_of_its_layers(sharing):
    model = Case("exact reuse*2 lowrank:5 none").build(lowrank_sharing=sharing)
    model.prune_intermediate_layers([1])
    assert str(model.plan) == "exact reuse"
    model.set_input_size(img_size=image_size((4, 6)))
    assert model(images((4, 6))).isfinite().all()


def test_the_last_layer_left_by_pruning_hands_nothing_on():
    model = Case("exact reuse exact reuse*2").build()
    model.prune_intermediate_layers([2])
    tokens, _ = model.embed(images())
    tokens, carry = model.blocks[1](*model.blocks[0](tokens, EMPTY_CARRY))
    assert carry == EMPTY_CARRY
    assert model.blocks[2](tokens, carry)[1] == EMPTY_CARRY


def test_a_pruned_model_knows_what_its_layers_merge():
    model = Case("exact-3 skip exact reuse-2 exact-1 exact").build()
    model.prune_intermediate_layers([4])
    assert [block.attn.merges for block in model.blocks] == [(), (3,), (3,), (3,), (3, 2)]
    model.prune_intermediate_layers([0])
    assert str(model.plan) == "exact-3"
    assert model(images()).shape == (2, 16, 15) and model.blocks(model.embed(images())[0], num_queries=1).shape[1] == 1


CUT = (
    "layer 0 of plan 'exact-5 exact-3 exact' merges 5 tokens and images of this size leave it {left}: half of them "
    "merge there, and as many as can in later layers."
)
SMALLER = {
    "dynamic": lambda model, x: model(x),
    "all tokens": lambda model, x: model.forward_features(x),
    "intermediates": lambda model, x: model.forward_intermediates(x)[0],
    "set": lambda model, x: [model.set_input_size(x.shape[-2:]), model(x)][1],
}


@pytest.mark.parametrize("how", SMALLER)
@pytest.mark.parametrize("grid", [(2, 3), (1, 2), (1, 1)])
def test_smaller_images_merge_half_and_are_warned_of_once(how, grid):
    case, x = Case("exact-5 exact-3 exact"), images(grid)
    model = case.build(dynamic_img_size=how != "set")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # to Python's own filter, once a place
        for run in (SMALLER[how], SMALLER[how], *SMALLER.values()) if how != "set" else (SMALLER[how],) * 2:
            run(model, x)
    assert [str(warning.message) for warning in caught] == [CUT.format(left=grid[0] * grid[1])]
    cut = Case({(2, 3): "exact-3 exact-1 exact", (1, 2): "exact-1 exact*2", (1, 1): "exact*3"}[grid], grid).build()
    state = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    cut.load_state_dict({**state, "pos_embed": cut.pos_embed})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_input_size(image_size(grid))
        cut.pos_embed = model.pos_embed
        assert_close(model(x), cut(x))
        assert sum(count_macs(model).values()) == sum(count_macs(cut).values())


@pytest.mark.parametrize("plan", ["exact-3 exact-2 exact", "exact-7 exact-4 exact-2"])
def test_what_is_left_of_dropped_patches_merges(plan):
    model = Case(plan).build(patch_drop_rate=0.5).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model.forward_features(images()).shape == (2, 1 + 7, 15)
        assert all(gradient is not None for gradient in gradients(model, model(images())))


def test_features_of_timm_have_all_tokens_in_their_places():
    keywords = {"img_size": 64, "depth": 3, "plan": "exact-5 exact-2 exact", "out_indices": (0, 1, 2)}
    features = timm.create_model("vit_merge_tiny_patch16_224", features_only=True, **keywords).eval()
    x = torch.randn(2, 3, 64, 64)
    wanted = features.model.forward_intermediates(x, intermediates_only=True)
    for actual, tokens, num_left in zip(features(x), wanted, (11, 9, 9), strict=True):
        assert torch.equal(actual, tokens) and actual.shape == (2, 192, 4, 4)
        assert len(actual[0].flatten(1).T.unique(dim=0)) == num_left


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "map", "token"])
def test_every_pooling_reads_all_tokens_in_their_places(global_pool):
    model = Case("exact-3 exact reuse/7 linear exact-2 exact").build(global_pool=global_pool)
    assert_close(model(images()), model.forward_head(model.forward_features(images())))
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)


def test_padded_images_merge():
    model, x = Case("exact-3 exact-2 exact").build(dynamic_img_size=True, dynamic_img_pad=True), images((3, 5))
    assert_close(model(x[..., :-1, :-2]), model(nn.functional.pad(x[..., :-1, :-2], (0, 2, 0, 1))))


def test_layers_of_one_projection_run_alone_when_they_are_given_it():
    model = Case("lowrank:3*2").build(lowrank_sharing="layerwise")
    tokens, _ = model.embed(images())
    with pytest.raises(ValueError, match=r"or model.blocks\(x, layerwise_proj=model.key_proj\)"):
        model.blocks(tokens)
    assert_close(model.norm(model.blocks(tokens, layerwise_proj=model.key_proj)), model.forward_features(images()))


def test_an_exact_plan_rounds_as_timm_does_without_prefix_tokens():
    """A copy on the way would lay tokens out differently, and so train to other weights."""
    keywords = {"img_size": 64, "global_pool": "avg", "class_token": False}
    x = torch.randn(2, 3, 64, 64)
    ours, plain = (
        timm.create_model(name, **keywords, **plan).eval()
        for name, plan in (("vit_reuse_tiny_patch16_224", {"plan": "exact*12"}), ("vit_tiny_patch16_224", {}))
    )
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(x), plain(x))
