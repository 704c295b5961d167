"""Reading samples: what comes out, from which process, in which order, and what is said of damaged ones."""

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_split import CLASS_NAMES, SHARD_SIZES, encode, make_image, make_samples, read_all, write_split
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from vitreuse.data import (
    DataError,
    DecodeError,
    EncodedSample,
    FolderDataset,
    ShardDataset,
    build_index,
    decode_image,
    decode_tensor,
    load_index,
    open_images,
    open_split,
    write_shard,
)

NUM_SAMPLES = sum(SHARD_SIZES)


def pixels(image):
    return np.asarray(image).tolist()


def describe(samples):
    """Collates a batch into something two processes can hand over and a test can compare."""
    return [(sample.key, sample.label, sample.image.mode, pixels(sample.image)) for sample in samples]


def expected(number):
    return (f"s{number:03d}", number % len(CLASS_NAMES), "RGB", pixels(make_image(number)))


@pytest.fixture
def class_folders(tmp_path):
    """The images of the shards as ROOT/train/CLASS/sNNN.png, some of them deeper, one with a capital ending."""
    folder = tmp_path / "folders" / "train"
    for sample in make_samples(NUM_SAMPLES):
        path = folder / CLASS_NAMES[sample.label] / f"{sample.key}.png"
        path = path.parent / "deeper" / path.name if sample.key == "s003" else path
        path = path.with_suffix(".PNG") if sample.key == "s004" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    return folder


def test_shards_give_what_was_written(split):
    dataset = open_split(split.parent, "train")
    assert isinstance(dataset, ShardDataset) and len(dataset) == NUM_SAMPLES
    assert dataset.shard_sizes == SHARD_SIZES and dataset.class_names == CLASS_NAMES
    assert describe(read_all(dataset)) == [expected(number) for number in range(NUM_SAMPLES)]
    assert dataset[np.int64(-1)].key == "s012"
    with pytest.raises(IndexError):
        dataset[NUM_SAMPLES]


def test_folders_give_what_torchvision_gives(class_folders):
    reference = ImageFolder(str(class_folders))
    dataset = open_split(class_folders.parent, "train")
    assert isinstance(dataset, FolderDataset) and dataset.shard_sizes == [NUM_SAMPLES] == [len(reference)]
    assert list(dataset.class_names) == reference.classes
    for number, (path, label) in enumerate(reference.samples):
        sample = dataset[number]
        assert pixels(sample.image) == pixels(reference[number][0]) and sample.label == label
        assert str(class_folders / sample.key) == path


def test_hidden_folders_and_files_are_no_classes_and_no_images(class_folders):
    before = [sample.key for sample in read_all(FolderDataset(class_folders))]
    (class_folders / ".ipynb_checkpoints").mkdir()
    (class_folders / ".ipynb_checkpoints" / "a.png").write_bytes(encode(make_image(0)))
    (class_folders / "cat" / "._s000.png").write_bytes(b"resource fork")
    (class_folders / "cat" / "notes.txt").write_text("no image")
    assert [sample.key for sample in read_all(FolderDataset(class_folders))] == before


@pytest.mark.parametrize(
    ("kind", "context", "num_workers"), [("split", "fork", 2), ("class_folders", "fork", 2), ("split", "spawn", 1)]
)
def test_samples_are_the_same_in_forked_and_spawned_workers(kind, context, num_workers, request):
    dataset = open_split(request.getfixturevalue(kind).parent, "train")
    alone = describe(read_all(dataset))
    loader = DataLoader(
        dataset, batch_size=4, num_workers=num_workers, collate_fn=describe, multiprocessing_context=context
    )
    assert list(chain(*loader)) == alone


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("shard_sizes", [[5, 1, 7], [13], [1, 2]])
def test_ranks_and_workers_share_an_epoch_exactly(tmp_path, num_workers, num_ranks, shard_sizes):
    """Each rank reads its stride of one permutation, in that order, whatever the workers; together each sample once."""
    count = sum(shard_sizes)
    write_split(tmp_path / "train", make_samples(count), shard_sizes)
    dataset = open_split(tmp_path, "train")
    order = np.random.default_rng(0).permutation(count).tolist()
    seen = []
    for rank in range(num_ranks):
        numbers = order[rank::num_ranks]
        loader = DataLoader(dataset, batch_size=2, sampler=numbers, num_workers=num_workers, collate_fn=describe)
        read = list(chain(*loader))
        assert read == [expected(number) for number in numbers]
        seen += read
    assert sorted(seen) == [expected(number) for number in range(count)]


