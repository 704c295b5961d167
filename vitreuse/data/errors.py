"""What is raised for data on disk that cannot be used: one sentence with the place, the reason and the way out."""


class DataError(ValueError):
    """A shard, index or folder that cannot be used.

    A DataLoader raises a worker's error again with the worker's whole traceback as its text. The sentence is the last
    line of that text, so keeping the last line gives the same message for any number of workers.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class DecodeError(DataError):
    """One sample whose image cannot be read; the other samples are not affected."""
