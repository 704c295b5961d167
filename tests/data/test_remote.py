"""Shards behind URLs: the samples of local ones, each file fetched once and whole, and only where it is allowed."""

import json
import multiprocessing
import pickle
import resource
import shlex
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_split import CLASS_NAMES, SHARD_SIZES, encode, make_image, make_samples, read_all, write_split
from torch.utils.data import DataLoader

from eval.__main__ import main as evaluate
from train.__main__ import main as train
from vitreuse.config import ConfigError
from vitreuse.data import DataError, EncodedSample, open_split
from vitreuse.data.shards.index import Index, load_index, write_index

FILES = ["index.json", "index.npy", *(f"shard-{number:06d}.tar" for number in range(len(SHARD_SIZES)))]
CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {img_size: 8, patch_size: 4, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}
data: {root: ROOT, cache_root: CACHE, num_workers: 0, shuffle_window: 6}
train: {epochs: 2, global_batch_size: 4, device: cpu, optimizer: {name: sgd, lr: 1e-2}, ledger: true}
"""


class Server(ThreadingHTTPServer):
    """Serves a folder over http; counts what is asked for, and breaks off in the first answers."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: Counter[str] = Counter()
        self.num_broken = 0


class Handler(SimpleHTTPRequestHandler):
    server: Server

    @property
    def name(self) -> str:
        return Path(urlsplit(self.path).path).name

    def do_GET(self):
        self.server.asked[self.name] += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.server.asked[self.name] <= self.server.num_broken else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(split):
    with Server(split.parent) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def neither_pauses_nor_proxies(monkeypatch):
    monkeypatch.setattr("vitreuse.data.remote.PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")


def describe(samples):
    return [(sample.key, sample.label, np.asarray(sample.image).tolist()) for sample in samples]


def cat(root: Path) -> str:
    return f"pipe:cat {shlex.quote(str(root))}/{{}}"


def files(cache: Path) -> list[str]:
    """What is there of a split, whole; nothing may be there in part."""
    assert not [path for path in cache.rglob("*") if path.name.endswith((".tmp", ".fetching"))]
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


@pytest.mark.parametrize("kind", ["http", "http {}", "pipe"])
def test_samples_are_those_of_local_shards(split, server, tmp_path, kind):
    url = {"http": f"{server.url}/", "http {}": f"{server.url}/{{}}?token=x", "pipe": cat(split.parent)}[kind]
    remote = open_split(url, "train", cache_root=tmp_path / "cache", allow=[kind[:4]])
    local = open_split(split.parent, "train")
    assert files(tmp_path / "cache") == FILES[:2]  # the shards come when they are read
    assert remote.shard_sizes == local.shard_sizes and remote.class_names == CLASS_NAMES
    assert describe([remote[7]]) == describe([local[7]]) and files(tmp_path / "cache") == [*FILES[:2], FILES[4]]
    assert describe(read_all(remote)) == describe(read_all(local)) and files(tmp_path / "cache") == FILES


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    first, second = (open_split(server.url, "train", cache_root=tmp_path / "cache", allow=["http"]) for _ in range(2))
    assert describe(read_all(first)) == describe(read_all(second))
    assert server.asked == dict.fromkeys(FILES, 1)


def test_workers_fetch_for_each_other(split, tmp_path):
    log = tmp_path / "log"
    url = f"pipe:echo {{}} >> {log}; sleep 0.1; cat {split.parent}/{{}}"
    remote = open_split(url, "train", cache_root=tmp_path / "cache", allow=["pipe"])
    remote = pickle.loads(pickle.dumps(remote))  # as a spawned worker gets it
    loader = DataLoader(remote, 1, num_workers=2, collate_fn=describe, multiprocessing_context="fork")
    assert [sample for batch in loader for sample in batch] == describe(read_all(open_split(split.parent, "train")))
    assert sorted(log.read_text().splitlines()) == [f"train/{name}" for name in FILES]


def _read_after(barrier, url, cache):
    barrier.wait(timeout=300)
    assert len(read_all(open_split(url, "train", cache_root=cache, allow=["pipe"]))) == sum(SHARD_SIZES)


def test_processes_that_start_together_fetch_once(split, tmp_path):
    log = tmp_path / "log"
    url = f"pipe:echo {{}} >> {log}; sleep 0.1; cat {split.parent}/{{}}"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_read_after, args=(barrier, url, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().splitlines()) == [f"train/{name}" for name in FILES]
    assert files(tmp_path / "cache") == FILES


