"""Arrows between packages point one way, and importing the library is cheap and silent."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitreuse

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"vitreuse": set(), "eval": {"vitreuse"}, "train": {"vitreuse", "eval"}}  # of our packages, beside itself
# Of the packages of vitreuse, what each stands on beside itself; io lies under all.
LAYERS = (("io",), ("plan",), ("attention",), ("model",), ("cost", "data", "config"))
LAYERS += (("compress", "files"), ("verbs",), ("cli",))
MIRRORED = ("__init__", "forward_intermediates")  # whose arguments are those of timm's
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 13, 350, 45, 9
DEPENDENCIES = {"torch", "torchvision", "timm", "fvcore", "webdataset", "yaml", "rich", "safetensors", "numpy", "PIL"}

# A collection of the garbage of torch and timm, 0.3 seconds long, falls inside the import or behind it by chance.
IMPORT_VITREUSE = """
import gc, json, time
import timm, torch
num_modules = 0
build = torch.nn.Module.__init__
def counted(self, *args, **kwargs):
    global num_modules
    num_modules += 1
    build(self, *args, **kwargs)
torch.nn.Module.__init__ = counted
threads = torch.get_num_threads(), torch.get_num_interop_threads()
gc.disable()
start = time.process_time()
import vitreuse
seconds = time.process_time() - start
assert threads == (torch.get_num_threads(), torch.get_num_interop_threads())
print(json.dumps({"seconds": seconds, "num_modules": num_modules, "num_names": len(timm.list_models("*_reuse_*"))}))
"""
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def imported_packages(source: str) -> Iterator[str]:
    """Top-level packages of every absolute import, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_imports_inside_functions_are_seen():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    from i import j\n"
    assert list(imported_packages(source)) == ["a", "c", "d", "i"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[package] - {package}
    backwards = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in files
        if (names := forbidden & set(imported_packages(path.read_text(encoding="utf-8"))))
    }
    assert backwards == {}


def imported_modules(source: str) -> Iterator[str]:
    """The module of every absolute import, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_packages_of_the_library_stand_on_those_below_them():
    packages = {path.name for path in (ROOT / "vitreuse").iterdir() if (path / "__init__.py").exists()}
    assert packages == {package for layer in LAYERS for package in layer}
    height = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    arrows = {
        (package, module.split(".")[1])
        for package in packages
        for path in (ROOT / "vitreuse" / package).rglob("*.py")
        for module in imported_modules(path.read_text(encoding="utf-8"))
        if module.startswith("vitreuse.") and module.split(".")[1] in height
    }
    assert {arrow for arrow in arrows if height[arrow[0]] < height[arrow[1]]} == set()
    level = {arrow for arrow in arrows if arrow[0] != arrow[1] and height[arrow[0]] == height[arrow[1]]}
    assert level == {("config", "data"), ("files", "compress")}  # and none back


def test_the_library_is_flat_nowhere_and_crowded_nowhere():
    assert {path.name for path in (ROOT / "vitreuse").glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = [path.parent for path in (ROOT / "vitreuse").rglob("__init__.py")]
    crowded = {str(folder): len(files) for folder in folders if len(files := [*folder.glob("*.*")]) > MAX_FILES}
    assert crowded == {}


def test_files_functions_and_calls_can_be_read_in_one_sitting():
    too_long = []
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            too_long += [str(path)] * (source.count("\n") > MAX_LINES)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    num_lines = (node.end_lineno or 0) - node.lineno + 1
                    names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    num_arguments = sum(argument.arg not in ("self", "cls") for argument in names)
                    if num_lines > MAX_FUNCTION_LINES or (num_arguments > MAX_ARGUMENTS and node.name not in MIRRORED):
                        too_long.append(f"{path.name}: {node.name}, {num_lines} lines, {num_arguments} arguments")
    assert too_long == []


def test_the_library_needs_only_its_dependencies_until_a_function_asks_for_more():
    foreign = set()
    for path in (ROOT / "vitreuse").rglob("*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        at_import = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        foreign |= set(imported_packages(ast.unparse(ast.Module(at_import, []))))
    assert foreign - sys.stdlib_module_names - {"vitreuse"} <= DEPENDENCIES


def run(source: str) -> str:
    """What a process of its own prints, in which every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", source]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_importing_vitreuse_is_cheap_and_builds_no_model_warns_of_nothing_and_leaves_the_threads():
    measured = json.loads(run(IMPORT_VITREUSE))
    assert measured["num_modules"] == 0
    assert measured["num_names"] > 0
    assert measured["seconds"] < 0.3


@pytest.mark.proof
def test_importing_vitreuse_takes_little_longer_than_importing_timm():
    seconds = {name: [] for name in ("timm", "vitreuse")}
    for _ in range(5):  # in turns, and the least of each: the machine may be busy
        for name, taken in seconds.items():
            taken.append(float(run(IMPORT.format(name))))
    assert min(seconds["vitreuse"]) < min(seconds["timm"]) + 0.3


def test_every_public_name_is_found():
    """Those that are found late, too; whatever else is asked for is missing."""
    assert sorted(set(vitreuse.__all__)) == sorted(vitreuse.__all__)
    assert set(vitreuse._LATER) <= set(vitreuse.__all__)
    assert all(getattr(vitreuse, name) is not None for name in vitreuse.__all__)
    assert not hasattr(vitreuse, "serach")
