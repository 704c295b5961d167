"""Repetition notation: a sequence of words as a short text with counts and groups, `a (b*2 c)*3`.

    sequence := item+                          items are separated by white space
    item     := word ['*' count]               white space may surround a '*'
              | '(' sequence ')' ['*' count]

It knows no word's meaning. Characters are counted from 1 in messages.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

_COUNT = re.compile("[0-9]{1,9}")
# Every text splits into these tokens without a gap: what no other kind takes is a stray character.
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<glued>(?<=[^\s(])\(|(?<=\))[\w:.+/-])|(?P<open>\()|(?P<close>\))"
    r"|(?P<count>\*\s*[\w.+-]*)|(?P<word>[\w:.+/-]+)|(?P<stray>.)"
)


class Flaw(Exception):
    """The first thing wrong with a text, and the text with that one thing repaired."""

    def __init__(self, problem: str, repaired: str):
        super().__init__(problem)
        self.problem = problem
        self.repaired = repaired


def quoted(text: str) -> str:
    """The text in quotes, cut where it would flood an error message."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def expand(text: str, max_words: int) -> list[str]:
    """The words that a text spells; raises Flaw where the text breaks the grammar or a count makes too many words.

    One flat list and a stack of open parentheses: neither deep nesting nor nested counts can exhaust the memory.
    """
    words: list[str] = []
    opened: list[tuple[re.Match[str], int]] = []  # the open parentheses, and where in words each group starts
    item_start: int | None = None  # where in words the item starts that a count would repeat
    for token in _tokens(text):
        if token.lastgroup == "open":
            opened.append((token, len(words)))
            item_start = None
        elif token.lastgroup == "close":
            if not opened:
                raise _flaw_at(token, "closes no parenthesis", "")
            opening, item_start = opened.pop()
            if item_start == len(words):
                repaired = text[: opening.start()] + text[token.end() :]
                raise Flaw(f"'(' at character {opening.start() + 1} opens an empty group", repaired)
        elif token.lastgroup == "count":
            if item_start is None:
                raise _flaw_at(token, "follows nothing that it could repeat", "")
            words += words[item_start:] * (_read_count(token, item_start, len(words), max_words) - 1)
            item_start = None
        else:
            item_start = len(words)
            words.append(token[0])
    if opened:
        raise Flaw(f"'(' at character {opened[0][0].start() + 1} is never closed", text + ")" * len(opened))
    return words


def _tokens(text: str) -> Iterator[re.Match[str]]:
    """Splits a text into parentheses, counts and words."""
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "stray":
            raise _flaw_at(token, "belongs to no word, count or group", " ")
        if token.lastgroup == "glued":
            raise _flaw_at(token, "needs a space before it", f" {token[0]}")
        if token.lastgroup != "space":
            yield token


def _read_count(token: re.Match[str], start: int, stop: int, max_words: int) -> int:
    """How often a count repeats the words from start to stop; bounded before anything is repeated."""
    digits = token[0][1:].strip()
    nearest = _COUNT.search(digits)
    count = int(nearest[0]) if nearest else 0
    if count == 0 or not _COUNT.fullmatch(digits):
        raise _flaw_at(token, f"is no count, a whole number from 1 to {max_words}", f"*{count}" if count else "")
    most = max(1, (max_words - start) // (stop - start))
    if count > most:
        raise _flaw_at(token, f"makes more than {max_words} layers", f"*{most}")
    return count


def _flaw_at(token: re.Match[str], problem: str, replacement: str) -> Flaw:
    """The flaw of a token, which the replacement repairs."""
    text = token.string
    repaired = text[: token.start()] + replacement + text[token.end() :]
    return Flaw(f"{quoted(token[0])} at character {token.start() + 1} {problem}", repaired)


def shortest_text(words: Iterable[str]) -> str:
    """The shortest text that spells the words; among equals the one with fewer groups, then with longer first items.

    Dynamic programming from the end: the shortest text of a tail is one item and the shortest text of what follows it.
    """

    @functools.cache
    def shortest(words: tuple[str, ...]) -> str:
        tails = [""] * (len(words) + 1)
        for start in reversed(range(len(words))):
            texts = [(f"{item} {tails[stop]}".rstrip(), stop) for item, stop in first_items(words[start:], start)]
            tails[start] = min(texts, key=lambda choice: (len(choice[0]), choice[0].count("("), -choice[1]))[0]
        return tails[0]

    def first_items(words: tuple[str, ...], start: int) -> Iterator[tuple[str, int]]:
        """Every item that the words can begin with, and where it stops."""
        yield words[0], start + 1
        for period in range(1, len(words) // 2 + 1):
            body = words[:period]
            if period > 1 and len(set(body)) == 1:
                continue  # (a*2)*3 is never shorter than a*6
            count = 1
            while words[count * period : (count + 1) * period] == body:
                count += 1
                yield f"{body[0] if period == 1 else f'({shortest(body)})'}*{count}", start + count * period

    return shortest(tuple(words))
