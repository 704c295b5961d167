"""Modules are called: what others do to a Linear, a norm or a dropout has the effect that it has on timm's models."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, images, with_backends
from timm.layers import DropPath, LayerScale
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from vitreuse.attention.submodules import is_plain_linear
from vitreuse.compress.recording import attention_maps

every_case = pytest.mark.parametrize(("name", "backend"), with_backends(CASES))
UNFUSED = {"cpu float32 inference": [(1, 9.0, 1.0, 1.0, 1.0)], "cpu float32 train": [(1, 9.0, 1.0, 1.0, 1.0)]}


def build(name: str, backend: str, **more) -> Any:
    return CASES[name].build(reuse_backend=backend, **more)


def close(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, rtol=1e-9, atol=1e-10)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


class Adapter(nn.Module):
    """A low-rank adapter beside a linear layer, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 5)

    @property
    def weight(self) -> Tensor:  # as peft's layers show the base's
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.b @ self.a
        return self.base


def replaced(model: nn.Module, kind: type[nn.Module], replacement: Any) -> nn.Module:
    """The model with each module of a kind replaced."""
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is kind:
                setattr(parent, name, replacement(child))
    return model


@every_case
def test_adapters_act_get_gradients_and_merge(name, backend):
    model, x = build(name, backend).eval().requires_grad_(False), images(CASES[name].grid)
    before = model(x)
    replaced(model, nn.Linear, Adapter)
    adapted = model(x)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    gradients = torch.autograd.grad(adapted.sin().sum(), [p for adapter in adapters for p in (adapter.a, adapter.b)])
    assert all(gradient.abs().max() > 1e-9 for gradient in gradients)
    assert not torch.allclose(adapted, before, rtol=1e-2)
    with torch.inference_mode():
        assert close(model(x), adapted)
        assert close(replaced(model, Adapter, Adapter.merged)(x), adapted)


@every_case
def test_hooks_of_every_module_see_what_the_module_makes(name, backend):
    model, x = build(name, backend, drop_path_rate=0.1, proj_drop_rate=0.1).eval(), images(CASES[name].grid)
    before, seen = model(x), {}
    kinds = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU, nn.Conv2d, DropPath, LayerScale)
    watched = {key: module for key, module in model.named_modules() if isinstance(module, kinds)}
    twins = copy.deepcopy(watched)

    def look(key, inputs, output):
        seen.setdefault(key, []).append(torch.equal(twins[key](*inputs), output))

    for key, module in watched.items():
        module.register_forward_hook(lambda module, inputs, output, key=key: look(key, inputs, output))
    with torch.inference_mode():
        assert close(model(x), before)
    assert seen.keys() == watched.keys() and all(map(all, seen.values()))
    assert all(len(seen[key]) == 1 for key in linears(model))


@every_case
def test_a_hook_that_changes_an_output_changes_the_logits_as_on_a_linear_layer(name, backend):
    """Every linear layer doubled by a hook is every weight and bias doubled."""
    model, x = build(name, backend).eval(), images(CASES[name].grid)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for linear in linears(doubled).values():
            for parameter in linear.parameters():
                parameter *= 2
    for linear in linears(model).values():
        linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.inference_mode():
        assert close(model(x), doubled(x))


@every_case
def test_pruned_layers_train_and_stay_pruned(name, backend):
    model, x = build(name, backend).train(), images(CASES[name].grid)
    for linear in linears(model).values():
        prune.l1_unstructured(linear, "weight", amount=0.3)
        prune.random_unstructured(linear, "weight", amount=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        optimizer.step()
    trained = model(x)
    for linear in linears(model).values():
        assert linear.weight_orig.grad.abs().max() > 0
        prune.remove(linear, "weight")
    assert all((linear.weight == 0).double().mean() > 0.3 for linear in linears(model).values())
    assert close(model(x), trained)


@every_case
def test_reparametrised_layers_are_what_their_weights_are(name, backend):
    model, x = build(name, backend), images(CASES[name].grid)
    before = model(x)
    for linear in linears(model).values():
        parametrizations.weight_norm(linear)
    logits = model(x)
    assert close(logits, before)
    assert all(g is not None for g in torch.autograd.grad(logits.sin().sum(), [*model.parameters()], allow_unused=True))


@every_case
@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization is|quantized tensor creation functions):UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantised_layers_are_used(name, backend):
    model, x = build(name, backend).float().eval(), images(CASES[name].grid, dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    errors = {}

    def compare(key, module, inputs, output):
        wanted = model.get_submodule(key)(*inputs)
        errors[key] = (output - wanted).norm() / wanted.norm()

    for key in linears(model):
        quantised.get_submodule(key).register_forward_hook(partial(compare, key))
    with torch.no_grad():
        assert not torch.equal(quantised(x), model(x))
    assert errors.keys() == linears(model).keys() and max(errors.values()) < 0.05


@every_case
@pytest.mark.parametrize("way", ["fused", "unfused", "training"])
def test_each_parameter_can_be_trained_alone(name, backend, way):
    model, x = build(name, backend).train(way == "training"), images(CASES[name].grid)
    if way == "unfused":
        for block in model.blocks:
            block.attn.costs = UNFUSED
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(model(x).sin().sum(), [*parameters.values()])
    model.requires_grad_(False)
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        parameter.requires_grad_(True)
        (alone,) = torch.autograd.grad(model(x).sin().sum(), [parameter])
        torch.testing.assert_close(alone, gradient, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
        parameter.requires_grad_(False)


def test_layers_that_somebody_changed_are_not_plain():
    assert is_plain_linear(nn.Linear(3, 5)) and is_plain_linear(nn.Linear(3, 5, bias=False))
    hooked, own, backward = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    backward.register_full_backward_hook(lambda module, inputs, outputs: None)
    own.forward = lambda x: x  # as accelerate replaces it
    changed = [hooked, own, backward, prune.identity(nn.Linear(3, 5), "weight")]
    changed += [parametrizations.weight_norm(nn.Linear(3, 5)), Adapter(nn.Linear(3, 5)), nn.Identity()]
    assert not any(map(is_plain_linear, changed))


@pytest.mark.parametrize(
    ("name", "backend"), with_backends({name: case for name, case in CASES.items() if "span" not in case.plan})
)
def test_timms_extraction_of_attention_shows_the_maps(name, backend):
    """With fused kernels too, which timm's own models need switched off for it; a window's map comes in tiles."""
    model, x = build(name, backend).eval(), images(CASES[name].grid)
    wanted = [made.weights for made in attention_maps(model, x) if made is not None]
    found = AttentionExtract(model, method="hook")(x)
    num_rows = model.num_class_rows if model.reads_class_rows else None
    wanted[-1] = wanted[-1][:, :, :num_rows] if model.blocks[-1].has_attention else wanted[-1]
    assert len(found) == len(wanted)
    for actual, weights in zip(found.values(), wanted, strict=True):
        assert close(actual, weights)
