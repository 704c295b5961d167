"""Run cards: what a training leaves, what comes back from the file, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.card import Card, is_of, make_card, read_card, recipe_of
from eval.predictions import Predictions, answers
from vitreuse.config import load_config

LAZY = "configs/digits/lazy.yaml"


def predictions(num_images: int) -> Predictions:
    logits = torch.eye(10)[torch.arange(num_images) % 10]
    labels = torch.arange(num_images) % 7
    return Predictions.of([answers(logits, labels, [str(number) for number in range(num_images)])])


def a_card(*overrides: str, name: str = "lazy-seed3", num_images: int = 71) -> Card:
    config = load_config(LAZY, overrides)
    return make_card(name, config.model, "digits/val", predictions(num_images), {"seconds": 1.5}, config)


def test_a_card_comes_back_from_its_file(tmp_path):
    made = a_card()
    made.write(tmp_path / "card.json")
    found = read_card(tmp_path / "card.json")
    assert found == Card(**json.loads(json.dumps(vars(made))))
    assert np.array_equal(found.correct_images(), np.arange(71) % 10 == np.arange(71) % 7)
    assert found.top1 == 100 * found.correct_images().sum() / 71


def test_a_card_is_of_its_experiment_alone():
    card = a_card("train.seed=3")
    assert is_of(card, load_config(LAZY, ["train.seed=3", "data.num_workers=2"]))
    for other in ("train.seed=4", "train.epochs=9", "model.plan=exact*6", "train.clip.limit=1"):
        assert not is_of(card, load_config(LAZY, ["train.seed=3", other]))


def test_settings_that_a_card_could_not_know_are_null():
    card = a_card("train.seed=3")
    older = replace(card, recipe={key: value for key, value in (card.recipe or {}).items() if key != "train.clip"})
    assert older.recipe != card.recipe
    assert older.experiment == card.experiment
    assert is_of(older, load_config(LAZY, ["train.seed=3"]))


def test_what_older_cards_say_of_memory_is_no_part_of_a_recipe(tmp_path):
    card = a_card("train.seed=3", "train.accumulation_steps=4")
    older = replace(card, recipe={**(card.recipe or {}), "train.accumulation_steps": 1, "train.max_skipped_steps": 5})
    older.write(tmp_path / "card.json")
    assert read_card(tmp_path / "card.json").experiment == card.experiment
    assert is_of(read_card(tmp_path / "card.json"), load_config(LAZY, ["train.seed=3"]))


def test_a_card_builds_its_model_again():
    found = a_card()
    model = found.model_config().create("meta")
    assert (str(model.plan), found.plan) == ("(exact reuse*2)*2", "(exact reuse*2)*2")
    assert found.params == sum(parameter.numel() for parameter in model.parameters())


def test_the_preset_is_written_out():
    assert a_card("model.name=vit_lazy_tiny_patch16_224", "model.plan=null").plan == "(exact reuse*2)*2"


@pytest.mark.parametrize(("name", "seed", "found"), [("lazy-seed3", 3, "lazy"), ("lazy-seed3", 4, "lazy-seed3")])
def test_the_name_goes_without_the_seed(name, seed, found):
    assert a_card(f"train.seed={seed}", name=name).name == found


def test_the_recipe_is_what_gives_another_model():
    recipe = recipe_of(load_config(LAZY))
    for same in ("train.seed=9", "data.num_workers=2", "model.plan=exact*6", "train.log_every_steps=3"):
        assert recipe_of(load_config(LAZY, [same])) == recipe
    for other in ("train.epochs=9", "train.optimizer.lr=1", "eval.crop_pct=0.9", "model.pos_embed=sincos2d"):
        assert recipe_of(load_config(LAZY, [other])) != recipe


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "lazy"}', "\x00"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match="is no run card: give one that python -m train or eval top1 wrote"):
        read_card(tmp_path / "card.json")


@pytest.mark.parametrize("is_correct", ["eJxjY", "", "eJwDAAAAAAE=", 7])
def test_a_damaged_card_is_refused(tmp_path, is_correct):
    replace(a_card(), is_correct=is_correct).write(tmp_path / "card.json")
    with pytest.raises(ValueError, match=r"is a damaged run card .*: write it again"):
        read_card(tmp_path / "card.json")


def test_what_was_trained_less_or_counted_otherwise_is_another_experiment():
    card = a_card()
    assert card.counted is None
    for facts in ({"training": "the run is not completed"}, {"set": "ImageNet-A, among its 200 classes"}):
        assert replace(card, facts=facts).experiment != card.experiment
    for title in ("ImageNet", "ImageNet (part)"):
        assert replace(card, facts={"set": title}).experiment == card.experiment


def test_a_card_of_another_version_is_refused(tmp_path):
    (tmp_path / "card.json").write_text('{"card": 2}')
    with pytest.raises(ValueError, match="is a card of version 2, this code reads version 1"):
        read_card(tmp_path / "card.json")


def test_runs_of_one_experiment_may_have_other_names():
    assert a_card(name="a1").experiment == a_card("train.seed=7", name="a2").experiment
    assert a_card(name="a1").experiment != a_card("train.epochs=9", name="a1").experiment
