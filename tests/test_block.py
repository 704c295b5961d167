"""timm's MLP in place: the same bits, and nothing overwritten that somebody else may look at."""

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from vitreuse.cost.measure import peak_memory_mib
from vitreuse.model.block import InplaceMlp

DIM, HIDDEN = 13, 37


def pair(**keywords):
    """timm's Mlp and ours with the same weights."""
    theirs, ours = (kind(DIM, HIDDEN, **keywords).eval() for kind in (Mlp, InplaceMlp))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keywords", [{}, {"norm_layer": nn.LayerNorm}, {"act_layer": nn.ReLU}, {"bias": False}])
def test_inference_gives_timms_bits(dtype, keywords):
    theirs, ours = (mlp.to(dtype) for mlp in pair(**keywords))
    x = torch.randn(3, 11, DIM, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_training_gives_timms_gradients():
    theirs, ours = (mlp.train() for mlp in pair())
    x = torch.randn(3, 11, DIM)
    grads = [torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters())) for mlp in (theirs, ours)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inference_holds_the_hidden_units_once():
    x = torch.randn(1, 1000, DIM)
    with torch.inference_mode():
        theirs, ours = (peak_memory_mib(lambda mlp=mlp: mlp(x), (), torch.device("cpu")) for mlp in pair())
    assert theirs - ours == pytest.approx(1000 * (HIDDEN - DIM) * 4 / 2**20)  # fc2's output is there with one of them


@pytest.mark.parametrize("watched", ["fc1", "act"])
def test_a_hook_sees_what_timms_shows_it(watched):
    theirs, ours = pair()
    seen = []
    for mlp in (theirs, ours):
        mlp.get_submodule(watched).register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    with torch.inference_mode():
        x = torch.randn(3, 11, DIM)
        theirs(x), ours(x)
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_global_hook_sees_what_timms_shows_it():
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.inference_mode():
            x = torch.randn(3, 11, DIM)
            for mlp in pair():
                mlp(x)
    finally:
        hook.remove()
    assert len(seen) % 2 == 0 and all(torch.equal(a, b) for a, b in zip(seen, seen[len(seen) // 2 :], strict=False))


def test_replaced_submodules_keep_their_inputs():
    _, ours = pair()
    ours.fc1, ours.fc2 = nn.Identity(), nn.Identity()
    x = torch.randn(3, 11, DIM)
    before = x.clone()
    with torch.inference_mode():
        ours(x)
    assert torch.equal(x, before)
