"""Labelled images from indexed WebDataset shards or from class folders, as map-style data sets."""

from vitreuse.data.datasets import FolderDataset, ShardDataset, open_split
from vitreuse.data.decode import IMAGE_EXTENSIONS, Sample
from vitreuse.data.errors import DataError, DecodeError
from vitreuse.data.index import Index, Record, build_index, load_index
from vitreuse.data.scan import Shard
from vitreuse.data.shards import EncodedSample, SplitInfo, shards_info, verify_shards, write_shard, write_shards
from vitreuse.data.sources import SOURCES, prepare_source

__all__ = [
    "IMAGE_EXTENSIONS",
    "SOURCES",
    "DataError",
    "DecodeError",
    "EncodedSample",
    "FolderDataset",
    "Index",
    "Record",
    "Sample",
    "Shard",
    "ShardDataset",
    "SplitInfo",
    "build_index",
    "load_index",
    "open_split",
    "prepare_source",
    "shards_info",
    "verify_shards",
    "write_shard",
    "write_shards",
]
