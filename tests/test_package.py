"""vitreuse as a package like any other: what it holds, what an index shows, and what empty environments do with it."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from html.parser import HTMLParser
from pathlib import Path

import pytest
from readme_renderer import markdown
from test_readme import read

import vitreuse
from vitreuse.__main__ import main
from vitreuse.files.networks import resolve_targets

ROOT = Path(__file__).resolve().parents[1]
PLAN = "exact-8*5 exact reuse*6"

FORWARD = f"""
import timm, torch, vitreuse
model = timm.create_model("vit_merge_tiny_patch16_224", plan="{PLAN}", num_classes=5).eval()
vitreuse.load_checkpoint(model, timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict())
assert model(torch.randn(2, 3, 224, 224)).shape == (2, 5) and str(model.plan) == "{PLAN}"
print(vitreuse.__file__)
"""

TYPED = """
import torch
import vitreuse

plan: vitreuse.Plan = vitreuse.parse_plan("(exact reuse*2)*4", 12)
model = vitreuse.create_model("vit_small_patch16_224", plan=plan)
macs: int = sum(vitreuse.count_macs(model).values())
report: vitreuse.LoadReport = vitreuse.load_checkpoint(model, {})
reveal_type(plan[0].word)
reveal_type(vitreuse.preset_plan("lazy", 12, 196))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, which is built from the sdist beside it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def run(*command, cwd):
    """What a process prints that sees none of this checkout's packages unless they are installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def read_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_library_alone(built):
    assert built[0].name.startswith(f"vitreuse-{vitreuse.__version__}-")
    held = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    library = [path for kind in ("*.py", "*.json", "py.typed") for path in (ROOT / "vitreuse").rglob(kind)]
    assert held == {path.relative_to(ROOT).as_posix() for path in library}


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    others = {name for name in held if not name.startswith("vitreuse/")}
    assert others == {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", ".gitignore"}
    assert {name for name in zipfile.ZipFile(built[0]).namelist() if name.startswith("vitreuse/")} == held - others


def test_an_index_is_told_who_where_and_for_what(built):
    metadata = read_metadata(built[0])
    assert metadata["Author"] and metadata["Keywords"] and metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    addresses = dict(pair.split(", ") for pair in metadata.get_all("Project-URL"))
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= {*addresses}
    assert all(address.startswith(addresses["Repository"]) for address in addresses.values())


class Links(HTMLParser):
    """Where the links and the pictures of a page lead."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        links = [value for name, value in attrs if name in ("href", "src", "srcset")]
        self.found += [link for link in links if not link.startswith("#user-content-")]  # a heading's own


def test_links_and_pictures_of_the_long_description_lead_out_of_it_to_what_exists(built):
    metadata = read_metadata(built[0])
    text = metadata.get_payload()
    links = Links(markdown.render(text, variant="GFM")).found
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "http://"))] == []
    assert "$HFPR" not in text
    repository = dict(pair.split(", ") for pair in metadata.get_all("Project-URL"))["Repository"]
    tag = f"/v{vitreuse.__version__}/"
    ours = [link.partition(tag)[2].partition("#")[0] for link in links if tag in link]
    assert {"LICENSE", "docs/training.md"} <= {*ours} and all((ROOT / path).exists() for path in ours)
    (name,) = {"/".join(link.split("/")[3:5]) for link in links if tag in link}
    assert repository.endswith(name) and f"git clone --branch v{vitreuse.__version__} {repository}" in text


def test_the_long_description_has_the_readme_s_code_and_pictures_as_they_are(built):
    text = read_metadata(built[0]).get_payload()
    for block in re.findall(r"^```.*?^```$", read("README.md"), flags=re.DOTALL | re.MULTILINE):
        assert block in text
    for picture in re.findall(r"!\[[^\]]*\]\((docs/[^)]*)\)|<img [^>]*src=\"(docs/[^\"]*)", read("README.md")):
        assert re.search(rf"https://raw\.[^)\"]*/v{re.escape(vitreuse.__version__)}/{''.join(picture)}", text)


@pytest.mark.parametrize("urls", [["Issues, https://a/issues", "Repository, https://a/b"], None, "not installed"])
def test_who_is_sent_to_the_checkout_is_told_how_to_get_it(urls, tmp_path, monkeypatch, capsys):
    class Metadata:
        def get_all(self, key):
            return urls

    def metadata(name):
        if urls == "not installed":
            raise importlib.metadata.PackageNotFoundError(name)
        return Metadata()

    monkeypatch.setattr("vitreuse.io.checkout.metadata", metadata)
    wanted = ", which the checkout alone has" + (": git clone https://a/b." if isinstance(urls, list) else ".")
    for word in ("train", "eval"):
        assert main([word, "configs/digits/lazy.yaml"]) == 2
        assert capsys.readouterr().err == f"vitreuse: {word} is no command but python -m {word}{wanted}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert f"by python -m train and python -m eval{wanted}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=re.escape(f"or python -m train{wanted}") + "$"):
        resolve_targets([str(tmp_path)])


def new_environment(folder, *requirements):
    """The interpreter of a fresh virtual environment with these installed, and an empty folder to work in."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", *requirements, cwd=folder)
    (folder / "empty").mkdir()
    return python, folder / "empty"


def check_installed(python, folder):
    """The library, timm's door and the command, as somebody has them who has only installed the package."""
    assert Path(run(python, "-c", FORWARD, cwd=folder).strip()).is_relative_to(python.parents[1])
    command = python.with_name("vitreuse")
    assert "vit_lazy_tiny_patch16_224" in run(command, "models", "*lazy_tiny*", cwd=folder)
    assert '"macs"' in run(command, "plan", PLAN, "--model", "vit_tiny_patch16_224", "--json", cwd=folder)
    refused = subprocess.run([command, "train", "x.yaml"], cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 2 and "git clone https://" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.proof
@pytest.mark.timeout(3600)  # torch and its libraries are unpacked
def test_the_wheel_serves_an_empty_environment(built, tmp_path):
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=tmp_path)
    python, folder = new_environment(tmp_path, built[0])
    check_installed(python, folder)
    run(python, "-W", "error", "-c", "import vitreuse", cwd=folder)
    (folder / "typed.py").write_text(TYPED)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "basic"}')
    said = run(sys.executable, "-m", "pyright", "--pythonpath", python, "typed.py", cwd=folder)
    assert 'Type of "plan[0].word" is "str"' in said
    assert 'Type of "vitreuse.preset_plan("lazy", 12, 196)" is "Plan"' in said


@pytest.mark.proof
@pytest.mark.timeout(3600)  # torch and its libraries are unpacked
def test_the_sdist_serves_the_oldest_versions_that_it_asks_for(built, tmp_path):
    needed = [text for text in read_metadata(built[0]).get_all("Requires-Dist") if "extra ==" not in text]
    floors = [re.sub(r"^([\w-]+).*>=([\w.]+).*$", r"\1==\2", text) for text in needed]
    assert len(floors) >= 10 and all("==" in floor for floor in floors)
    python, folder = new_environment(tmp_path, built[1], *floors)
    check_installed(python, folder)