def test_a_pickled_data_set_is_a_path(split):
    dataset = ShardDataset(split, mode="L")
    assert dataset[3] is not None
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert describe([pickle.loads(data)[3]]) == describe([dataset[3]])


def count_open_files():
    return len(os.listdir("/dev/fd"))


def test_open_files_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("vitreuse.data.datasets.max_open_files", lambda: 12)  # a quarter
    write_split(tmp_path / "train", make_samples(7), [1] * 7)
    before = count_open_files()
    dataset = ShardDataset(tmp_path / "train")
    records = 1  # the mapped records hold one
    assert count_open_files() == before + records
    assert len(read_all(dataset)) == 7 and count_open_files() == before + records + 3
    dataset.close()
    assert count_open_files() == before + records
    assert describe([dataset[5]]) == [expected(5)] and count_open_files() == before + records + 1
    del dataset
    assert count_open_files() == before


def test_training_holds_as_many_files_open_as_the_system_grants():
    """By default a system grants 1,024, and ImageNet has more shards, between which an epoch goes back and forth."""
    program = """
import os, resource
from vitreuse.io.process import allow_open_files, max_open_files
for soft, hard, wanted in ((256, 999, 5000), (256, 999, 700), (99, 99, 5)):
    if not os.fork():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        allow_open_files(wanted)
        print(max_open_files(), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"999", b"700", b"99"]


def test_threads_may_share_a_data_set(tmp_path, monkeypatch):
    """Two open shards for four threads: a shard that is evicted while it is read must stay readable."""
    monkeypatch.setattr("vitreuse.data.datasets.max_open_files", lambda: 8)
    write_split(tmp_path / "train", make_samples(7), [1] * 7)
    dataset = ShardDataset(tmp_path / "train")
    numbers = np.random.default_rng(0).integers(7, size=400).tolist()
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4, initializer=barrier.wait) as pool:
        keys = list(pool.map(lambda number: dataset[number].key, numbers))
    assert keys == [f"s{number:03d}" for number in numbers]


def read_error(dataset, number, num_workers, error_type):
    loader = DataLoader(dataset, sampler=[number], num_workers=num_workers, collate_fn=describe)
    with pytest.raises(error_type) as error:
        list(loader)
    text = str(error.value)
    # An iterator that dies in a reference cycle, here through the traceback, waits 5 s for its workers.
    error.value.__traceback__ = None
    del error
    return text


def flip_byte(path, record):
    raw = bytearray(path.read_bytes())
    raw[record.offset + 20] ^= 1
    path.write_bytes(raw)


def cut_shard(path, record):
    os.truncate(path, record.offset + record.size - 1)


def remove_shard(path, record):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "error_type", "reason"),
    [
        (flip_byte, DecodeError, "is not what was indexed: vitreuse shards verify "),
        (cut_shard, DecodeError, "is not what was indexed: vitreuse shards verify "),
        (remove_shard, DataError, "cannot be read (No such file or directory): fetch the shard again."),
    ],
)
def test_damage_after_opening_is_one_sentence_from_any_worker(split, damage, error_type, reason):
    dataset = ShardDataset(split)
    path, record = load_index(split).locate(8)
    damage(path, record)
    sentences = {read_error(dataset, 8, num_workers, error_type) for num_workers in (0, 1)}
    assert len(sentences) == 1
    assert sentences.pop().startswith(f"sample 's008' of shard {path} {reason}")
    assert describe([dataset[5]]) == [expected(5)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no known image format"),
        (b"no image", "has no known image format"),
        (encode(make_image(0))[:-30], "is no whole image ("),
        (encode(make_image(0), "JPEG")[:-60], "is no whole image (image file is truncated"),
    ],
)
def test_undecodable_images_are_named(tmp_path, content, reason):
    good, bad = make_samples(2)
    write_shard([good, bad._replace(image=content)], tmp_path / "a.tar")
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert describe([dataset[0]]) == [expected(0)]
    sentences = {read_error(dataset, 1, num_workers, DecodeError) for num_workers in (0, 1)}
    assert len(sentences) == 1
    sentence = sentences.pop()
    assert sentence.startswith(f"sample 's001' of shard {tmp_path / 'a.tar'} {reason}")
    assert sentence.endswith(": write it again or leave it out.")


def test_undecodable_and_missing_files_of_a_folder_are_named(class_folders):
    dataset = FolderDataset(class_folders)
    (class_folders / "cat" / "s000.png").write_bytes(b"no image")
    assert read_error(dataset, 0, 1, DecodeError).startswith(f"image {class_folders}/cat/s000.png has no known image")
    (class_folders / "cat" / "s000.png").unlink()
    assert read_error(dataset, 0, 1, DataError).startswith(f"image {class_folders}/cat/s000.png cannot be read (")


def encode_grey_16_bit(values):
    """A 16-bit grey PNG written byte by byte, so that PIL's own writer is not its reference."""
    rows = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in values)
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def palette_with_transparency():
    image = make_image(3).quantize(8)
    content = io.BytesIO()
    image.save(content, "PNG", transparency=bytes(range(8)))
    return content.getvalue(), pixels(image.convert("RGB"))


