"""Random plans of every word and every part: against the naive reference, and the closed form against both counters."""

from dataclasses import replace

import pytest
import torch
from cases import NO_CLASS, Case, backends, image_size, images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_macs import by_module, of_modules

import vitreuse
from vitreuse.cost.counters import fvcore_macs, torch_flops
from vitreuse.plan import WORDS, Spec, parse_plan

NUM_HEADS = 5
GRIDS = ((3, 5), (2, 7), (5, 2))
PREFIXES = {  # by the keywords that make them
    "class token": {},
    "class token, average": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "registers alone": {**NO_CLASS, "reg_tokens": 3},
    "none": NO_CLASS,
}
NUMBERS = {  # of each word that takes one, and narrower than the grids and shorter than the tokens
    "reuse": st.none() | st.integers(0, NUM_HEADS),
    "lowrank": st.sampled_from([2, 3, 7]),
    "span": st.sampled_from([1, 3]),
}


@st.composite
def any_specs(draw) -> Spec:
    """A spec of any word with any parts, most of them within the rules of the word."""
    word = draw(st.sampled_from(WORDS))
    merged = draw(st.sampled_from([0, 0, 1, 2, 3, 5, 7]))
    hidden = draw(st.sampled_from([None, None, 0, 1, 7, 31]))
    return Spec(word, draw(NUMBERS.get(word, st.none())), merged, hidden)


def nearest(specs: list[Spec], spec: Spec, num_patches: int) -> Spec:
    """The spec, or what is left of it that can be the next layer after others."""
    bare = replace(spec, merged=0, hidden=None)
    tried = (spec, replace(spec, merged=0), replace(spec, hidden=None), bare, Spec("exact", None, 0, spec.hidden))
    return next(each for each in tried if is_plan([*specs, each], num_patches))


def is_plan(specs: list[Spec], num_patches: int) -> bool:
    """Whether specs are a plan for so many patches."""
    try:
        parse_plan(" ".join(map(str, specs)), num_heads=NUM_HEADS, num_patches=num_patches)
    except ValueError:
        return False
    return True


@st.composite
def any_cases(draw) -> tuple[Case, str]:
    """A plan of up to five layers on a grid, with prefix tokens, and a backend that makes a difference to it."""
    grid = draw(st.sampled_from(GRIDS))
    specs: list[Spec] = []
    for spec in draw(st.lists(any_specs(), min_size=1, max_size=5)):
        specs.append(nearest(specs, spec, grid[0] * grid[1]))
    prefix, distilled = draw(st.sampled_from([*((name, False) for name in PREFIXES), ("class token", True)]))
    case = Case(" ".join(map(str, specs)), grid, distilled, PREFIXES[prefix])
    return case, draw(st.sampled_from(backends(case)))


def assert_close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(any_cases())
def test_any_plan_is_the_function_of_the_reference(case_and_backend):
    case, backend = case_and_backend
    model, x = case.build(reuse_backend=backend), images(case.grid)
    reference = case.reference(model)
    tokens = torch.stack([reference.tokens(image) for image in x])
    logits = torch.stack([reference.head(image_tokens) for image_tokens in tokens])
    assert_close(model(x), logits)
    assert_close(model.forward_features(x), tokens)
    with torch.inference_mode():
        model.eval()
        assert_close(model.forward_features(x), tokens)


def assert_counts(case_and_backend):
    """The closed form of a random plan's model is what each counter finds, module by module."""
    case, backend = case_and_backend
    model = case.fresh(reuse_backend=backend, dtype=torch.float32).eval()
    image = torch.zeros(1, 3, *image_size(case.grid))
    expected = by_module(vitreuse.count_macs(model))
    assert of_modules(torch_flops(model, image), expected) == {part: 2 * macs for part, macs in expected.items()}
    assert of_modules(fvcore_macs(model, image), expected) == expected


@settings(max_examples=20)
@given(any_cases())
def test_the_closed_form_of_any_plan_equals_both_counters(case_and_backend):
    assert_counts(case_and_backend)


@pytest.mark.proof
@settings(max_examples=200)
@given(any_cases())
def test_the_closed_form_of_200_plans_equals_both_counters(case_and_backend):
    assert_counts(case_and_backend)


def test_random_plans_have_every_word_and_every_part():
    seen = set()

    @settings(max_examples=200)
    @given(any_cases())
    def look(case_and_backend):
        for spec in parse_plan(case_and_backend[0].plan):
            seen.add((spec.word, spec.number is not None, spec.merged > 0, spec.hidden is None))

    look()
    assert {word for word, *_ in seen} == set(WORDS)
    assert {(word, merges) for word, _, merges, _ in seen if merges} == {(w, True) for w in ("exact", "span", "reuse")}
    assert {word for word, *_, is_usual in seen if not is_usual} == set(WORDS) - {"linear", "skip"}
    assert {number for word, number, *_ in seen if word == "reuse"} == {True, False}
