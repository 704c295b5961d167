"""Strict YAML: what is read is what was declared, and every mistake names file, key, rule and way out."""

import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import build_sincos2d_pos_embed

from vitreuse.cli.console import local_path
from vitreuse.config import Config, ConfigError, ModelConfig, changed_settings, load_config, to_yaml
from vitreuse.files.networks import resolve_targets

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
SHIPPED = [path for path in CONFIGS if not path.name.startswith("_")]
SMALL = [path for path in SHIPPED if path.parent.name in ("digits", "study") and "heal" not in path.stem]

MINIMAL = """\
model:
  name: vit_reuse_tiny_patch16_224
data:
  source: digits
train:
  epochs: 3
  global_batch_size: 8
  optimizer: {lr: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file into a folder of its own; its path."""

    def write_file(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def _error(path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_values_are_read_by_declared_type(write):
    config = load_config(
        write(MINIMAL),
        [
            "train.optimizer.weight_decay=1e-1",
            "train.crop={scale: [5e-2, 1], color_jitter: 0}",
            "train.ledger=true",
            "model.plan=(exact reuse*2)*4",
            "data.source=null",
            "data.root='224'",
            "model.keywords.img_size=12",
            "model.keywords.nested={a: [1e-3, true, null, text, '007']}",
            "train.freeze=[patch_embed, 'blocks.[0-5]']",
            "train.optimizer.keywords={betas: [0.9, 0.95]}",
            "train.schedule={warmup_steps: 7, warmup_lr: 0}",
        ],
    )
    assert (config.train.optimizer.lr, config.train.optimizer.weight_decay) == (0.001, 0.1)
    assert config.train.crop.scale == (0.05, 1.0) and type(config.train.crop.color_jitter) is float
    assert config.train.ledger is True and config.model.plan == "(exact reuse*2)*4"
    assert (config.data.source, config.data.root) == (None, "224")
    assert config.model.keywords == {"img_size": 12, "nested": {"a": [0.001, True, None, "text", "007"]}}
    assert type(config.model.keywords["nested"]["a"][0]) is float
    assert config.train.freeze == ("patch_embed", "blocks.[0-5]")
    assert config.train.optimizer.keywords == {"betas": [0.9, 0.95]}
    assert (config.train.schedule.warmup_steps, config.train.schedule.warmup_lr) == (7, 0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs=0", "command line: train.epochs is 0, it must be greater than 0."),
        ("train.epochs=1.0", "command line: train.epochs must be a whole number, not '1.0'."),
        ("train.epochs='3'", "command line: train.epochs must be a whole number, not '3'."),
        ("train.epochs=0224", "command line: train.epochs must be a whole number, not '0224'."),
        ("train.epochs=0o17", "command line: train.epochs must be a whole number, not '0o17'."),
        ("train.epochs=1_000", "command line: train.epochs must be a whole number, not '1_000'."),
        ("train.epochs=true", "command line: train.epochs must be a whole number, not 'true'."),
        ("train.epochs=", "command line: train.epochs must be a whole number, not 'null'."),
        ("train.epochs=[3]", "command line: train.epochs must be a whole number, not a list."),
        ("train.epochs={a: 3}", "command line: train.epochs must be a whole number, not a mapping."),
        ("train.ledger=on", "command line: train.ledger must be true or false, not 'on'."),
        ("train.ledger=True", "command line: train.ledger must be true or false, not 'True'."),
        ("train.ledger=1", "command line: train.ledger must be true or false, not '1'."),
        ("train.optimizer.lr=.inf", "command line: train.optimizer.lr must be a number, not '.inf'."),
        ("train.optimizer.lr=1e999", "command line: train.optimizer.lr must be a number, not '1e999'."),
        ("train.optimizer.lr=1:30", "command line: train.optimizer.lr must be a number, not '1:30'."),
        ("train.optimizer.lr=true", "command line: train.optimizer.lr must be a number, not 'true'."),
        ("train.mixup={mixup: -0.1}", "command line: train.mixup.mixup is -0.1, it must be at least 0."),
        ("train.crop={scale: [0.1, 1.5]}", "command line: train.crop.scale is 1.5, it must be at most 1."),
        ("train.crop={scale: [0.1]}", "command line: train.crop.scale must be a list of 2 values, not a list."),
        ("train.crop={scale: [0.1, x]}", "command line: train.crop.scale.1 must be a number, not 'x'."),
        ("train.optimizer=adamw", "command line: train.optimizer must be a mapping, not 'adamw'."),
        (
            "data.source=digit",
            "data.source is 'digit', allowed are digits, pointer_chain, fashion_mnist, did you mean 'digits'?",
        ),
        ("train.epoch=3", "command line: train.epoch is not a key, did you mean 'epochs'?"),
        ("trian.epochs=3", "command line: trian is not a key, did you mean 'train'?"),
        ("train.mixup={zzz: 1}", "is not a key; train.mixup knows mixup, cutmix, prob, switch_prob, groups."),
        ("train.schedule={warmup_epochs: 3}", "x.yaml: train.schedule.warmup_epochs 3 leaves nothing of 3 epochs"),
        (
            "train.schedule={name: constant, min_lr: 1e-5}",
            "x.yaml: train.schedule.min_lr 1e-05 is never reached by the schedule 'constant': set it to 0",
        ),
        ("train.schedule.min_lr=2e-3", "x.yaml: train.schedule.min_lr 0.002 is above optimizer.lr 0.001: lower it, or"),
        (
            "train.schedule={warmup_steps: 3, warmup_lr: 1}",
            "x.yaml: train.schedule.warmup_lr 1 is above optimizer.lr 0.001: lower it, or raise the rate.",
        ),
        ("train.mixup={mixup: 0, cutmix: 0}", "x.yaml: train.mixup.mixup and cutmix are both 0;"),
        ("data.root=a", "x.yaml: data.root and source: give exactly one of the two"),
        (
            "train={distill: {kind: soft, alpha: 1, teacher: {name: a, weights: b}}, loss: {name: bce}}",
            "loss has no effect under distill.alpha 1, which is the teacher's part alone: leave it out.",
        ),
        ("data.source=null", "x.yaml: data.root and source: give exactly one of the two"),
        ("model.plan=on", "command line: model.plan must be text, not 'on'; if it is meant as text, put it in quotes."),
        ("model.name=12", "command line: model.name must be text, not '12'; if it is meant as text, put it in quotes."),
        ("model.keywords.a=yes", "command line: model.keywords.a is 'yes', which has two readings"),
        ("model.keywords.a=0224", "command line: model.keywords.a is '0224', which has two readings"),
        ("model.keywords.plan=exact*12", "model.keywords.plan has a key of its own, plan beside keywords."),
        ("model.keywords.pretrained=true", "model.keywords.pretrained has a key of its own, weights beside keywords."),
        ("model.keywords.checkpoint_path=a", "keywords.checkpoint_path has a key of its own, weights beside keywords."),
        (
            "train.schedule={warmup_epochs: 1, warmup_steps: 5}",
            "x.yaml: train.schedule.warmup_epochs and warmup_steps: give at most one of the two, the other 0.",
        ),
        ("train.schedule={warmup_prefix: true}", "train.schedule.warmup_prefix has no effect without a warm-up: set"),
        (
            "train.schedule={name: constant, warmup_steps: 2, warmup_prefix: true}",
            "train.schedule.warmup_prefix has no effect on the schedule 'constant': leave it out.",
        ),
        ("train.schedule={warmup_lr: 1e-5}", "train.schedule.warmup_lr 1e-05 has no effect without a warm-up: set"),
        ("train.schedule={warmup_steps: 1.5}", "train.schedule.warmup_steps must be a whole number, not '1.5'."),
        ("train.precision=float64", "train.precision is 'float64', allowed are float32, bfloat16, float16, did you"),
        ("train.freeze=head", "command line: train.freeze must be a list, not 'head'."),
        ("train.freeze=[head, 3]", "command line: train.freeze.1 must be text, not '3'; if it is meant as text"),
        (
            "train.resolution={from_px: 160, epochs: 3}",
            "x.yaml: train.resolution.epochs 3 leaves none of 3 epochs at the model's own size: make it smaller",
        ),
        (
            "train.loss={target_threshold: 0.2}",
            "x.yaml: train.loss.target_threshold 0.2 has no effect on the loss 'ce': leave it out.",
        ),
        (
            "train.loss={name: bce, target_threshold: 0, smoothing: 0.1}",
            "x.yaml: train.loss.target_threshold undoes smoothing: leave one of the two out.",
        ),
        (
            "train.loss={name: bce, target_threshold: 0}",
            "x.yaml: train.loss.target_threshold 0 has no effect without train.mixup: leave it out.",
        ),
        (
            "model={pos_embed: sincos2d, weights: a.pth}",
            "x.yaml: model.pos_embed 'sincos2d' has no effect beside weights, which hold a position embedding: leave",
        ),
        ("model.pos_embed=sincos", "model.pos_embed is 'sincos', allowed are learned, sincos2d, did you mean 'sincos2"),
        ("train.distill={kind: soft}", "train.distill.teacher.name is missing (a model name"),
        (
            "train.distill={teacher: {name: vgg11}, kind: soft}",
            "train.distill.teacher.weights is missing: an un",
        ),
        (
            "model={qkv_init: apart, keywords: {weight_init: jax}, name: vit_small_patch16_224, weights: a.pth}",
            "model.qkv_init 'apart' has no effect beside weights, which hold query, key and value: leave one of the",
        ),
        ("eval.raw_every_epochs=2", "eval.raw_every_epochs 2 has no effect without train.ema: leave it out."),
        ("train.distill={teacher: {name: vgg11, weights: a.pth}}", "train.distill.kind is missing (soft: its prob"),
        (
            "train.distill={teacher: {name: vgg11, weights: a.pth}, kind: token, temperature: 2}",
            "x.yaml: train.distill.temperature 2 has no effect under kind 'token': leave it out.",
        ),
        (
            "train.distill={teacher: {name: vgg11, weights: a.pth}, kind: hard, alpha: 0}",
            "command line: train.distill.alpha is 0.0, it must be greater than 0.",
        ),
        ("train.epochs", "'train.epochs' is not of the form section.key=value."),
        ("train..epochs=3", "'train..epochs=3' is not of the form section.key=value."),
        ("train.epochs=[", "command line: is not valid YAML"),
        ("data.root=!!python/name:os.system x", "has the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ],
)
def test_a_wrong_override_is_one_sentence(write, override, sentence):
    assert sentence in _error(write(MINIMAL), override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL + "  seed: 1\n  seed: 2\n", "x.yaml:10: train.seed stands twice, remove one."),
        (MINIMAL + "  sead: 1\n", "x.yaml:9: train.sead is not a key, did you mean 'seed'?"),
        (MINIMAL.replace("  epochs: 3\n", ""), "train.epochs is missing (passes over the training set)."),
        (MINIMAL.replace("  name: vit_reuse_tiny_patch16_224", "  plan: exact"), "x.yaml:1: model.name is missing"),
        (MINIMAL.replace("{lr: 1e-3}", "{}"), "x.yaml:8: train.optimizer.lr is missing"),
        ("- model\n", "x.yaml: must be a mapping of sections"),
        ("model: [\n", "x.yaml: is not valid YAML"),
        ("", "x.yaml: model.name is missing"),
        ("? [a]\n: 1\n", "x.yaml:1: a key must be a word."),
        ("base: missing.yaml\n", "missing.yaml: cannot be read (No such file or directory)."),
        ("base: x.yaml\n", "base leads in a circle, x.yaml -> x.yaml."),
        ("model: &model {keywords: *model}\n", "x.yaml: is nested too deep, or an alias holds itself."),
        ("base: 3\n", "x.yaml:1: base must be text, not '3'"),
    ],
)
def test_a_wrong_file_is_one_sentence(write, text, sentence):
    assert sentence in _error(write(text))


def test_a_tilde_is_a_home_folder_wherever_a_path_is_given(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write(MINIMAL, "home/base.yaml")
    text = 'base: ~/base.yaml\ndata: {source: null, root: "~/a"}\ntrain: {reference: {curve: "~"}}'
    overrides = ["model.weights=~/b/c.pt", "data.cache_root='~/d'", "data.source_root=e/~"]
    config = load_config(write(text), overrides)
    found = (config.data.root, config.model.weights, config.data.cache_root, config.train.reference.curve)
    assert found == tuple(str(tmp_path / "home" / part) for part in ("a", "b/c.pt", "d", ""))[:3] + (
        str(tmp_path / "home"),
    )
    assert config.data.source_root == "e/~"
    assert local_path("~/x") == tmp_path / "home/x"
    paths = {name for name, field in _settings(Config) if field.metadata["is_path"]}
    assert paths == {"weights", "root", "cache_root", "source_root", "curve"}


def _settings(kind):
    for field in fields(kind):
        yield field.name, field
    for hint in typing.get_type_hints(kind).values():
        for inner in (hint, *typing.get_args(hint)):
            if is_dataclass(inner):
                yield from _settings(inner)


@pytest.mark.parametrize(
    ("path", "meant"),
    [("lazi.yaml", "lazy.yaml"), ("Lazy.yml", "lazy.yaml"), ("lazy", "lazy.yaml"), ("configz/exact.yaml", None)],
)
def test_a_missing_file_finds_the_one_that_was_meant(write, tmp_path, path, meant):
    (tmp_path / "configs").mkdir()
    for name in ("lazy.yaml", "reuse.yaml", "configs/exact.yaml"):
        write(MINIMAL, name)
    meant = tmp_path / (meant or "configs/exact.yaml")
    assert _error(tmp_path / path).endswith(f"cannot be read (No such file or directory), did you mean '{meant}'?")
    assert f"did you mean '{meant}'?" in _error(write(f"base: {path}\n"))
    assert _error(tmp_path / "zzz").endswith("cannot be read (No such file or directory).")


@pytest.mark.parametrize("text", ["runs/lazi", "local-dir:{}/runs/lazi", "runz/lazy", "runs/lazy/"])
def test_a_missing_run_folder_finds_the_one_that_was_meant(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs/lazy").mkdir(parents=True)
    (tmp_path / "runs/lazy/config.yaml").write_text(MINIMAL)
    if text.rstrip("/") == "runs/lazy":
        assert [target.label for target in resolve_targets([text])] == ["lazy"] == [
            target.label for target in resolve_targets(["~/runs/lazy"])
        ]  # fmt: skip
        return
    with pytest.raises(ValueError, match=r"did you mean '.*runs/lazy'"):
        resolve_targets([text.format(tmp_path)])


def test_a_base_is_what_a_file_differs_from(write, tmp_path):
    (tmp_path / "deeper").mkdir()
    write(MINIMAL, "deeper/root.yaml")
    write(
        "base: root.yaml\nmodel: {keywords: {img_size: 12, depth: 6}}\ntrain: {crop: {hflip: 0}}\n", "deeper/mid.yaml"
    )
    leaf = "base: deeper/mid.yaml\nmodel: {keywords: {depth: 4}}\ntrain: {epochs: 5, crop: null}\n"
    config = load_config(write(leaf), ["train.epochs=7"])
    assert config.model.keywords == {"img_size": 12, "depth": 4}
    assert (config.train.epochs, config.train.crop, config.train.global_batch_size) == (7, None, 8)


def test_a_mistake_in_a_base_names_the_base(write):
    write(MINIMAL + "  sead: 1\n", "below.yaml")
    assert "below.yaml:9: train.sead is not a key" in _error(write("base: below.yaml\ntrain: {epochs: 2}\n"))
    write("base: x.yaml\n", "circle.yaml")
    assert "x.yaml -> circle.yaml -> x.yaml" in _error(write("base: circle.yaml\n"))


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
SPELLINGS = st.sampled_from(["on", "1e-3", "0224", "null", "~", "", "1:30", "2020-01-01", "0x1f", "#", "a: b", "y"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | SPELLINGS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS | SPELLINGS, inner, max_size=3)),
    max_leaves=6,
)


KEYWORDS = st.dictionaries(TEXTS | SPELLINGS, VALUES, max_size=3)


@given(name=TEXTS | SPELLINGS, keywords=KEYWORDS, lr=st.floats(1e-30, 1e30))
def test_yaml_round_trips_exactly(tmp_path_factory, name, keywords, lr):
    path = tmp_path_factory.mktemp("round") / "x.yaml"
    path.write_text(MINIMAL)
    config = load_config(path, ["train.crop={ratio: [0.7, 1.3]}", "train.ema={decay: 0.99}", "train.freeze=[a, 'on']"])
    keywords.pop("plan", None)
    optimizer = replace(config.train.optimizer, lr=lr)
    model = ModelConfig(name=name, plan=name, keywords=keywords)
    config = replace(config, model=model, train=replace(config.train, optimizer=optimizer))
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert to_yaml(load_config(path)) == to_yaml(config)


def test_every_setting_says_what_it_means():
    def check(section):
        for field in fields(section):
            assert len(field.metadata["meaning"]) > 3, field.name

    sections = [type(value) for value in vars(load_config(SHIPPED[0])).values()]
    for section in (Config, *sections):
        check(section)


def test_changed_settings_are_those_that_give_another_run(write):
    config = load_config(write(MINIMAL))
    settings = ["data.num_workers=7", "train.log_every_steps=3", "eval.batch_size=5"]
    short = ["train.accumulation_steps=2", "train.grad_checkpointing=true", "train.max_skipped_steps=9"]  # of memory
    same = load_config(write(MINIMAL), [*settings, *short])
    other = load_config(write(MINIMAL), ["train.optimizer.lr=1", "train.ema={decay: 0.9}", "model.plan=exact*12"])
    assert changed_settings(config, same) == []
    assert changed_settings(config, other) == [
        "model.plan None -> 'exact*12'",
        "train.optimizer.lr 0.001 -> 1.0",
        "train.ema None -> EmaConfig(decay=0.9, warmup=False)",
    ]


def test_every_part_of_a_recipe_gives_another_run(write):
    config = load_config(write(MINIMAL))
    teacher = "teacher: {name: vgg11, weights: a.pth}"
    changes = {
        "model.weights": "a.pth",
        "model.pos_embed": "sincos2d",
        "train.optimizer.keywords": "{eps: 1e-8}",
        "train.schedule.warmup_steps": "3",
        "train.precision": "float16",
        "train.freeze": "[head]",
        "train.resolution": "{from_px: 160, epochs: 2}",
        "train.distill": f"{{{teacher}, kind: hard}}",
    }
    for key, value in changes.items():
        (change,) = changed_settings(config, load_config(write(MINIMAL), [f"{key}={value}"]))
        assert change.startswith(f"{key} ")
    soft, hard = (
        load_config(write(MINIMAL), [f"train.distill={{{teacher}, kind: {kind}}}"]) for kind in ("soft", "hard")
    )
    assert changed_settings(soft, hard) == ["train.distill.kind 'soft' -> 'hard'"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "vit_reuse_tinny_patch16_224"}, "did you mean 'vit_reuse_tiny_patch16_224'?"),
        (
            {"keywords": {"img_sze": 12}},
            "img_sze is not a keyword of vit_reuse_tiny_patch16_224, did you mean 'img_size'?",
        ),
        ({"keywords": {"reuse_backed": "map"}}, "did you mean 'reuse_backend'?"),
        ({"plan": "exact*11"}, "cannot be built: "),
        ({"pos_embed": "sincos2d", "keywords": {"pos_embed": "none"}}, "needs a vision transformer with a position em"),
        ({"pos_embed": "sincos2d", "name": "resnet18"}, "with a position embedding, ResNet has none: leave it out."),
        ({"pos_embed": "sincos2d", "keywords": {"embed_dim": 6}}, "that is a multiple of 4, not 6: choose another em"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_sentence(model, sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"name": "vit_reuse_tiny_patch16_224", "keywords": {}, **model}).create("meta")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("distilled", [False, True])
def test_sincos2d_is_timms_table_under_zeros_for_prefix_tokens(distilled):
    name = "deit_reuse_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    model = ModelConfig(
        name=name, keywords={"img_size": (32, 48), "embed_dim": 24, "num_heads": 2}, pos_embed="sincos2d"
    ).create()
    table = build_sincos2d_pos_embed([2, 3], 24)
    assert torch.equal(model.pos_embed[0, model.num_prefix_tokens :], table)
    assert not model.pos_embed[0, : model.num_prefix_tokens].any()
    assert model.pos_embed.requires_grad  # train.freeze says whether it stays


@pytest.mark.parametrize("path", SMALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_small_config_builds(path):
    """Those of ImageNet are in test_recipes.py; those that begin with a trained model's folder in test_readme.py."""
    config = load_config(path)
    model = config.model.create("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert str(model.plan) == config.model.plan
    image = yaml.safe_load(to_yaml(config))["model"]["keywords"]["img_size"]
    assert model.patch_embed.img_size == (image, image)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_a_complete_experiment(path):
    header = path.read_text().partition("\nbase:")[0]
    for word in ("Source:", "Command:", "Hardware:", "Cost:", "Top-1:"):
        assert f"# {word}" in header, word


def test_sections_are_dataclasses():
    config = load_config(SHIPPED[0])
    assert all(is_dataclass(value) for value in vars(config).values())
