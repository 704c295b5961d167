"""Data sets that are known by name and written as shards on first use."""
