import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreuse.plan import MAX_LAYERS, PRESETS, WORDS, Plan, Spec, parse_plan, preset_plan

EXACT, REUSE, NONE = Spec("exact"), Spec("reuse"), Spec("none")

valid_specs = st.one_of(
    st.sampled_from([EXACT, REUSE, NONE, Spec("reuse", 0), Spec("reuse", 3), Spec("lowrank", 64), Spec("span", 7)]),
    st.builds(Spec, st.just("reuse"), st.integers(0, 16)),
    st.builds(Spec, st.just("lowrank"), st.integers(1, 10**6)),
    st.builds(Spec, st.just("span"), st.integers(0, 9).map(lambda radius: 2 * radius + 1)),
)
# Few kinds of spec, so that runs and repeated groups are common; an anchor first makes every reuse legal.
plans = st.lists(valid_specs, min_size=1, max_size=4, unique=True).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), max_size=40).map(lambda specs: Plan((EXACT, *specs)))
)
# A spelling with the layers it means: the tests' own expansion, which knows nothing of the parser.
spellings = st.recursive(
    st.builds(lambda spec, count: (f"{spec}*{count}", [spec] * count), valid_specs, st.integers(1, 3))
    | valid_specs.map(lambda spec: (str(spec), [spec])),
    lambda parts: st.builds(
        lambda items, count: (
            f"({' '.join(text for text, _ in items)})*{count}",
            [s for _, ss in items for s in ss] * count,
        ),
        st.lists(parts, min_size=1, max_size=3),
        st.integers(1, 3),
    ),
    max_leaves=6,
).filter(lambda spelling: len(spelling[1]) < 100)
garbled_texts = st.lists(
    st.sampled_from(
        [*WORDS, "resue", "attn", ":", ":3", ":4", ":0", "*", "*2", "*0", "*999", "-", ",", "(", ")", " ", " "]
    ),
    max_size=24,
).map("".join)


