"""URLs where a path is expected: refused in one sentence, and nothing is fetched or run."""

import pytest

from eval.__main__ import main as eval_main
from train.__main__ import main as train_main
from vitreuse.__main__ import main
from vitreuse.config import ConfigError
from vitreuse.io.urls import refuse_url, url_kind

CONFIG = """
model: {name: vit_reuse_tiny_patch16_224}
data: {root: data}
train: {epochs: 1, global_batch_size: 8, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def harmful(tmp_path, monkeypatch) -> str:
    """A URL by which a shell would leave a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(CONFIG)
    return "pipe:touch harmed"


@pytest.mark.parametrize(
    "url", ["pipe:cat a.tar", "PIPE:ls", "https://a.b/c.tar", "s3://bucket", "file:///a", "gs://a"]
)
def test_urls_are_no_paths(url):
    with pytest.raises(ConfigError, match=r"^root .* URL: fetch what it stands for and give its local path\.$"):
        refuse_url("root", url)


@pytest.mark.parametrize("path", [None, "data", "/data/pipe:", "a:b", "../http/x", "vit_small_patch16_224.augreg_in1k"])
def test_paths_and_names_are_no_urls(path):
    refuse_url("root", path)
    assert url_kind(path) is None


TEACHER = "train.distill={{kind: hard, teacher: {{name: deit_tiny_patch16_224, weights: '{}'}}}}"


@pytest.mark.parametrize("setting", ["data.root={}", "data.source_root={}", "model.weights={}", "run_dir={}", TEACHER])
def test_training_takes_no_url(harmful, tmp_path, capsys, setting):
    assert train_main(["x.yaml", setting.format(harmful)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("train: ") and told.count("\n") == 1 and f"{harmful!r} is a pipe: URL" in told
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards", "build", "{}", "folder"],
        ["shards", "build", "folder", "{}"],
        ["shards", "digits", "{}"],
        ["shards", "index", "{}"],
        ["shards", "verify", "{}"],
        ["shards", "info", "{}"],
        ["tune", "--output", "{}"],
        ["top1", "deit_tiny_patch16_224", "--checkpoint", "{}"],
    ],
)
def test_commands_take_no_url(harmful, tmp_path, capsys, arguments):
    command = eval_main if arguments[0] == "top1" else main
    with pytest.raises(SystemExit) as ended:
        command([argument.format(harmful) for argument in arguments])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and f"{harmful!r} is a pipe: URL" in told
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