def test_threads_fetch_once(server, tmp_path):
    remote = open_split(server.url, "train", cache_root=tmp_path / "cache", allow=["http"])
    threads = [threading.Thread(target=read_all, args=(remote,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == dict.fromkeys(FILES, 1)


def test_broken_answers_are_asked_for_again(split, server, tmp_path):
    server.num_broken = 2
    remote = open_split(server.url, "train", cache_root=tmp_path / "cache", allow=["http"])
    assert describe(read_all(remote)) == describe(read_all(open_split(split.parent, "train")))
    assert server.asked == dict.fromkeys(FILES, 3)


def test_a_server_that_always_breaks_off_is_one_sentence(split, server, tmp_path):
    remote = open_split(server.url, "train", cache_root=tmp_path / "cache", allow=["http"])
    server.num_broken = 9
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be fetched \(exit 18\): see what `curl -fL http:"):
        remote[0]
    assert files(tmp_path / "cache") == FILES[:2]


def test_what_is_cut_off_unnoticed_is_refused(split, tmp_path):
    """A command may end well and give too little, or something else of the same size."""
    url = f"pipe:cat {split.parent}/{{}} | if test -e {tmp_path}/bad; then eval $(cat {tmp_path}/bad); else cat; fi"
    remote = open_split(url, "train", cache_root=tmp_path / "cache", allow=["pipe"])
    num_bytes = (split / FILES[2]).stat().st_size
    for command, reason in {
        "head -c 600": f"600 bytes, its index says {num_bytes}",
        "tr s t": "its SHA-256 is not what its index says",
    }.items():
        (tmp_path / "bad").write_text(command)
        with pytest.raises(DataError, match=rf"^pipe:cat .* cannot be fetched \({reason}\): see what `cat "):
            remote[0]
        assert files(tmp_path / "cache") == FILES[:2]
    (tmp_path / "bad").unlink()
    assert remote[0].key == "s000"


@pytest.mark.parametrize("name", FILES[:2])
def test_half_an_index_is_refused(split, tmp_path, name):
    whole = (split / name).read_bytes()
    (split / name).write_bytes(whole[:100])
    open_index = partial(open_split, cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])
    with pytest.raises(DataError, match=r"gives no whole index\.json and index\.npy: write them there again\.$"):
        open_index()
    assert files(tmp_path / "cache") == []
    (split / name).write_bytes(whole)
    assert len(open_index()) == sum(SHARD_SIZES)


def test_what_a_killed_process_left_is_cleared_up(split, tmp_path):
    remote = open_split(cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])
    left = remote.folder / f".{FILES[2]}.fetching"
    left.mkdir()
    (left / f".{FILES[2]}.99.tmp").write_bytes(b"half")
    (remote.folder / FILES[2]).write_bytes(b"cut off by hand")
    assert len(read_all(remote)) == sum(SHARD_SIZES) and files(tmp_path / "cache") == FILES


def test_a_missing_file_is_one_sentence_and_asked_for_once(server, tmp_path, capfd):
    with pytest.raises(DataError, match=r"/val/index\.json cannot be fetched \(exit 22\): see what `curl -fL [^\n]*$"):
        open_split(server.url, "val", cache_root=tmp_path / "cache", allow=["http"])
    assert files(tmp_path / "cache") == [] and capfd.readouterr() == ("", "")
    assert server.asked == {"index.json": 1}


def test_a_cache_that_cannot_be_written_is_one_sentence(split, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(DataError, match=r"train cannot be written \(Not a directory\): .* another data\.cache_root\.$"):
        open_split(cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])


def test_a_full_disk_is_one_sentence(split, tmp_path):
    remote = open_split(cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"train cannot be written \(File too large\)"):
            remote[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "cache") == FILES[:2] and remote[0].key == "s000"


def test_another_programs_index_is_named(split, tmp_path):
    (split / "index.json").write_text('{"version": 2, "shards": []}')
    (split / "index.npy").unlink()
    with pytest.raises(DataError, match=r"gives is an index of MosaicML's streaming .* and no index of vitreuse's"):
        open_split(cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["../../up.tar", "$(touch harmed).tar", ".hidden.tar", "-rf.tar", "a b.tar", ""])
def test_an_index_names_no_path_and_no_command(split, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    index = load_index(split)
    shards = (type(index.shards[0])(**{**vars(index.shards[0]), "name": name}), *index.shards[1:])
    write_index(Index(index.folder, index.class_names, shards, index.records))
    before = {*tmp_path.rglob("*")}
    with pytest.raises(DataError, match=r"names a shard .*: names of letters, digits and"):
        open_split(cat(split.parent), "train", cache_root=tmp_path / "cache", allow=["pipe"])
    assert files(tmp_path / "cache") == [] and {*tmp_path.rglob("*.tar"), *tmp_path.glob("harmed")} <= before


@pytest.mark.parametrize("allow", [[], ["https"], ["pipe", "https"]])
def test_other_kinds_stay_refused(server, tmp_path, allow):
    with pytest.raises(ConfigError, match="is a http: URL, which is fetched: add --allow http to the command line"):
        open_split(server.url, "train", cache_root=tmp_path / "cache", allow=allow)
    with pytest.raises(
        ConfigError, match="is a s3: URL, and only http, https, pipe can be allowed: give 'pipe:PROGRAM"
    ):
        open_split("s3://bucket/data", "train", cache_root=tmp_path / "cache", allow=allow)
    assert not server.asked and not (tmp_path / "cache").exists()


def test_a_command_needs_a_place_for_the_name(split, tmp_path):
    with pytest.raises(DataError, match=r"'pipe:cat data' has no \{\}: write it where the command takes a file"):
        open_split("pipe:cat data", "train", cache_root=tmp_path / "cache", allow=["pipe"])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A config whose data are behind a command, and what training on the same data as local ones left."""
    folder = tmp_path_factory.mktemp("experiment")
    for split, sizes in {"train": SHARD_SIZES, "val": [4, 3]}.items():
        samples = [
            EncodedSample(sample.key, encode(make_image(number).resize((8, 8))), "png", sample.label)
            for number, sample in enumerate(make_samples(sum(sizes)))
        ]
        write_split(folder / "data" / split, samples, sizes)
    root = cat(folder / "data")
    (folder / "x.yaml").write_text(CONFIG.replace("ROOT", f"'{root}'").replace("CACHE", str(folder / "cache")))
    assert train([str(folder / "x.yaml"), f"data.root={folder / 'data'}", f"run_dir={folder / 'local'}"]) == 0
    return folder


def test_training_and_evaluation_are_those_of_local_data(experiment, capsys):
    assert train([str(experiment / "x.yaml"), "--allow", "pipe", f"run_dir={experiment / 'remote'}"]) == 0
    local, remote = experiment / "local", experiment / "remote"
    assert (remote / "ledger.jsonl").read_bytes() == (local / "ledger.jsonl").read_bytes()
    weights, others = (load_file(folder / "model.safetensors") for folder in (local, remote))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    records = [json.loads((folder / "run.json").read_text()) for folder in (local, remote)]
    assert records[0]["inputs"] == records[1]["inputs"] and "--allow pipe" in records[1]["command"]
    assert json.loads((remote / "card.json").read_text())["data"] == f"pipe:cat {experiment}/data/val"
    assert len([name for name in files(experiment / "cache") if name.endswith(".tar")]) == 5
    capsys.readouterr()
    rows = []
    for arguments in ([str(local)], [str(remote), "--allow", "pipe"]):
        assert evaluate(["top1", *arguments, "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"][0])
    assert rows[0]["data"] == str(experiment / "data" / "val") and rows[1]["data"] == cat(experiment / "data")
    assert [rows[0][key] for key in ("n", "top1", "top5")] == [rows[1][key] for key in ("n", "top1", "top5")]


@pytest.mark.parametrize("allow", [[], ["--allow", "https"]])
@pytest.mark.parametrize("option", [[], ["--doctor"], ["data.root=pipe:touch harmed {}"]])
def test_a_config_allows_nothing(experiment, tmp_path, monkeypatch, capsys, option, allow):
    monkeypatch.chdir(tmp_path)
    assert train([str(experiment / "x.yaml"), *option, *allow, "data.cache_root=cache"]) == 2
    said = capsys.readouterr().err
    way_out = "--allow https has no effect" if allow else "a pipe: URL, which runs a shell command: add --allow pipe"
    assert said.startswith("train: ") and said.count("\n") == 1 and way_out in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["{x}"], ["{local}", "--data", "pipe:touch harmed {{}}"]])
def test_evaluation_needs_the_command_line_too(experiment, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(x=experiment / "x.yaml", local=experiment / "local") for text in arguments]
    assert evaluate(["top1", *arguments, "--checkpoint", str(experiment / "local" / "model.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "which runs a shell command: add --allow pipe to the command line" in said
    assert list(tmp_path.iterdir()) == []
