"""What is raised for data on disk that cannot be used: one sentence with the place, the reason and the way out."""


class DataError(ValueError):
    """A shard, index or folder that cannot be used.

    A DataLoader raises a worker's error again with the worker's whole traceback as its text. The sentence is what
    follows the last name of the class there, so that the message is the same for any number of workers. The end of a
    line in a name becomes an escape.
    """

    def __init__(self, message: str):
        sentence = message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(sentence.strip().replace("\n", "\\n").replace("\r", "\\r"))


class DecodeError(DataError):
    """One sample whose image cannot be read; the other samples are not affected."""
