import pytest
from tiny_split import SHARD_SIZES, make_samples, write_split


@pytest.fixture
def split(tmp_path):
    """ROOT/train: 13 samples in shards of 5, 1 and 7."""
    folder = tmp_path / "root" / "train"
    write_split(folder, make_samples(sum(SHARD_SIZES)), SHARD_SIZES)
    return folder
