"""Healing: models of folders, and what wins back the accuracy that a conversion cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cases import CASES, Case, images, moved
from safetensors.torch import load_file
from storms.pictures import write_pictures
from storms.processes import Run
from torch import nn

from train.__main__ import main
from train.heal import Healing, _train_only, outputs_loss, plan_share
from train.objective import regained
from vitreuse.compress.head_matching import rows_of_heads
from vitreuse.compress.recording import recorded_attention
from vitreuse.config import ConfigError
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import load_experiment, resolve_targets
from vitreuse.model.checkpoint import load_checkpoint

SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = """\
model: {{name: "local-dir:{model}"}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 1
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-2}}
  log_every_steps: 1
  ledger: true
eval: {{crop_pct: 1.0}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of three classes: three steps of 8, 8 and 1 make an epoch."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, 17, 7, per_shard=10)
    return folder


@pytest.fixture
def write(tmp_path, root):
    """Writes an experiment that begins with the model of a folder; its path."""

    def write_config(model: Path, name: str = "x.yaml") -> Path:
        (tmp_path / name).write_text(CONFIG.format(model=model, root=root))
        return tmp_path / name

    return write_config


def _hub_folder(folder: Path, plan: str, **keywords: Any) -> Any:
    """A random model, saved as a hub folder."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_reuse_tiny_patch16_224", **{**SIZES, "plan": plan, **keywords})
    save_hub_folder(model, folder)
    return model


# ---- models of folders

UNNAMED = "; its 3 classes, whose names are not known, go by number"

def test_a_run_starts_from_the_model_of_a_folder_and_goes_on_from_that_run(tmp_path, write, capsys):
    """A hub folder, then the run folder that the first run left: name, plan, keywords and weights."""
    model = _hub_folder(tmp_path / "hub", "exact span:1", qk_norm=True)
    first, second = (tmp_path / name for name in ("first", "second"))
    for source, run_dir, said in ((tmp_path / "hub", first, UNNAMED), (first, second, "")):
        arguments = [str(write(source)), f"run_dir={run_dir}", "train.optimizer.lr=1e-9"]
        assert main(arguments) == 0
        assert f"starts from {source / 'model.safetensors'}{said}." in capsys.readouterr().err
        assert main(arguments) == 0  # the resolved config.yaml is that of the same experiment
        assert "is completed already" in capsys.readouterr().err
        inputs = json.loads((run_dir / "run.json").read_text())["inputs"]
        assert len(inputs[str(source / "model.safetensors")]) == 64
    settings = resolve_targets([str(second)])[0].model
    assert (settings.name, settings.plan) == ("vit_reuse_tiny_patch16_224", "exact span:1")
    assert settings.keywords["qk_norm"] and settings.weights == str(first / "model.safetensors")
    for name, tensor in load_file(second / "model.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


def test_what_stands_beside_the_folder_lies_over_what_it_holds(tmp_path, write):
    _hub_folder(tmp_path / "hub", "exact*2")
    overrides = ["model.plan=exact reuse", "model.keywords={drop_path_rate: 0.1}"]
    teacher = f"train.distill={{kind: soft, teacher: {{name: 'local-dir:{tmp_path / 'hub'}'}}}}"
    config = load_experiment(write(tmp_path / "hub"), [*overrides, teacher])
    assert config.model.plan == "exact reuse" and config.model.keywords["embed_dim"] == 16
    assert config.model.keywords["drop_path_rate"] == 0.1
    assert config.train.distill is not None and config.train.distill.teacher.plan == "exact*2"
    assert config.train.distill.teacher.weights == config.model.weights == str(tmp_path / "hub" / "model.safetensors")


def test_weights_may_be_a_folder(tmp_path, write, capsys):
    _hub_folder(tmp_path / "hub", "exact*2")
    model = f"{{name: vit_reuse_tiny_patch16_224, plan: exact reuse, keywords: {json.dumps(SIZES)}"
    arguments = [str(write(tmp_path / "hub")), f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, f"model={model}, weights: {tmp_path / 'hub'}}}"]) == 0
    assert f"starts from {tmp_path / 'hub'}{UNNAMED}; left out: blocks.1.attn.qkv." in capsys.readouterr().err
    assert str(tmp_path / "hub" / "model.safetensors") in json.loads((tmp_path / "run/run.json").read_text())["inputs"]
    assert main([*arguments, f"model={model}, weights: {tmp_path}}}", f"run_dir={tmp_path / 'other'}"]) == 2
    assert f"{tmp_path}/model.safetensors cannot be read as weights: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "overrides", "sentence"),
    [
        ("nowhere", [], "nowhere is no folder: give a run folder, or one that vitreuse convert or export wrote."),
        ("data", [], "data is neither a run folder nor a hub folder"),
        ("hub", ["model.weights=x.pth"], "brings weights of its own: leave out weights, pos_embed and qkv_init."),
        ("hub", ["model.pos_embed=sincos2d"], "brings weights of its own: leave out weights, pos_embed and qkv_init."),
        ("hub", ["model.qkv_init=apart"], "brings weights of its own: leave out weights, pos_embed and qkv_init."),
        ("begun", [], "begun has no model.safetensors yet: go on with its training."),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path, write, source, overrides, sentence):
    (tmp_path / "data").mkdir()
    (tmp_path / "begun").mkdir()
    _hub_folder(tmp_path / "hub", "exact*2")
    begun = write(tmp_path / "hub", "begun.yaml").read_text().replace(
        f'"local-dir:{tmp_path / "hub"}"', "vit_reuse_tiny_patch16_224"
    )  # fmt: skip
    (tmp_path / "begun" / "config.yaml").write_text(begun)
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path / source), overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


# ---- the plan annealed in

ANNEALED = {
    "every word": CASES["mixture"],
    "registers, qk-norm, scales": CASES["extras"],
    "projections of all layers in one, two class tokens": Case(
        "lowrank:7 reuse:1 none lowrank:7", distilled=True, keywords={"lowrank_sharing": "layerwise"}
    ),
    "without a class token": Case("span:3 none reuse", keywords={"class_token": False, "global_pool": "avg"}),
    "hidden units": Case("exact/7 exact/0 span:3/30 reuse/3 none/5 lowrank:3/0 reuse:2/13 exact/2"),
    "hidden units and scales": CASES["hidden extras"],
    "linear and skip": CASES["linear and skip"],
    "linear, two class tokens": CASES["linear distilled"],
    "linear and skip, without a class token": CASES["linear average"],
}
# Plans that merge, and those whose layers merge alike and are exact.
MERGING = {
    "every word": (
        "exact-3 exact reuse:2/7 linear exact-2/0 skip none/5 exact reuse",
        "exact-3 exact*3 exact-2 exact*4",
    ),
    "by values": ("exact reuse-2 exact/3 skip reuse:2-3/0 linear", "exact reuse:0-2 exact*2 reuse:0-3 exact"),
    "spans first": ("span:3 exact-4 linear", "exact exact-4 exact"),
    "only the class rows at the end": ("exact-5 exact reuse/3", "exact-5 exact*2"),
}
KEYWORDS = {
    "class token": {},
    "scales": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1, "reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


def _converted(case: Case) -> tuple[Any, Any]:
    """A random original with exact layers, and the model of a plan with its weights, heads of reuse layers reversed."""
    keywords = {key: value for key, value in case.keywords.items() if not key.startswith("lowrank")}
    model = case.build()
    original = Case(f"exact*{len(model.plan)}", case.grid, case.distilled, keywords).build(1)
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    for layer, spec in enumerate(model.plan):
        if spec.word == "reuse":
            attn = model.blocks[layer].attn
            _reorder(state, f"blocks.{layer}.attn.", rows_of_heads([*reversed(range(attn.num_heads))], attn.head_dim))
    load_checkpoint(model, state)
    return model.eval(), original.eval()


def _reorder(state: dict[str, torch.Tensor], prefix: str, rows: torch.Tensor) -> None:
    for name in ("qkv.weight", "qkv.bias", "norm.weight", "norm.bias"):
        if prefix + name in state:
            parts = state[prefix + name].unflatten(0, (-1, len(rows)))
            state[prefix + name] = parts[:, rows].flatten(0, 1)
    state[f"{prefix}proj.weight"] = state[f"{prefix}proj.weight"][:, rows]


@pytest.mark.parametrize("name", ANNEALED)
def test_annealing_goes_from_the_original_to_the_plan(name):
    model, original = _converted(ANNEALED[name])
    batch = images(ANNEALED[name].grid)
    healing = Healing(model, original)
    expected = original(batch)
    torch.testing.assert_close(healing(batch, 0.0)[0], expected)
    assert torch.equal(healing(batch, 1.0)[0], model(batch))
    assert (model(batch) - expected).abs().max() > 0.01  # the two ends are apart
    between = healing(batch, 0.5)[0]
    assert all((between - end).abs().max() > 1e-3 for end in (expected, model(batch)))


def _merge_all(share: float, merging: Any, args: Any, output: Any) -> Any:
    """In place of the hook by which fewer tokens merge."""
    return output


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("name", MERGING)
def test_annealing_of_plans_that_merge_goes_from_the_original_to_the_plan(name, keywords):
    model, original = _converted(Case(MERGING[name][0], keywords=KEYWORDS[keywords]))
    healing = Healing(model, original)
    torch.testing.assert_close(healing(images(), 0.0)[0], original(images()))
    assert torch.equal(healing(images(), 1.0)[0], model(images()))


@pytest.mark.parametrize(("share", "fewer"), [(0.5, "exact-2 exact-1 exact"), (0.9, "exact-4 exact-2 exact")])
def test_tokens_that_merge_become_more_step_by_step(share, fewer):
    model, original = _converted(Case("exact-5 exact-3 exact"))
    less, _ = _converted(Case(fewer))
    load_checkpoint(less, model.state_dict())
    assert torch.equal(Healing(model, original)(images(), share)[0], less(images()))
    assert model.blocks[0].merge.num_merged == 5


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("name", MERGING)
def test_old_parts_are_those_of_exact_layers_that_merge(name, keywords, monkeypatch):
    monkeypatch.setattr("train.heal._merge_fewer", _merge_all)
    plan, exact = MERGING[name]
    model, original = _converted(Case(plan, keywords=KEYWORDS[keywords]))
    merging = Case(exact, keywords=KEYWORDS[keywords]).build(2).eval()
    load_checkpoint(merging, original.state_dict())
    healing = Healing(model, original)
    (logits, outputs), (expected, merged) = healing(images(), 0.0), Healing(merging)(images(), 1.0)
    torch.testing.assert_close(logits, expected)
    assert all((logits - other).abs().max() > 1e-3 for other in (original(images()), model(images())))
    for layer, output in outputs.items():
        torch.testing.assert_close(output, merged[layer])
    assert torch.equal(healing(images(), 1.0)[0], model(images()))


@pytest.mark.parametrize("keywords", [{}, {"class_token": False, "global_pool": "avg"}])
def test_equal_tokens_that_merge_change_neither_outputs_nor_logits(keywords, monkeypatch):
    """Of an image of two patches again and again, two of each in a row, without position embedding: only sizes keep the
    merged ones from counting less, and each token of the original is compared with the one that it went to."""
    monkeypatch.setattr("train.heal._merge_fewer", _merge_all)
    plan = "exact-4 exact reuse:2-2/7 linear exact-2/0 skip none/5 exact reuse"
    model, original = _converted(Case(plan, keywords={**keywords, "pos_embed": "none"}))
    pair = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tiles = [[pair[(5 * row + column) // 2 % 2] for column in range(5)] for row in range(3)]
    image = torch.cat([torch.cat(row, dim=2) for row in tiles], dim=1)[None]
    healing = Healing(model, original)
    logits, outputs = healing(image, 0.0)
    torch.testing.assert_close(logits, original(image))
    with recorded_attention(original) as calls:
        original(image)
    originals = {layer: call.output for layer, call in calls.items()}
    assert outputs.keys() == {layer for layer, spec in enumerate(model.plan) if spec.has_attention}
    assert all(outputs[layer].shape == originals[layer].shape for layer in outputs)
    assert outputs_loss(outputs, originals) < 1e-20 < 1e-4 < outputs_loss(healing(image, 1.0)[1], originals)


def test_outputs_of_merged_tokens_are_those_of_the_token_they_went_to():
    model, _ = _converted(Case("exact-4 exact-3 exact reuse", keywords={"global_pool": "avg"}))
    places: list[torch.Tensor] = []
    for block in model.blocks[:2]:
        block.merge.register_forward_hook(lambda _, args, output: places.append(output[2]))
    with recorded_attention(model) as calls:
        outputs = Healing(model)(images(), 1.0)[1]
    for layer, output in outputs.items():
        assert output.shape == (2, 16, 15)
        went = places[min(layer, 2) - 1] if layer else torch.arange(16).expand(2, -1)
        for image, token in ((image, token) for image in range(2) for token in range(16)):
            assert torch.equal(output[image, token], calls[layer].output[image, went[image, token]])


@pytest.mark.parametrize("name", ["every word", "linear and skip", "hidden units and scales"])
def test_nothing_of_the_original_is_computed_once_the_plan_is_alone(name):
    model, original = _converted(ANNEALED[name])
    healing = Healing(model, original)

    def die(*_: Any) -> None:
        raise AssertionError

    for module in original.modules():
        module.register_forward_pre_hook(die)
    with pytest.raises(AssertionError):
        healing(images(), 0.99)
    before = healing(images(), 1.0)[0]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(healing(images(), 1.0)[0], before) and not before.isnan().any()
    parts = [part for block in model.blocks for part in (block, block.attn, getattr(block, "mlp", block))]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        ("new", {"blocks.0.linear.", "blocks.4.attn.key_proj"}),
        ("touched", {
            "blocks.0.linear.", "blocks.2.norm2.", "blocks.2.mlp.", "blocks.2.ls2.", "blocks.3.norm2.", "blocks.3.mlp.",
            "blocks.3.ls2.", "blocks.4.norm1.", "blocks.4.attn.", "blocks.4.ls1.",
        }),
        ("all", {""}),
    ],
)  # fmt: skip
def test_what_is_trained_is_what_the_plan_touches(parameters, chosen):
    model = Case("linear skip exact/7 none/3 lowrank:3/0 exact exact-3", keywords={"init_values": 0.1}).build()
    _train_only(model, parameters)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(tuple(chosen)), name


def test_annealing_trains_values_by_both_paths_and_the_old_maps_by_none():
    model, original = _converted(CASES["reuse of some heads"])
    healing = Healing(model, original)
    healing(images(), 0.0)[0].sum().backward()
    layer = model.blocks[1].attn
    assert layer.v.weight.grad.abs().sum() > 0 and not layer.qk.weight.grad.any()
    assert {name for name, parameter in healing.named_parameters() if parameter.grad is None} == {
        name for name, _ in healing.named_parameters() if name.startswith("held.")
    }
    assert all(parameter.grad is None for parameter in original.parameters())


class _Adapted(nn.Module):
    """A linear layer with an adapter of rank 1, which drops inputs in training."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, 1, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(1, base.out_features, bias=False, dtype=base.weight.dtype)
        self.drop = nn.Dropout(0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(self.drop(x)))


def test_adapters_are_called():
    """Of both models and in both attentions; in training, too, values are compared without dropout."""
    model, original = _converted(CASES["mixture"])
    for block in (*model.blocks, *original.blocks):
        for name, linear in list(block.attn.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block.attn, name, _Adapted(linear))
    healing = Healing(model.train(), original)
    assert all(module.training for module in model.modules())
    before = original(images())
    torch.testing.assert_close(healing.eval()(images(), 0.0)[0], before)
    for module in model.modules():
        if isinstance(module, _Adapted):
            nn.init.ones_(module.up.weight)
    assert (healing(images(), 0.0)[0] - before).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("plan", [CASES["mixture"].plan, *(plan for plan, _ in MERGING.values())])
def test_every_parameter_has_a_gradient_at_every_share(plan, share):
    """Else a run of several ranks would end at its second step."""
    model, original = _converted(Case(plan))
    Healing(model, original)(images(), share)[0].sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_values_that_are_not_the_originals_are_refused():
    model, original = _converted(CASES["reuse"])
    with torch.no_grad():
        model.blocks[2].attn.v.weight[0] += 1e-6
    with pytest.raises(ConfigError, match="the values of layer 2 are not the teacher's: begin with the converted"):
        Healing(model, original)


def test_the_share_of_the_plan_is_a_function_of_the_step():
    assert [plan_share(step, 4) for step in (0, 1, 3, 4, 9)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert plan_share(0, 0) == 1.0


def test_the_loss_of_outputs_by_hand():
    """Two layers, of which the second has only its first row: a twofold and a zero output of ones."""
    originals = {0: torch.ones(2, 3, 4), 1: torch.ones(2, 3, 4), 2: torch.full((1,), torch.nan)}
    assert outputs_loss({0: torch.full((2, 3, 4), 3.0), 1: torch.zeros(2, 1, 4)}, originals) == (4.0 + 1.0) / 2


def test_the_loss_of_outputs_is_the_mean_of_its_parts():
    """Else accumulated gradients and those of several ranks would not be those of the batch."""
    found, original = torch.randn(3, 2, 5, 4) * torch.tensor([1.0, 5.0, 25.0]).view(3, 1, 1, 1), torch.randn(3, 2, 5, 4)
    parts = [outputs_loss({0: found[i]}, {0: original[i] * 3**i}) for i in range(3)]
    scaled = torch.cat([original[i] * 3**i for i in range(3)])
    torch.testing.assert_close(outputs_loss({0: found.flatten(0, 1)}, {0: scaled}), torch.stack(parts).mean())


def test_attention_outputs_are_those_of_one_pass():
    model, original = _converted(CASES["mixture"])
    with recorded_attention(original) as taken, torch.no_grad():
        original(images())
    found = Healing(original)(images(), 1.0)[1]
    assert taken.keys() == found.keys() == set(range(len(model.plan)))
    assert all(torch.equal(taken[layer].output, found[layer]) for layer in found)
    assert not any(block.attn._forward_hooks for block in original.blocks)
    assert Healing(model)(images(), 1.0)[1].keys() == found.keys() - {
        layer for layer, spec in enumerate(model.plan) if spec.word == "none"
    }


# ---- runs


@pytest.fixture
def healed(tmp_path, write):
    """The arguments of a run that heals a converted model; its original is plain timm's."""

    def arguments(plan: str, *overrides: str) -> list[str]:
        keywords: Any = {**SIZES, "depth": 3}
        original = moved(timm.create_model("vit_tiny_patch16_224", **keywords), std=0.2)
        save_hub_folder(original, tmp_path / "original")
        model: Any = timm.create_model("vit_reuse_tiny_patch16_224", plan=plan, **keywords)
        load_checkpoint(model, original.state_dict())
        save_hub_folder(model, tmp_path / "converted")
        teacher = f"{{kind: soft, alpha: 0.9, teacher: {{name: 'local-dir:{tmp_path / 'original'}'}}}}"
        return [str(write(tmp_path / "converted")), f"train.distill={teacher}", *overrides]

    return arguments


@pytest.mark.parametrize("plan", ["lowrank:2 reuse:1 none", "linear exact-1/5 skip"])
def test_healing_stopped_amid_annealing_goes_on_to_the_bit(tmp_path, healed, monkeypatch, capsys, plan):
    """Killed after step 4, of which 3 were saved, with 6 of annealing; what is left is the plan's model alone."""
    recipe = healed(
        plan, "train.heal={outputs: 0.5, anneal_epochs: 2}", "train.epochs=4",
        "train.accumulation_steps=2", "train.ema={decay: 0.5}", "model.keywords={drop_path_rate: 0.1}",
        "eval.every_epochs=2",
    )  # fmt: skip
    whole, killed = (Run(tmp_path / name, tuple(recipe)) for name in ("whole", "killed"))
    assert main([*recipe, f"run_dir={whole.folder}"]) == 0
    assert "the teacher top-1 " in capsys.readouterr().err
    record = whole.records()[0]
    assert record["kind"] == "heal" and whole.records()[-1]["before_top1"] == record["before_top1"]

    def die(step: int, num_steps: int) -> float:
        if step == 4:
            raise MemoryError
        return plan_share(step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr("train.objective.plan_share", die)
        assert main([*recipe, f"run_dir={killed.folder}"]) == 1
    assert killed.saved_step == 3
    assert main([*recipe, f"run_dir={killed.folder}"]) == 0
    killed.check_equals(whole)
    model: Any = resolve_targets([str(whole.folder)])[0].load()  # strictly: keys of the plan and no others
    assert str(model.plan) == plan
    assert model.blocks[1].attn.qk.out_features == 16 if "reuse" in plan else model.blocks[1].mlp.fc1.out_features == 5


@pytest.mark.parametrize(
    ("plan", "parameters", "moved"),
    [
        ("lowrank:2 reuse exact", "new", {"blocks.0.attn.key_proj"}),
        ("lowrank:2 reuse exact", "touched", {"blocks.0.attn.", "blocks.0.norm1.", "blocks.1.attn."}),
        ("linear exact-1/5 exact", "new", {"blocks.0.linear."}),
        ("linear exact-1/5 exact", "touched", {"blocks.0.linear.", "blocks.1.mlp.", "blocks.1.norm2."}),
    ],
)
def test_only_the_chosen_parameters_move_and_the_outputs_come_nearer(tmp_path, healed, plan, parameters, moved):
    recipe = healed(
        plan, f"train.heal={{outputs: 5, parameters: {parameters}}}", "train.epochs=6",
        "eval.every_epochs=6", "train.distill.alpha=1",
    )  # fmt: skip
    assert main([*recipe, f"run_dir={tmp_path / 'run'}"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("converted", "run"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(tuple(moved | {"blocks.1.norm1."})) for name in changed)
    assert all(any(name.startswith(part) for name in changed) for part in moved)
    losses = [record["loss"] for record in Run(tmp_path / "run", ()).records() if record["kind"] == "step"]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize(
    ("plan", "overrides", "sentence"),
    [
        ("exact reuse exact", ["train.distill=null"], "heal needs the original as a teacher: give distill.teacher"),
        ("exact reuse exact", ["train.heal.anneal_epochs=1"], "heal.anneal_epochs 1 leaves nothing of 1 epochs"),
        ("exact reuse exact", ["train.compile=true"], "and exclude compile: true: leave that out, or set both to 0."),
        ("exact reuse exact", ["train.grad_checkpointing=true"], "and exclude grad_checkpointing: true"),
        ("exact reuse exact", ["train.strategy=fsdp2"], "and exclude strategy: fsdp2"),
        ("exact reuse exact", ["model.keywords={patch_drop_rate: 0.5}"], "set model.keywords.patch_drop_rate to 0."),
        (
            "exact reuse exact",
            ["train.heal.parameters=new"],
            "train.heal.parameters 'new' leaves nothing to train under plan 'exact reuse exact': choose 'touched' or",
        ),
        ("exact none*2", ["train.heal.parameters=touched"], "under plan 'exact none*2': choose 'all'."),
        (
            "lowrank:2*3",
            ["train.heal.parameters=new", "train.freeze=['*.key_proj']"],
            "train.freeze holds all that train.heal.parameters 'new' trains: freeze fewer.",
        ),
        ("exact*3", ["train.heal={anneal_epochs: 0.5}"], "has no effect on plan 'exact*3': set it to 0."),
        ("none*3", [], "train.heal.outputs has no effect on plan 'none*3', without attention: set it to 0."),
        ("none linear skip", [], "outputs has no effect on plan 'none linear skip', without attention: set it to 0."),
        ("exact-1 exact*2", ["train.heal.parameters=touched"], "under plan 'exact-1 exact*2': choose 'all'."),
        ("skip exact*2", ["train.heal.parameters=touched"], "under plan 'skip exact*2': choose 'all'."),
        ("exact/5 exact*2", ["train.heal.parameters=new"], "under plan 'exact/5 exact*2': choose 'touched' or 'all'."),
        (
            "exact-1 exact*2",
            ["train.distill.teacher.name=local-dir:{tmp}/converted"],
            "need a teacher whose layers are all 'exact', and its plan is 'exact-1 exact*2'",
        ),
        (
            "exact reuse exact",
            [f"model={{name: vit_tiny_patch16_224, keywords: {json.dumps(SIZES)}}}"],
            "train.heal needs a model with a plan, VisionTransformer has none: convert it first.",
        ),
        (
            "exact reuse exact",
            ["train.distill.teacher.keywords={img_size: 16}"],
            "1 prefix tokens and 4 x 4 patches where the model is a ViT of 3 layers, 16 channels, 1 prefix tokens and",
        ),
    ],
)
def test_healing_that_cannot_be_is_one_sentence(tmp_path, healed, capsys, plan, overrides, sentence):
    overrides = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    recipe = healed(plan, "train.heal={outputs: 1}", *overrides, f"run_dir={tmp_path / 'run'}")
    assert main(recipe) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert sentence in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (None, "nothing had been lost"),
        (0.0, "0 % of what was lost is regained"),
        (75.4, "75 % of what was lost is regained"),
        (-154.0, "154 % of what was lost is lost besides: lower train.optimizer.lr, or heal on more images"),
    ],
)
def test_a_healing_that_loses_more_says_so(share, said):
    assert regained(share) == said
