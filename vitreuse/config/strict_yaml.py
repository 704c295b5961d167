"""YAML into frozen dataclasses, by the declared type of each field and nothing else.

YAML 1.1 guesses a type from the spelling: `1e-3` is a string, `on` is True, `0224` is 148. Here a scalar stays text
until a declared type asks for it, and every error is one sentence with the file and line, the dotted path, the rule and
the nearest spelling.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from operator import ge, gt, le
from pathlib import Path
from typing import Any

import yaml

from vitreuse.io.errors import ConfigError, nearest, nearest_path
from vitreuse.io.file_names import printable

_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# What YAML 1.1 or 1.2 would not read as a string: as text it must stand in quotes.
_AMBIGUOUS = re.compile(
    r"~|null|true|false|yes|no|on|off|y|n|[+-]?\.(inf|nan)|[+-]?[0-9][0-9_,:]*(\.[0-9]*)?(e[+-]?[0-9]+)?"
    r"|0[xob][0-9a-f_]+|[+-]?\.[0-9]+(e[+-]?[0-9]+)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*|",
    re.IGNORECASE,
)
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
LARGEST = 10**12  # of whole numbers without a maximum of their own: more overflows in what is given them
Tree = dict[str, Any]  # key -> yaml.Node (scalar or sequence) or Tree
Sources = dict[str, str]  # dotted path -> "file:line" it was read from; "" -> the file as a whole


def setting(
    meaning: str,
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    changes_run: bool = True,
    is_path: bool = False,
) -> Any:
    """A dataclass field with its meaning and its bounds.

    Args:
        meaning: What the field is, with its unit.
        default: Its value when the YAML leaves it out; without one the key is required.
        above: The value must be greater.
        minimum: The value must be at least this.
        maximum: The value must be at most this; LARGEST for whole numbers.
        choices: The only values allowed.
        changes_run: Whether another value gives other weights, so that a run cannot be resumed under it.
        is_path: Whether a ~ at its beginning stands for a home folder.
    """
    bounds = {"above": above, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    metadata = {"meaning": meaning, "changes_run": changes_run, "is_path": is_path, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> tuple[Tree, Sources]:
    """The keys of a YAML file over those of the file that its `base:` names, and so on; `above` led here.

    Raises:
        ConfigError: A file is missing or is not YAML, a key stands twice, or the bases form a circle.
    """
    resolved = path.resolve()
    if resolved in above:
        raise ConfigError(f"{above[0]}: base leads in a circle, {' -> '.join(p.name for p in (*above, resolved))}.")
    sources = {"": str(path)}
    tree = _compose(_read_text(path), sources)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, such as 'model:'.")
    base = tree.pop("base", None)
    if base is None:
        return tree, sources
    named = os.path.expanduser(convert(base, str, sources, "base"))
    below, sources_below = read_tree(path.parent / named, (*above, resolved))
    return merged(below, tree), {**sources_below, **sources}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){nearest_path(path) or '.'}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read (not UTF-8 text).") from None


def _compose(text: str, sources: Sources, path: str = "") -> Any:
    """The text's tree; notes in `sources` where each of its keys stands."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return {} if root is None else _to_tree(root, sources, path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{sources['']}: is not valid YAML ({' '.join(str(error).split())}).") from None
    except RecursionError:
        raise ConfigError(f"{sources['']}: is nested too deep, or an alias holds itself.") from None


def _to_tree(node: yaml.Node, sources: Sources, path: str) -> Any:
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise ConfigError(f"{_at(sources, path)} has the tag {node.tag!r}, only plain values are allowed.")
    if not isinstance(node, yaml.MappingNode):
        return node
    tree: Tree = {}
    for key_node, value_node in node.value:
        where = f"{sources['']}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be a word.")
        dotted = _join(path, key_node.value)
        if key_node.value in tree:
            raise ConfigError(f"{where}: {dotted} stands twice, remove one.")
        sources[dotted] = where
        tree[key_node.value] = _to_tree(value_node, sources, dotted)
    return tree


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _at(sources: Sources, path: str) -> str:
    """The beginning of an error sentence: where the path, or the section around it, was read, and the path."""
    place = path
    while place not in sources:
        place = place.rpartition(".")[0]
    return f"{sources[place]}: {path or 'the file'}"


def merged(below: Tree, above: Tree) -> Tree:
    """`below` with the keys of `above` laid over it; mappings merge key by key, everything else is replaced."""
    in_both = [key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: merged(below[key], above[key]) for key in in_both}}


def overridden(tree: Tree, sources: Sources, override: str) -> tuple[Tree, Sources]:
    """A tree with `a.b=c` laid over it; the value is YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r} is not of the form section.key=value.")
    here = "command line"
    noted = {"": here, dotted: here}
    if printable(text) != text:  # a path's bytes that are no UTF-8, which YAML has as escapes alone
        text = yaml.safe_dump(text)
    branch = _compose(text or "null", noted, dotted)
    for key in reversed(keys):
        branch = {key: branch}
    sections = {".".join(keys[:depth]): here for depth in range(1, len(keys))}  # unless a file has them
    return merged(tree, branch), {**sections, **noted, **sources, **{path: here for path in noted if path}}


def convert(value: Any, kind: Any, sources: Sources, path: str) -> Any:
    """One value of a tree as the declared type `kind`.

    Raises:
        ConfigError: It is of another type, or a dataclass's key is unknown, missing or out of bounds.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = next(option for option in typing.get_args(kind) if option is not types.NoneType)
        return None if _is_null(value) else convert(value, inner, sources, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, _expect(value, dict, kind, sources, path), sources, path)
    if kind is dict:
        return _untyped(_expect(value, dict, kind, sources, path), sources, path)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(value, typing.get_args(kind), sources, path)
    return _convert_scalar(_expect(value, yaml.ScalarNode, kind, sources, path), kind, sources, path)


