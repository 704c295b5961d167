"""What the checkout has and the wheel has not, said to those who are sent there."""

from importlib.metadata import PackageNotFoundError, metadata

PROGRAMS = ("train", "eval")


def of_checkout() -> str:
    """What follows ``python -m train`` or ``eval`` in a sentence: who has it, and the command by which others get it.

    The address is that of the installed package's metadata; of sources that nobody installed there is none, nor need.
    """
    try:
        pairs = metadata("vitreuse").get_all("Project-URL") or []
    except PackageNotFoundError:
        pairs = []
    addresses = dict(pair.split(", ", 1) for pair in pairs)
    command = f": git clone {addresses['Repository']}" if "Repository" in addresses else ""
    return f", which the checkout alone has{command}"