def error_of(text: str, depth: int | None = None, num_heads: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        parse_plan(text, depth, num_heads)
    return str(caught.value)


def suggested_plan(message: str, text: str) -> str:
    kind, suggestion = re.findall(r" could (be|end in) '([^']*)'\.$", message)[0]
    return suggestion if kind == "be" else f"{text.rpartition(' ')[0]} {suggestion}"


@pytest.mark.parametrize(
    "text, specs",
    [
        ("exact", [EXACT]),
        ("exact reuse*2 none", [EXACT, REUSE, REUSE, NONE]),
        ("exact reuse:3*2", [EXACT, Spec("reuse", 3), Spec("reuse", 3)]),
        ("lowrank:64*2 span:7", [Spec("lowrank", 64), Spec("lowrank", 64), Spec("span", 7)]),
        ("(exact reuse)*2", [EXACT, REUSE, EXACT, REUSE]),
        ("((exact none)*2 exact)*2", [EXACT, NONE, EXACT, NONE, EXACT] * 2),
        ("exact (none) (none exact*2)", [EXACT, NONE, NONE, EXACT, EXACT]),
        (" ( exact\treuse ) * 2\n", [EXACT, REUSE, EXACT, REUSE]),
        ("exact *2 reuse* 3", [EXACT, EXACT, REUSE, REUSE, REUSE]),
        ("exact*01 lowrank:064*1", [EXACT, Spec("lowrank", 64)]),
        ("none", [NONE]),
    ],
)
def test_text_means_these_layers(text, specs):
    plan = parse_plan(text, depth=len(specs), num_heads=3)
    assert plan.specs == tuple(specs)
    assert list(plan) == specs
    assert len(plan) == len(specs)
    assert plan[0] == specs[0] and plan[-1] == specs[-1]


@pytest.mark.parametrize(
    "verbose, shortest",
    [
        ("exact reuse reuse reuse reuse reuse reuse exact*4 exact", "exact reuse*6 exact*5"),
        ("exact reuse*2 (exact reuse reuse)*3", "(exact reuse*2)*4"),
        ("(lowrank:64*2)*6", "lowrank:64*12"),
        ("(((exact reuse)*2))*3", "(exact reuse)*6"),
        ("exact reuse exact reuse exact", "(exact reuse)*2 exact"),
        ("exact*2 none exact exact none exact", "(exact*2 none)*2 exact"),
        ("(exact none)*2 span:3 (exact none)*2 span:3", "((exact none)*2 span:3)*2"),
        ("exact exact", "exact*2"),
        ("(exact*2 none)*2 (exact*3 none)*2 exact*2", "exact*2 none (exact*2 none exact)*3 exact"),  # fewer groups
    ],
)
def test_str_is_what_a_human_would_write(verbose, shortest):
    assert str(parse_plan(verbose)) == shortest


def every_text(length: int, words: tuple[str, ...]) -> list[str]:
    """All texts of `length` layers, but for the parentheses that nothing repeats."""
    items = {n: every_item(n, words) for n in range(1, length + 1)}
    texts = {0: [""]}
    for n in range(1, length + 1):
        texts[n] = [f"{item} {rest}".rstrip() for m in range(1, n + 1) for item in items[m] for rest in texts[n - m]]
    return texts[length]


def every_item(length: int, words: tuple[str, ...]) -> list[str]:
    runs = [word if length == 1 else f"{word}*{length}" for word in words]
    bodies = {n: every_text(n, words) for n in range(1, length) if length % n == 0}
    return runs + [f"({body})*{length // n}" for n in bodies for body in bodies[n]]


@pytest.mark.parametrize("words, max_layers", [(("none", "exact"), 8), (("none", "exact", "lowrank:16"), 6)])
def test_no_shorter_spelling_exists(words, max_layers):
    shortest: dict[Plan, int] = {}
    for text in itertools.chain.from_iterable(every_text(length, words) for length in range(1, max_layers + 1)):
        plan = parse_plan(text)
        shortest[plan] = min(len(text), shortest.get(plan, len(text)))
    assert len(shortest) == sum(len(words) ** length for length in range(1, max_layers + 1))
    for plan, length in shortest.items():
        assert len(str(plan)) == length, str(plan)


@given(plans)
def test_parse_and_str_are_inverse(plan):
    assert parse_plan(str(plan)) == plan
    assert str(parse_plan(str(plan))) == str(plan)


@settings(max_examples=200)
@given(spellings)
def test_any_nesting_expands_and_shortens(spelling):
    text, specs = spelling
    plan = parse_plan(f"exact {text}")
    assert plan.specs == (EXACT, *specs)
    assert len(str(plan)) <= len(f"exact {text}")


@pytest.mark.parametrize(
    "text", ["exact*48", "(exact reuse)*24", "(exact reuse*2)*16", "((exact reuse*3)*2 span:7*4)*4"]
)
def test_a_deep_plan_prints_fast(text):
    plan = parse_plan(text, depth=48)
    durations_ms = []
    for _ in range(3):
        start = time.process_time()
        assert str(plan) == text
        durations_ms.append(1e3 * (time.process_time() - start))
    assert min(durations_ms) < 50


ERRORS = [  # text, model, problem, way out
    # length
    ("exact reuse*6 exact*4", {"depth": 12}, "plan has 11 layers, the model has 12", "could end in 'exact*5'"),
    ("exact", {"depth": 12}, "plan has 1 layer, the model has 12", "could be 'exact*12'"),
    ("(exact reuse*2)*3", {"depth": 12}, "plan has 9 layers, the model has 12", "could be '(exact reuse*2)*4'"),
    ("(exact reuse*2)*5", {"depth": 13}, "plan has 15 layers, the model has 13", "could be '(exact reuse*2)*4 exact'"),
    ("(exact none)*2", {"depth": 13}, "plan has 4 layers, the model has 13", "could be '(exact none)*6 exact'"),
    # words and their numbers
    (
        "SPAN:3",
        {},
        "layer 0 is 'SPAN:3', but the words are exact, reuse, lowrank, span, none, linear, skip",
        "could be 'span:3'",
    ),
    (
        "exact resue*6 exact*5",
        {},
        "layer 1 is 'resue', but the words are exact, reuse, lowrank, span, none, linear, skip",
        "could be 'exact reuse*6 exact*5'",
    ),
    (
        "Lowrnk:8",
        {},
        "layer 0 is 'Lowrnk:8', but the words are exact, reuse, lowrank, span, none, linear, skip",
        "could be 'lowrank:8'",
    ),
    ("?? 42", {}, "'?' at character 1 belongs to no word, count or group", "could be 'exact'"),
    (
        "lowrank*12",
        {"depth": 12},
        "layer 0 is 'lowrank', but lowrank needs the number of tokens it keeps, 1 or more",
        "could be 'lowrank:64*12'",
    ),
    (
        "exact lowrank:0",
        {},
        "layer 1 is 'lowrank:0', but lowrank needs the number of tokens it keeps, 1 or more",
        "could end in 'lowrank:1'",
    ),
    ("span exact", {}, "layer 0 is 'span', but span needs a width, an odd number", "could be 'span:7 exact'"),
    (
        "(exact span:4)*6",
        {},
        "layer 1 is 'span:4', but span needs a width, an odd number",
        "could be '(exact span:5)*6'",
    ),
    ("span:0", {}, "layer 0 is 'span:0', but span needs a width, an odd number", "could be 'span:1'"),
    ("exact:3", {}, "layer 0 is 'exact:3', but exact takes no number", "could be 'exact'"),
    ("exact none:0", {}, "layer 1 is 'none:0', but none takes no number", "could end in 'none'"),
    (
        "lowrank:-3",
        {},
        "layer 0 is 'lowrank:-3', but after a colon comes a whole number of up to 9 digits",
        "could be 'lowrank:3'",
    ),
    (
        "exact reuse:",
        {},
        "layer 1 is 'reuse:', but after a colon comes a whole number of up to 9 digits",
        "could end in 'reuse'",
    ),
    (
        "lowrank:1234567890",
        {},
        "layer 0 is 'lowrank:1234567890', but after a colon comes a whole number of up to 9 digits",
        "could be 'lowrank:123456789'",
    ),
    # reuse
    ("reuse exact", {}, "layer 0 is 'reuse', but no layer before it has a map", "could be 'exact*2'"),
    (
        "none*2 reuse:2*3",
        {},
        "layer 2 is 'reuse:2', but no layer before it has a map",
        "could be 'none*2 exact reuse:2*2'",
    ),
    (
        "exact reuse:9*3",
        {"num_heads": 6},
        "layer 1 is 'reuse:9', but the model's number of heads is 6",
        "could end in 'reuse:6*3'",
    ),
    # text
    ("", {}, "plan is empty", "could be 'exact'"),
    (" \n", {"depth": 12}, "plan is empty", "could be 'exact*12'"),
    ("exact,reuse", {}, "',' at character 6 belongs to no word, count or group", "could be 'exact reuse'"),
    ("(exact reuse", {}, "'(' at character 1 is never closed", "could be 'exact reuse'"),
    ("exact reuse)*2", {}, "')' at character 12 closes no parenthesis", "could end in 'reuse*2'"),
    ("exact ()*2 none", {}, "'(' at character 7 opens an empty group", "could be 'exact*2 none'"),
    ("exact(none)", {}, "'(' at character 6 needs a space before it", "could be 'exact none'"),
    ("(exact)none", {}, "'n' at character 8 needs a space before it", "could be 'exact none'"),
    ("*2 exact", {}, "'*2' at character 1 follows nothing that it could repeat", "could be 'exact'"),
    ("(*2 exact)", {}, "'*2' at character 2 follows nothing that it could repeat", "could be 'exact'"),
    ("exact*2*3", {}, "'*3' at character 8 follows nothing that it could repeat", "could be 'exact*2'"),
    ("exact*0", {}, "'*0' at character 6 is no count, a whole number from 1 to 256", "could be 'exact'"),
    ("exact*-3", {}, "'*-3' at character 6 is no count, a whole number from 1 to 256", "could be 'exact*3'"),
    ("exact*", {}, "'*' at character 6 is no count, a whole number from 1 to 256", "could be 'exact'"),
    ("exact*1.5", {}, "'*1.5' at character 6 is no count, a whole number from 1 to 256", "could be 'exact'"),
    # size
    ("(((exact*99)*99)*99)", {}, "'*99' at character 13 makes more than 256 layers", "could be 'exact*198'"),
    ("none*7 exact*256", {}, "'*256' at character 13 makes more than 256 layers", "could end in 'exact*249'"),
    ("exact*256 none", {}, "plan has 257 layers, more than the 256 it can have", "could be 'exact*256'"),
]


@pytest.mark.parametrize("text, model, problem, way_out", ERRORS, ids=[repr(text) for text, *_ in ERRORS])
def test_error_names_position_rule_plan_and_way_out(text, model, problem, way_out):
    message = error_of(text, **model)
    assert message == f"{problem}: {text!r} {way_out}."
    assert parse_plan(suggested_plan(message, text), **model)


@settings(max_examples=500)
@given(garbled_texts, st.none() | st.integers(1, 20), st.none() | st.integers(1, 4))
def test_every_text_parses_or_gets_a_suggestion_that_does(text, depth, num_heads):
    try:
        plan = parse_plan(text, depth, num_heads)
    except ValueError as error:
        plan = parse_plan(suggested_plan(str(error), text), depth, num_heads)
        assert "\n" not in str(error)
    assert depth in (None, len(plan))
    assert parse_plan(str(plan), depth, num_heads) == plan


@pytest.mark.parametrize(
    "text",
    [
        "(((exact*999)*999)*999)",
        f"exact*{'9' * 5000}",
        f"lowrank:{'9' * 5000}",
        "(" * 5000,
        "(" * 5000 + "exact" + ")" * 5000 + "*999",
        "," * 5000,
        "exact " * 5000,
        " ".join(f"span:{2 * width}" for width in range(5000)),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_is_refused_at_once(text):
    start = time.process_time()
    message = error_of(text, depth=12)
    assert time.process_time() - start < 30  # what grows faster than the text takes hours
    assert len(message) < 1000
    assert len(parse_plan(suggested_plan(message, text), depth=12)) == 12


@pytest.mark.parametrize(
    "specs, message",
    [
        ((), "plan is empty: '' could be 'exact'."),
        ((REUSE, EXACT), "layer 0 is 'reuse', but no layer before it has a map: 'reuse exact' could be 'exact*2'."),
        (
            (EXACT, *[Spec("span", 4)] * 3),
            "layer 1 is 'span:4', but span needs a width, an odd number: 'exact span:4*3' could end in 'span:5*3'.",
        ),
        (
            (Spec("span", -3),),
            "layer 0 is 'span:-3', but numbers run from 0 to 999999999: 'span:-3' could be 'span:1'.",
        ),
        (
            (Spec("span", 10**9),),
            "layer 0 is 'span:1000000000', but numbers run from 0 to 999999999: "
            + "'span:1000000000' could be 'span:999999999'.",
        ),
        ((EXACT,) * 257, "plan has 257 layers, more than the 256 it can have: 'exact*257' could be 'exact*256'."),
    ],
    ids=["empty", "reuse first", "even width", "negative", "too large", "too long"],
)
def test_a_plan_checks_its_specs(specs, message):
    with pytest.raises(ValueError) as caught:
        Plan(specs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text, anchors, num_readers, num_maps",
    [
        ("exact reuse*2 exact", [None, 0, 0, None], [2, 1, 0, 0], 1),
        ("exact none reuse", [None, None, 0], [1, 1, 0], 1),
        ("none exact reuse none reuse none", [None, None, 1, None, 1, None], [0, 2, 1, 1, 0, 0], 1),
        ("exact lowrank:8 reuse:2 reuse", [None, None, 1, 1], [0, 2, 1, 0], 1),
        ("span:3 reuse exact none span:5 reuse:0", [None, 0, None, None, None, 4], [1, 0, 0, 0, 1, 0], 2),
        ("none", [None], [0], 0),
    ],
)
def test_anchors_and_readers(text, anchors, num_readers, num_maps):
    plan = parse_plan(text)
    assert plan.anchors == tuple(anchors)
    assert plan.num_readers == tuple(num_readers)
    assert plan.num_maps == num_maps


def test_a_span_repeats_the_width_of_the_newest_span_before_it():
    plan = parse_plan("span:3 exact span:3 reuse span:5 none span:3 lowrank:8 span:3")
    assert [layer for layer, repeats in enumerate(plan.repeats_span) if repeats] == [2, 8]


@given(plans)
def test_anchors_and_readers_follow_from_running_the_carry(plan):
    came_through: list[int] = []  # layers that the carry came through, the one that computed it first
    anchors: list[int | None] = []
    num_readers = [0] * len(plan)
    for layer, spec in enumerate(plan):
        anchors.append(came_through[0] if spec.word == "reuse" else None)
        if spec.word == "reuse":
            for earlier in came_through:
                num_readers[earlier] += 1
        came_through = [*came_through, layer] if spec.word in ("reuse", "none") else [layer]
    assert plan.anchors == tuple(anchors)
    assert plan.num_readers == tuple(num_readers)
    assert plan.num_maps == len({anchor for anchor in anchors if anchor is not None})


@pytest.mark.parametrize(
    "method, texts",
    [
        ("reuse", ["exact", "exact reuse", "exact reuse exact", "exact reuse*6 exact*5", "exact reuse*12 exact*11"]),
        ("lazy", ["exact", "exact reuse", "exact reuse*2", "(exact reuse*2)*4", "(exact reuse*2)*8"]),
        ("lowrank", ["lowrank:64", "lowrank:64*2", "lowrank:64*3", "lowrank:64*12", "lowrank:64*24"]),
        ("mixspan", ["span:7", "span:7*2", "span:7*2 exact", "(span:7*2 exact)*4", "(span:7*2 exact)*8"]),
        ("merge", ["exact-98", "exact-49*2", "exact-32*3", "exact-8*12", "exact-4*24"]),
    ],
)
def test_presets(method, texts):
    assert [str(preset_plan(method, depth)) for depth in (1, 2, 3, 12, 24)] == texts
    assert str(preset_plan("lazy", 7)) == "(exact reuse*2)*2 exact"
    assert str(preset_plan("merge", 12, num_patches=576)) == "exact-24*12"


@pytest.mark.parametrize("method", PRESETS)
def test_presets_exist_at_any_depth(method):
    for depth in [*range(1, 30), MAX_LAYERS]:
        assert len(preset_plan(method, depth)) == depth


def test_unknown_method_and_depth_without_a_plan():
    with pytest.raises(ValueError) as caught:
        preset_plan("lazzy", 12)
    methods = "reuse, lazy, lowrank, mixspan, merge"
    assert str(caught.value) == f"unknown method 'lazzy', the methods are {methods}: try 'lazy'."
    for make in (lambda depth: preset_plan("lazy", depth), lambda depth: parse_plan("exact", depth)):
        for depth in (0, 257):
            with pytest.raises(ValueError) as caught:
                make(depth)
            assert str(caught.value) == f"depth is {depth}, but a plan has 1 to 256 layers: give a depth in that range."