def _is_null(value: Any) -> bool:
    return isinstance(value, yaml.ScalarNode) and value.style is None and value.value.lower() in ("", "~", "null")


def _expect(value: Any, shape: type, kind: Any, sources: Sources, path: str) -> Any:
    if not isinstance(value, shape):
        raise ConfigError(f"{_at(sources, path)} must be {_NAMES.get(kind, 'a mapping')}, not {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, yaml.SequenceNode) else repr(value.value)


def _convert_tuple(value: Any, kinds: tuple[Any, ...], sources: Sources, path: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:  # tuple[kind, ...], any number of them
        kinds = kinds[:1] * len(_expect(value, yaml.SequenceNode, tuple, sources, path).value)
    if not isinstance(value, yaml.SequenceNode) or len(value.value) != len(kinds):
        raise ConfigError(f"{_at(sources, path)} must be a list of {len(kinds)} values, not {_shown(value)}.")
    items = zip(value.value, kinds, strict=True)
    return tuple(convert(item, kind, sources, f"{path}.{i}") for i, (item, kind) in enumerate(items))


def _convert_scalar(node: yaml.ScalarNode, kind: type, sources: Sources, path: str) -> Any:
    value = _read_plain(node.value) if node.style is None else node.value
    if kind is str:
        if node.style is None and _AMBIGUOUS.fullmatch(node.value):
            where = _at(sources, path)
            raise ConfigError(f"{where} must be text, not {node.value!r}; if it is meant as text, put it in quotes.")
        return node.value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{_at(sources, path)} must be {_NAMES[kind]}, not {node.value!r}.")
    return value


def _read_plain(text: str) -> bool | int | float | str:
    """An unquoted scalar: true, false, a decimal number, or the text itself."""
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text) and len(text) < 40:  # Python reads no more than 4,300 digits
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _untyped(value: Any, sources: Sources, path: str) -> Any:
    """A value with no declared type (model.keywords), where the spelling must leave no doubt."""
    if isinstance(value, dict):
        return {key: _untyped(item, sources, _join(path, key)) for key, item in value.items()}
    if isinstance(value, yaml.SequenceNode):
        return [_untyped(_to_tree(item, sources, path), sources, f"{path}.{i}") for i, item in enumerate(value.value)]
    if _is_null(value):
        return None
    if value.style is not None:
        return value.value
    plain = _read_plain(value.value)
    if isinstance(plain, str) and _AMBIGUOUS.fullmatch(plain):
        readings = f"{plain!r}, which has two readings: write a number, true or false, or use quotes."
        raise ConfigError(f"{_at(sources, path)} is {readings}")
    return plain


def build(kind: Any, tree: Mapping[str, Any], sources: Sources, path: str = "") -> Any:
    """The dataclass `kind` from a tree: every key known, every required key there, every value typed and in bounds."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in fields:
            hint = nearest(key, fields) or f"; {path or 'the file'} knows {', '.join(fields)}."
            raise ConfigError(f"{_at(sources, _join(path, key))} is not a key{hint}")
    values = {}
    for name, field in fields.items():
        dotted = _join(path, name)
        if name in tree or dataclasses.is_dataclass(hints[name]) or hints[name] is dict:
            values[name] = convert(tree.get(name, {}), hints[name], sources, dotted)
            _check_bounds(values[name], field.metadata, sources, dotted)
            if field.metadata.get("is_path") and values[name] is not None:
                values[name] = os.path.expanduser(values[name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{_at(sources, dotted)} is missing ({field.metadata['meaning']}).")
    try:
        return kind(**values)
    except ValueError as error:  # a rule between fields, which the dataclass itself checks
        raise ConfigError(f"{sources['']}: {_join(path, str(error))}") from None


def _check_bounds(value: Any, rules: Mapping[str, Any], sources: Sources, path: str) -> None:
    if value is None or not rules:
        return
    values = value if isinstance(value, tuple) else (value,)
    for word in values:
        if rules["choices"] and word not in rules["choices"]:
            hint = nearest(word, rules["choices"]) or "."
            raise ConfigError(f"{_at(sources, path)} is {word!r}, allowed are {', '.join(rules['choices'])}{hint}")
    for number in values:
        maximum = LARGEST if rules["maximum"] is None and type(number) is int else rules["maximum"]
        bounds = {"greater than": (gt, rules["above"]), "at least": (ge, rules["minimum"]), "at most": (le, maximum)}
        for words, (holds, bound) in bounds.items():
            if bound is not None and not holds(number, bound):
                raise ConfigError(f"{_at(sources, path)} is {number}, it must be {words} {bound}.")


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string this module would not read back as text, and writes tuples as lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if _AMBIGUOUS.fullmatch(text) else None)

    def represent_tuple(self, values: tuple[Any, ...]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(tuple, _Dumper.represent_tuple)


def to_yaml(config: Any) -> str:
    """The YAML text of a dataclass, which `build` reads back to an equal one."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
