"""The instruments: every published number is made by `python -m eval`."""
