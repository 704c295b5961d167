"""Exact epochs: every sample once, in an order that only seed and epoch decide."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import Compose, PILToTensor

from train.draws import Augmented
from train.order import Draw, RankBatches, epoch_permutation
from train.pipeline import TrainingImages, create_loader
from vitreuse.data import EncodedSample, ShardDataset, build_index, write_shard

SHARD_SIZES = (5, 1, 13, 4)  # 23 samples
TO_BYTES = Compose([PILToTensor(), Augmented])


def _epoch(epoch: int = 2, first_step: int = 0, world_size: int = 1, **options) -> list[list[list[Draw]]]:
    """The draws of every rank, by rank and step."""
    ranks = [RankBatches(3, SHARD_SIZES, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for batches in ranks:
        batches.start_at(epoch, first_step)
    return [list(batches) for batches in ranks]


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
def test_an_epoch_is_every_sample_once(window):
    order = epoch_permutation(3, 2, SHARD_SIZES, window)
    assert sorted(order) == list(range(23))
    assert list(order) == list(epoch_permutation(3, 2, SHARD_SIZES, window))
    assert list(order) != list(epoch_permutation(3, 1, SHARD_SIZES, window))
    assert list(order) != list(epoch_permutation(4, 2, SHARD_SIZES, window))


def test_the_permutation_is_the_one_runs_were_made_with():
    assert epoch_permutation(0, 0, (7,)).tolist() == [5, 0, 1, 6, 2, 3, 4]


def test_a_window_of_one_reads_shard_after_shard():
    order = epoch_permutation(3, 2, SHARD_SIZES, window=1)
    shard_of = np.repeat(np.arange(4), SHARD_SIZES)
    shards = shard_of[order]
    assert len(np.flatnonzero(np.diff(shards))) == 3
    assert all(np.diff(order[shards == shard]).tolist() == [1] * (size - 1) for shard, size in enumerate(SHARD_SIZES))


def test_a_window_keeps_reads_near_each_other():
    unmixed = epoch_permutation(3, 2, SHARD_SIZES, window=1)
    place = {sample: position for position, sample in enumerate(unmixed)}
    mixed = epoch_permutation(3, 2, SHARD_SIZES, window=6)
    assert all(place[sample] // 6 == position // 6 for position, sample in enumerate(mixed))
    assert list(mixed) != list(unmixed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [4, 7, 22, 30])
def test_any_number_of_ranks_shares_the_same_global_batches(world_size, batch_size):
    alone = _epoch(global_batch_size=batch_size)[0]
    shared = _epoch(global_batch_size=batch_size, world_size=world_size)
    assert Counter(draw.sample for batch in alone for draw in batch) == Counter(range(23))
    for step, batch in enumerate(alone):
        shares = [rank[step] for rank in shared]
        assert [batch[rank::world_size] for rank in range(world_size)] == shares


def test_a_rank_may_hold_no_sample_of_the_last_batch():
    assert [len(rank[-1]) for rank in _epoch(global_batch_size=11, world_size=3)] == [1, 0, 0]


def test_count_is_the_size_of_the_global_batch():
    batches = RankBatches(3, SHARD_SIZES, 7)
    assert [batches.count(step) for step in range(batches.steps_per_epoch)] == [7, 7, 7, 2]


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_resuming_within_an_epoch_gives_its_rest(first_step):
    assert _epoch(global_batch_size=4, first_step=first_step)[0] == _epoch(global_batch_size=4)[0][first_step:]


def test_a_partial_batch_can_be_dropped():
    full = _epoch(global_batch_size=7)[0]
    assert _epoch(global_batch_size=7, drop_partial=True)[0] == full[:-1]
    assert _epoch(global_batch_size=23, drop_partial=True)[0] == _epoch(global_batch_size=23)[0]
    assert RankBatches(3, SHARD_SIZES, 24, drop_partial=True).steps_per_epoch == 0


def test_repeats_put_the_copies_of_a_sample_on_different_ranks():
    shared = _epoch(global_batch_size=6, world_size=3, repeats=3)
    order = epoch_permutation(3, 2, SHARD_SIZES)
    assert shared[1][0] == [Draw(2, order[0], 1), Draw(2, order[1], 1)]
    uses = Counter((draw.sample, draw.copy) for rank in shared for batch in rank for draw in batch)
    assert uses == Counter([(order[i // 3], i % 3) for i in range(23)])


@pytest.fixture(scope="module", params=[SHARD_SIZES, (1, 12), (13,)], ids=str)
def shards(request, tmp_path_factory) -> Path:
    """Uneven shards, two of them, and one: fewer than workers."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = iter(range(sum(request.param)))
    for shard, size in enumerate(request.param):
        write_shard([_sample(next(numbers)) for _ in range(size)], folder / f"{shard}.tar")
    build_index(folder)
    return folder


def _sample(number: int) -> EncodedSample:
    content = io.BytesIO()
    Image.new("L", (1, 1), number).save(content, "PNG")
    return EncodedSample(str(number), content.getvalue(), "png", number % 3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", range(5))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loaders_of_all_ranks_read_every_image_once_an_epoch(shards, world_size, num_workers):
    """Real workers, over two epochs and the rest of a third; the last batch of an epoch is smaller than the others."""
    samples = ShardDataset(shards)
    alone = RankBatches(3, samples.shard_sizes, 5)
    images = TrainingImages(samples, [TO_BYTES] * 3, seed=3)
    ranks = [RankBatches(3, samples.shard_sizes, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    loaders = [create_loader(images, batches, num_workers, pin_memory=False) for batches in ranks]
    for epoch, first_step in ((0, 0), (1, 0), (2, 1)):
        for batches in (alone, *ranks):
            batches.start_at(epoch, first_step)
        expected = [sorted(draw.sample for draw in step) for step in alone]
        steps = list(zip(*loaders, strict=True))
        assert [sorted(int(key) for share in step for key in share.keys) for step in steps] == expected
        if not first_step:
            assert Counter(number for step in expected for number in step) == Counter(range(len(samples)))
        for share in (share for step in steps for share in step):
            assert [int(image) for image in share.images] == [int(key) for key in share.keys]
            assert share.labels.tolist() == [int(key) % 3 for key in share.keys]
