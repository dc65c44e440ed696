"""Nested values from YAML files and `key=value` settings. Reading costs little, whatever the file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from graftkit.errors import UserError, nearest, shown
from graftkit.files import special

BYTES = 1_000_000  # of a recipe; a method may name thousands of new tokens
VALUES = 10_000
DEPTH = 20
DIGITS = 400  # of a number


class _Refused(yaml.YAMLError):
    """Valid YAML that no recipe needs; `line` counts from 1."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.line = mark.line + 1


class _Loader(yaml.SafeLoader):
    """YAML without aliases, repeated keys or deep nesting, in which 1e-3 is a number and a date is a string."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise _Refused(
                f"aliases such as *{shown(event.anchor, 40)[1:-1]} are not supported; repeat the value",
                event.start_mark,
            )
        if self.depth > DEPTH:
            raise _Refused(f"values are nested more than {DEPTH} deep", self.peek_event().start_mark)
        if self.count >= VALUES:
            raise _Refused(f"there are more than {VALUES:,} values", self.peek_event().start_mark)
        self.depth, self.count = self.depth + 1, self.count + 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = lines.get((key.tag, key.value))
            if line is not None:
                raise _Refused(
                    f"the key {shown(key.value)} is already on line {line}; join the two", key.start_mark
                )
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        numeric = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if numeric and len(node.value) > DIGITS:
            raise _Refused(f"a number has {len(node.value):,} digits", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, TypeError, LookupError, AttributeError) as error:  # !!int x
            raise _Refused(f"{shown(node.value)} cannot be read: {error}", node.start_mark) from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """Return the values in a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def read(path: Path) -> dict[str, Any]:
    """Return the values in a recipe file. Raises `UserError` if it does not exist or is not YAML."""
    if path.is_dir():
        hint = " To resume a run, use --resume." if (path / "recipe.yaml").is_file() else ""
        raise UserError(f"recipe {str(path)!r} is a folder; name a YAML file.{hint}")
    if (kind := special(path)) is not None:
        raise UserError(f"recipe {str(path)!r} is {kind}, not a file; name a YAML file.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"recipe {str(path)!r} does not exist.{nearest(path.name, siblings)}")
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".conll"):
        raise UserError(f"{str(path)!r} holds rows, not a recipe; write --train {path}.")
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES + 1)
        if len(raw) > BYTES:
            raise UserError(
                f"recipe {str(path)!r} has more than {BYTES:,} bytes, so it is not a recipe; name another file."
            )
        values = parse(raw.decode("utf-8"))
    except _Refused as error:
        raise UserError(f"recipe {str(path)!r}, line {error.line}: {error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error.strerror}.") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {str(path)!r} must hold keys and values, such as `model: ...`.")
    return values


def override(
    values: dict[str, Any],
    settings: Iterable[str],
    *,
    what: str = "a setting",
    example: str = "train.epochs=3",
) -> dict[str, Any]:
    """Apply `key=value` settings to nested values; keys are dotted, values are YAML. `what`, `example`: for messages."""
    result = dict(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{shown(setting)} is not {what}; write key=value, for example {example}.")
        try:
            value = parse(text) if text else None
        except _Refused as error:
            raise UserError(f"setting {shown(setting)}: {error}.") from None
        except yaml.YAMLError:
            value = text
        place(result, key.strip(), value)
    return result


def place(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in nested values, copying the inner dictionaries."""
    *outer, last = dotted.split(".")
    inside = values
    for i, part in enumerate(outer):
        held = inside.get(part)
        if held is not None and not isinstance(held, dict):
            raise UserError(f"setting {dotted!r}: {'.'.join(outer[: i + 1])!r} is not a section.")
        inside[part] = dict(held or {})
        inside = inside[part]
    inside[last] = value


UNITS = {
    "s": 1,
    "sec": 1,
    "second": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "h": 3600,
    "hour": 3600,
    "d": 86400,
    "day": 86400,
}


def seconds(text: str) -> float:
    """Return a time such as '20 min' or '1.5 h' in seconds. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]+?)s?\s*", text)
    unit = None if found is None else UNITS.get(found[2], UNITS.get(f"{found[2]}s"))
    if found is None or unit is None or not float(found[1]):
        raise ValueError("must be a time such as '30 s', '20 min' or '2 h'")
    return float(found[1]) * unit


SIZES = {
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def memory(text: str) -> float:
    """Return a size such as '8GB' or '500 MB' in bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]i?b)\s*", text.lower())
    if found is None or not float(found[1]):
        raise ValueError("must be a size such as '8GB' or '500 MB'")
    return float(found[1]) * SIZES[found[2]]