PALETTE, PALETTE_RGB = palette_with_transparency()
RAMP = np.linspace(0, 1, 13, dtype=np.float32).reshape(1, 13)
BYTES = np.rint(RAMP * 255).astype(int).tolist()


def encode_tiff(values, bits, sample_format=1, photometric=1):
    """A grey TIFF written tag by tag: PIL does not write most of these kinds, and reads some of them as another."""
    data = values if isinstance(values, bytes) else values.tobytes()
    num_columns = len(data) * 8 // bits
    tags = {256: num_columns, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, number) for tag, number in {**tags, 339: sample_format}.items()]
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def encode_12_bits(values):
    """Two numbers in three bytes."""
    bits = "".join(f"{value:012b}" for value in values)
    return encode_tiff(int(bits, 2).to_bytes(len(bits) // 8, "big"), 12)


def encode_pgm(white):
    return b"P5\n13 1\n%d\n" % white + np.rint(RAMP * white).astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (encode_tiff(RAMP, 32, 3), BYTES),
        (encode_tiff(RAMP * 1.0005 - 0.0002, 32, 3), BYTES),
        (encode_tiff(RAMP * 255, 32, 3), BYTES),
        (encode_tiff(RAMP, 32, 3, photometric=0), [[255 - value for value in BYTES[0]]]),
        (encode_tiff(RAMP * 0, 32, 3), [[0] * 13]),
        (b"Pf\n13 1\n-1.0\n" + RAMP.tobytes(), BYTES),
        (encode_tiff(np.rint(RAMP * 255).astype("<i4"), 32, 2), BYTES),
        (encode_tiff(np.rint(RAMP * 255).astype("<u4"), 32), BYTES),
        (encode_tiff((RAMP > 0.5).astype("<u4"), 32), [[0] * 7 + [1] * 6]),
        (encode_tiff(np.rint(RAMP * 255).astype("<i2"), 16, 2), BYTES),
        (encode_tiff(np.rint(RAMP * 65535).astype("<u2"), 16), BYTES),
        (encode_tiff(np.rint(RAMP * 65535).astype("<u2"), 16, photometric=0), [[255 - value for value in BYTES[0]]]),
        (encode_12_bits([0, 2048, 4095, 15]), [[0, 128, 255, 1]]),
        (encode_pgm(65535), BYTES),
        (encode_pgm(4095), BYTES),
    ],
    ids=[
        *("float", "float-overshoot", "float-255", "float-white-is-0", "float-black", "float-pfm"),
        *("signed-32", "unsigned-32", "unsigned-32-dark", "signed-16", "16", "16-white-is-0", "12", "pgm-16", "pgm-12"),
    ],
)
def test_grey_of_more_than_eight_bits_keeps_its_white(content, values):
    assert np.abs(np.subtract(pixels(decode_image(content, "L", "image x")), values)).max() <= 1
    assert torch.equal(decode_tensor(content, "RGB", "x"), pil_to_tensor(decode_image(content, "RGB", "x")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode_tiff(np.where(RAMP > 0.5, np.nan, RAMP).astype("<f4"), 32, 3), "has NaN or infinity"),
        (encode_tiff(np.where(RAMP > 0.5, np.inf, RAMP).astype("<f4"), 32, 3), "has NaN or infinity"),
        (encode_tiff(RAMP * 2 - 1, 32, 3), "has floats from -1 to 1, of which it is not certain what is white"),
        (encode_tiff(RAMP * np.float32(1.5), 32, 3), "has floats from 0 to 1.5"),
        (encode_tiff(RAMP * np.float32(65535), 32, 3), "has floats from 0 to 65535"),
        (encode_tiff((RAMP * 65535).astype("<i4"), 32, 2), "has whole numbers from 0 to 65535"),
        (encode_tiff((RAMP * 200 - 9).astype("<i4"), 32, 2), "has whole numbers from -9 to 191"),
        (encode_tiff((RAMP * 4e9).astype("<u4"), 32), "has whole numbers from -"),
        (encode_tiff((RAMP * 999).astype("<i2"), 16, 2), "has whole numbers from 0 to 999"),
        (encode_tiff(RAMP.astype("<f8"), 64, 3), "has no known image format"),
    ],
)
def test_grey_of_which_white_is_not_certain_is_refused_by_name(content, reason):
    for decode in (decode_image, decode_tensor):
        with pytest.raises(DecodeError) as error:
            decode(content, "RGB", "image x")
        assert str(error.value).startswith(f"image x {reason}") and str(error.value).endswith(".")


