"""Runs timm's own tests on our models: python tests/conformance [pytest arguments].

The tests are those of the installed timm; they ship in its source distribution, which is downloaded once into build/.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
TESTS = (
    "tests/test_models.py",
    "tests/test_model_input.py",
    "tests/test_task.py",
    "tests/test_utils.py",
    # the rest of this file is about where timm's published weights lie
    "tests/test_checkpoint_loading.py::test_native_checkpoint_file_adapts_head_for_custom_load_source",
    "tests/test_checkpoint_loading.py::test_explicit_custom_load_file_uses_model_loader",
)
LIMIT_S = "600"  # of one test; timm's own limits are for an idle machine


def fetch_tests(timm_version: str) -> Path:
    """The folder that holds timm's tests, without the library beside them: the installed one is tested.

    Raises:
        CalledProcessError: the source distribution cannot be downloaded.
    """
    name = f"timm-{timm_version}"
    folder = BUILD / f"{name}-tests"
    if folder.exists():
        return folder
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        subprocess.run([*pip, "--dest", scratch, f"timm=={timm_version}"], check=True)
        shutil.unpack_archive(Path(scratch) / f"{name}.tar.gz", scratch)
        kept = Path(scratch) / "kept"
        kept.mkdir()
        for part in ("tests", "pyproject.toml"):
            (Path(scratch) / name / part).rename(kept / part)
        kept.rename(folder)
    return folder


def main(arguments: list[str]) -> int:
    """Pytest's exit code; 2 when the tests cannot be had."""
    timm_version = version("timm")
    try:
        folder = fetch_tests(timm_version)
    except subprocess.CalledProcessError:
        print(f"timm {timm_version}'s sources cannot be downloaded: try again with a network.", file=sys.stderr)
        return 2
    pytest = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "plugin", "-c", "pyproject.toml"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "TIMEOUT": LIMIT_S}
    return subprocess.run([*pytest, *arguments, *TESTS], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
