"""Folders of WebDataset shards: built, indexed and verified, by several processes."""