def palette_of(transparency):
    content = io.BytesIO()
    make_image(3).quantize(8).save(content, "PNG", transparency=transparency)
    return content.getvalue()


@pytest.mark.parametrize("to", ["RGB", "L"])
@pytest.mark.parametrize(
    "content",
    [
        *(encode(make_image(3, mode)) for mode in ("LA", "RGBA", "P", "1")),
        *(encode(make_image(3, mode), "TIFF") for mode in ("CMYK", "YCbCr", "LA")),
        *(palette_of(transparency) for transparency in (3, bytes(range(8)))),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_other_modes_are_converted_as_timm_converts_them(content, to):
    """timm's data sets call convert of whatever PIL opens."""
    assert pixels(decode_image(content, to, "x")) == pixels(Image.open(io.BytesIO(content)).convert(to))


@pytest.mark.parametrize(
    ("content", "mode", "values"),
    [
        (encode(make_image(3, "L")), None, pixels(make_image(3, "L"))),
        (encode(make_image(3, "L")), "RGB", pixels(make_image(3, "L").convert("RGB"))),
        (encode(make_image(3)), "L", pixels(make_image(3, "L"))),
        (encode(make_image(3, "CMYK"), "TIFF"), "RGB", pixels(make_image(3))),
        (encode(make_image(3, "RGBA")), "RGB", pixels(make_image(3))),
        (encode_grey_16_bit([[0, 257, 65535], [256, 128, 129]]), "L", [[0, 1, 255], [1, 0, 1]]),
        (encode_grey_16_bit([[65535, 514]]), "RGB", [[[255] * 3, [2] * 3]]),
        (PALETTE, "RGB", PALETTE_RGB),
        (encode(Image.new("L", (1, 1), 7)), "RGB", [[[7, 7, 7]]]),
    ],
    ids=["grey", "grey-rgb", "rgb-grey", "cmyk", "rgba", "grey16", "grey16-rgb", "palette", "one-pixel"],
)
def test_modes(tmp_path, content, mode, values):
    write_shard([EncodedSample("a", content, "png", 0)], tmp_path / "train.tar")
    build_index(tmp_path)
    image = ShardDataset(tmp_path, mode)[0].image
    assert pixels(image) == values and mode in (None, image.mode)


CONTENTS = {
    "jpeg": encode(make_image(3), "JPEG"),
    "jpeg-grey": encode(make_image(3, "L"), "JPEG"),
    "jpeg-cmyk": encode(make_image(3, "CMYK"), "JPEG"),
    "jpeg-one-pixel": encode(Image.new("RGB", (1, 1), (7, 8, 9)), "JPEG"),
    "png": encode(make_image(3)),
    "grey16": encode_grey_16_bit([[0, 257, 65535], [256, 128, 129]]),
    "palette": PALETTE,
}


@pytest.mark.parametrize("mode", ["RGB", "L", None])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_tensors_hold_the_numbers_of_pil_images(content, mode):
    wanted = pil_to_tensor(decode_image(content, mode, ""))
    assert torch.equal(decode_tensor(content, mode, ""), wanted)


def test_a_large_photograph_is_the_same_as_a_tensor_and_as_a_pil_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise).resize((501, 375), Image.Resampling.BICUBIC), "JPEG")
    write_shard([EncodedSample("a", content, "jpg", 0)], tmp_path / "train.tar")
    build_index(tmp_path)
    image, tensor = (ShardDataset(tmp_path, "RGB", decode)[0].image for decode in (decode_image, decode_tensor))
    assert tensor.shape == (3, 375, 501) and torch.equal(tensor, pil_to_tensor(image))


