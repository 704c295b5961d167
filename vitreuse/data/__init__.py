"""Labelled images from indexed WebDataset shards or from class folders, as map-style data sets."""

from vitreuse.data.datasets import CACHE_ROOT, FolderDataset, ShardDataset, open_images, open_split
from vitreuse.data.decode import Decoder, Sample, decode_image, decode_tensor
from vitreuse.data.holdout import Part, hold_out, open_without_labels, split_apart
from vitreuse.data.shards.build import BuildSettings, build_shards
from vitreuse.data.shards.folder import EncodedSample, shards_info, verify_shards, write_shard, write_shards
from vitreuse.data.shards.index import build_index, load_index
from vitreuse.data.shards.scan import Shard
from vitreuse.data.shards.workers import Workers, end_with_parent, usable_cpus
from vitreuse.data.sources.prepare import SOURCES, prepare_source
from vitreuse.data.splits import choose_split, find_split
from vitreuse.io.errors import DataError, DecodeError

__all__ = [
    "CACHE_ROOT",
    "SOURCES",
    "BuildSettings",
    "DataError",
    "DecodeError",
    "Decoder",
    "EncodedSample",
    "FolderDataset",
    "Part",
    "Sample",
    "Shard",
    "ShardDataset",
    "Workers",
    "build_index",
    "build_shards",
    "choose_split",
    "decode_image",
    "decode_tensor",
    "end_with_parent",
    "find_split",
    "load_index",
    "open_images",
    "open_split",
    "hold_out",
    "open_without_labels",
    "prepare_source",
    "shards_info",
    "split_apart",
    "usable_cpus",
    "verify_shards",
    "write_shard",
    "write_shards",
]
