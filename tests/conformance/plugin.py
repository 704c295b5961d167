"""Pytest plugin that runs timm's own tests on our models, with timm's plain ViTs beside them as the control.

timm's tests pick models by name and by the registry module that holds them: ours join the module of timm's ViT before
the tests are collected, and every other model is deselected. A test that has a plain ViT's name in its text runs again
with each of our variants answering to that name. The session fails unless ours pass wherever the plain model passes.

Left out, for both sides: weights to download, since none of ours are published, conversion to timm's NaFlexViT, and
TorchScript, which torch deprecates and in which a layer cannot return a carry.
"""
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
from timm.models import _registry as registry

from vitreuse.model.registry import plain_name

PLAIN_NAMES = {name: plain_name(name) for name in registry.list_models(module="registry")}
WRITTEN_OUT = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")  # names that timm's tests have in their text
DOWNLOADS = "test_model_load_pretrained"
TORCHSCRIPT = "torchscript"  # a part of the names of its tests
OTHER_CLASS = "naflex"  # a case that asks for timm's NaFlexViT asks for a class that has no plan

PLAIN_NAMES_OF_TEST = {  # on the meta device every size and resolution is cheap; pruning builds every depth
    "test_model_default_cfgs_non_std": re.compile(r".+"),
    "test_prune_intermediate_layers_contract": re.compile(r"(vit_tiny|deit_tiny|deit3_small)_.*patch16_224"),
}
PLAIN_NAMES_OF_OTHER_TESTS = re.compile(r".+_(tiny|small)_.*patch16_224")
MOST_DIFFERENCES = 40  # lines shown

Outcomes = dict[tuple[str, str], dict[str, str]]  # by test function and case, then by model


def pytest_configure(config: pytest.Config) -> None:
    registry._module_to_models["vision_transformer"].update(PLAIN_NAMES)
    for plain in PLAIN_NAMES.values():
        registry._model_with_tags[plain] = [plain]  # one config each: the others differ in their weights alone


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the parameter, where it is a name of ours, answer to the name of its plain model."""
    name = getattr(request, "param", None)
    if name in PLAIN_NAMES:
        monkeypatch.setitem(registry._model_entrypoints, PLAIN_NAMES[name], registry.model_entrypoint(name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] != "test_models":
        variants = [name for name, plain in PLAIN_NAMES.items() if plain in WRITTEN_OUT]
        metafunc.parametrize("stand_in", [*WRITTEN_OUT, *variants], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Keeps what is about our models or their plain ones, and notes on each item which case of which model it is."""
    kept, dropped = [], []
    for item in items:
        model = model_of(item)
        if model is None:
            dropped.append(item)
        else:
            case = item.name.replace(model, PLAIN_NAMES.get(model, model))
            item.user_properties.append(("case", (item.originalname, case, model)))
            kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def model_of(item: pytest.Function) -> str | None:
    """The model that an item is about, None where it is not to run."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "stand_in" in parameters:
        model = parameters["stand_in"]
        others = [str(value) for key, value in parameters.items() if key != "stand_in"]
        written = {*constants(item.function.__code__, item.module), *others}
        wanted = PLAIN_NAMES.get(model, model) in written and not is_of_other_class(item, parameters)
        return model if wanted else None
    model = parameters.get("model_name")
    plain = PLAIN_NAMES.get(model, model)
    if plain not in PLAIN_NAMES.values() or item.originalname == DOWNLOADS or TORCHSCRIPT in item.originalname:
        return None
    names = PLAIN_NAMES_OF_TEST.get(item.originalname, PLAIN_NAMES_OF_OTHER_TESTS)
    return model if names.fullmatch(plain) else None


def is_of_other_class(item: pytest.Function, parameters: dict[str, Any]) -> bool:
    """Whether a case converts the model to timm's NaFlexViT."""
    return OTHER_CLASS in item.originalname or any(OTHER_CLASS in key and parameters[key] for key in parameters)


def constants(code: CodeType, module: Any) -> Iterator[str]:
    """The strings in a function's text, and in that of the module's functions that it calls."""
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from constants(constant, module)
    for name in code.co_names:
        called = getattr(module, name, None)
        if isinstance(called, FunctionType) and called.__module__ == module.__name__ and called.__code__ is not code:
            yield from constants(called.__code__, module)


def outcomes_of(stats: dict[str, list[Any]]) -> Outcomes:
    """The outcome of every case that ran."""
    outcomes: Outcomes = defaultdict(dict)
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in stats.get(outcome, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == "case":
                    function, case, model = value
                    outcomes[function, case][model] = outcome
    return outcomes


def differences(outcomes: Outcomes) -> Iterator[str]:
    """One line per variant that did anything but pass a case which its plain model passed."""
    for (_, case), by_model in outcomes.items():
        for name, plain in PLAIN_NAMES.items():
            if by_model.get(plain) == "passed" and by_model.get(name) != "passed":
                yield f"{case}: {name} {by_model.get(name, 'did not run')}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    if not outcomes_of(reporter.stats) or any(differences(outcomes_of(reporter.stats))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts of every test function, timm's plain models beside ours."""
    outcomes = outcomes_of(terminalreporter.stats)
    counts: dict[str, list[Counter[str]]] = defaultdict(lambda: [Counter(), Counter()])
    for (function, _), by_model in outcomes.items():
        for model, outcome in by_model.items():
            counts[function][model in PLAIN_NAMES][outcome] += 1
    terminalreporter.section("timm's tests: passed / skipped / failed")
    width = max(map(len, counts), default=0) + 2
    terminalreporter.write_line(f"{'':{width}}{'timm':>14}{'vitreuse':>16}")
    for function in sorted(counts):
        plain, ours = (f"{c['passed']} / {c['skipped']} / {c['failed'] + c['error']}" for c in counts[function])
        terminalreporter.write_line(f"{function:{width}}{plain:>14}{ours:>16}")
    different = list(differences(outcomes))
    for line in different[:MOST_DIFFERENCES]:
        terminalreporter.write_line(f"differs from timm: {line}", red=True)
    terminalreporter.write_line(f"{len(different)} of our cases differ from timm's ViT.")