@pytest.mark.parametrize(
    "content", [b"", b"no image", encode(make_image(0), "JPEG")[:-60], encode(make_image(0))[:-30]]
)
def test_an_undecodable_tensor_is_one_sentence(content):
    with pytest.raises(DecodeError, match=r"^image x has no known image format|^image x is no whole image \("):
        decode_tensor(content, "RGB", "image x")


def make_empty(root):
    (root / "train").mkdir()


def make_other_splits(root):
    (root / "pictures").mkdir()


def make_bare_tars(root):
    (root / "train").mkdir()
    write_shard(make_samples(1), root / "train" / "a.tar")


def make_empty_class(root):
    (root / "train" / "cat").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (make_empty, ["neither shards (*.tar and index.json) nor class folders"]),
        (make_other_splits, ["no folder", "has pictures and needs train/"]),
        (lambda root: None, ["no folder", "has no folders and needs train/"]),
        (make_bare_tars, ["1 tars and no index.json", "vitreuse shards index "]),
        (make_empty_class, ["class folder", "has no images (bmp, jpeg,", "fill or remove it"]),
    ],
)
def test_a_folder_of_something_else_is_described(tmp_path, make, parts):
    make(tmp_path)
    with pytest.raises(DataError) as error:
        open_split(tmp_path, "train")
    assert all(part in str(error.value) for part in [*parts, str(tmp_path)]) and str(error.value).endswith(".")


def test_images_beside_their_archive_are_images(tmp_path):
    """What is left where somebody unpacks ILSVRC2012_img_val.tar in place."""
    write_shard(make_samples(1), tmp_path / "archive.tar")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(make_image(number)))
    assert len(open_images(tmp_path, "RGB")) == 3


def test_class_folders_win_over_tars_without_an_index(class_folders):
    """ImageNet's train folder holds the tar of each class beside its images."""
    write_shard(make_samples(1), class_folders / "cat.tar")
    assert isinstance(open_split(class_folders.parent, "train"), FolderDataset)
