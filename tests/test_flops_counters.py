"""The two counters against counts made by hand: B, N, M, ... are small primes, so no product is right by accident."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.cost.counters import fvcore_macs, norm_operations, torch_flops, training_flops


class Calls(nn.Module):
    """A function of an input and a weight as a module."""

    def __init__(self, function, *weight_shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.fixture(autouse=True)
def attention_switch():
    """Puts timm's choice of fused or unfused attention back after a test."""
    before = use_fused_attn()
    yield
    set_fused_attn(before)


@pytest.mark.parametrize(
    ("size", "gmacs", "fused"),
    [("tiny", 1.254, True), ("tiny", 1.254, False), ("small", 4.599, False), ("base", 17.564, True)],
)
def test_deit_has_its_known_matrix_products(size, gmacs, fused):
    set_fused_attn(fused)
    model = timm.create_model(f"deit_{size}_patch16_224").eval()
    macs, flops = fvcore_macs(model, torch.zeros(1, 3, 224, 224)), torch_flops(model, torch.zeros(1, 3, 224, 224))
    assert round(macs[""] / 1e9, 3) == gmacs
    assert flops == {name: 2 * count for name, count in macs.items()}
    assert macs["head"] == model.embed_dim * 1000
    assert macs["blocks.3.mlp"] == 2 * 197 * 4 * model.embed_dim**2


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", 1.258), ("small", 4.608), ("base", 17.583)])
def test_deit_with_its_norms_is_what_timms_tables_have(size, gmacs):
    model, image = timm.create_model(f"deit_{size}_patch16_224", device="meta").eval(), torch.zeros(1, 3, 224, 224)
    assert round((torch_flops(model, image)[""] / 2 + norm_operations(model, image)) / 1e9, 3) == gmacs


def test_norms_are_counted_as_fvcore_counts_them():
    from fvcore.nn import FlopCountAnalysis

    set_fused_attn(False)  # fvcore knows no product of fused attention
    model, image = timm.create_model("deit_tiny_patch16_224", img_size=48).eval(), torch.zeros(1, 3, 48, 48)
    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert norm_operations(model, image) == analysis.total() - fvcore_macs(model, image)[""] > 0
    assert norm_operations(nn.LayerNorm(7, elementwise_affine=False), torch.zeros(3, 5, 7)) == 4 * 5 * 7


def test_a_training_step_multiplies_once_more_for_each_factor_with_a_gradient():
    model, x = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 11)), torch.randn(3, 5)
    assert training_flops(model, x) == 2 * (35 + 77 + 35 + 2 * 77)
    model[0].requires_grad_(False)
    assert training_flops(model, x) == 2 * (35 + 77 + 77)
    assert all(parameter.grad is None for parameter in model.parameters())


PRODUCTS = {
    "linear": (lambda x, w: F.linear(x, w), (5, 7), (11, 7), 5 * 7 * 11),
    "matmul": (lambda x, w: x @ w, (5, 7), (7, 11), 5 * 7 * 11),
    "matmul, batch in the second factor": (lambda x, w: w @ x, (3, 5, 7), (11, 5), 3 * 11 * 5 * 7),
    "bmm": (lambda x, w: torch.bmm(x, x.transpose(1, 2)), (5, 7), (1,), 5 * 7 * 5),
    "convolution": (lambda x, w: F.conv2d(x, w, stride=3), (3, 7, 13), (5, 3, 3, 3), 5 * 3 * 9 * 2 * 4),
    "convolution in groups": (lambda x, w: F.conv1d(x, w, groups=3), (6, 11), (9, 2, 5), 9 * 2 * 5 * 7),
    "attention": (
        lambda x, w: F.scaled_dot_product_attention(x[:, :, :5], x, x @ w),
        (3, 11, 7),
        (7, 13),
        3 * 11 * 7 * 13 + 3 * 5 * 11 * (7 + 13),
    ),
    "no product": (lambda x, w: F.layer_norm(F.gelu(x) * w, x.shape[-1:]).softmax(-1).mean(1), (5, 7), (7,), 0),
}


@pytest.mark.parametrize(("function", "x_shape", "w_shape", "macs"), PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_products_are_counted_per_image(function, x_shape, w_shape, macs, batch_size):
    model, x = Calls(function, *w_shape), torch.randn(batch_size, *x_shape)
    assert fvcore_macs(model, x) == {"": macs}
    assert torch_flops(model, x) == {"": 2 * macs}


def test_submodules_are_counted_with_their_children():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.GELU()), nn.Linear(7, 11))
    macs = {"": 35 + 77, "0": 35, "0.0": 35, "1": 77}
    assert fvcore_macs(model, torch.randn(2, 5)) == macs
    assert torch_flops(model, torch.randn(2, 5)) == {name: 2 * count for name, count in macs.items()}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x, w: torch.einsum("bnc,mc->bnm", x, w), "aten::einsum"),
        (lambda x, w: torch.cdist(x, w[None]), "aten::cdist"),
        (lambda x, w: Square.apply(x @ w.t()), "prim::PythonOp.Square"),
    ],
)
def test_an_operation_without_a_rule_is_an_error(function, name):
    with pytest.raises(ValueError, match=f"Calls runs {name}, which no counting rule covers"):
        fvcore_macs(Calls(function, 5, 7), torch.randn(1, 5, 7))


@pytest.mark.parametrize("count", [fvcore_macs, torch_flops])
def test_a_product_that_images_share_has_no_count_per_image(count):
    model = Calls(lambda x, w: x + (w @ w.t()).sum(), 3, 5)
    assert count(model, torch.randn(1, 11))[""] == 45 * (2 if count is torch_flops else 1)
    with pytest.raises(ValueError, match="the model makes products that 7 images share: count with a batch of 1"):
        count(model, torch.randn(7, 11))


def test_torch_flops_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch_flops(model, torch.randn(2, 3, 7, 7))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].device.type == "cpu" for name, tensor in before.items())
