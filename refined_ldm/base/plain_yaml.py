"""Settings in plain YAML: read without following tags or expanding what is too large, and cast to their types."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

LARGEST = 1 << 20  # bytes of a YAML file
LARGEST_NUMBER = 1e12  # of all settings; larger ones fail later, without the name of the setting
# errors of the YAML library
YAML_FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def read_yaml(path: Path) -> dict:
    """Read a file of settings by name. Raises ValueError for another content, or one that is too large."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is no configuration: it has {path.stat().st_size} bytes, {LARGEST} are the most")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        _refuse_bomb(written)
    except (yaml.YAMLError, *YAML_FAULTS) as fault:
        raise ValueError(f"{path} is not plain YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(written).__name__}")
    return written


def _refuse_bomb(tree, most=10_000, deepest=40):
    """Raise ValueError if a tree is too large for settings, as nested YAML anchors can make it."""
    waiting, size = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        size += 1 + (len(value) // 64 if isinstance(value, str | bytes) else 0)
        if size > most or depth > deepest:
            raise ValueError(f"it has more than {most} values, or values more than {deepest} deep in others")
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        waiting += [(v, depth + 1) for v in inner] if isinstance(inner, list | tuple | set) else []


def leaves(tree: dict, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf of nested settings; a list is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def cast(value: Any, kind: Any, where: str) -> Any:
    """Return `value` from YAML as `kind`; whole floats and integers are interchangeable, lists become tuples.

    Raises ValueError naming the place, `where`.
    """
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple and isinstance(value, list):
        inner = get_args(kind)
        inner = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(inner) != len(value):
            raise ValueError(f"{where} must have {len(inner)} values, got {value!r:.80}")
        return tuple(cast(v, k, where) for v, k in zip(value, inner, strict=True))
    if kind in (int, float) and isinstance(value, str):  # YAML reads 1e-4, without a point, as a string
        with suppress(ValueError):
            value = float(value)
    if (
        kind in (int, float) and type(value) in (int, float) and not abs(value) < LARGEST_NUMBER
    ):  # also infinity and NaN
        raise ValueError(f"{where} must be a number below {LARGEST_NUMBER:.0e}, got {value!r:.80}")
    if kind is float and type(value) is int or kind is int and type(value) is float and value.is_integer():
        value = kind(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.80}")
    return value


def plain(value: Any) -> Any:
    """Return nested settings with lists in place of tuples, as YAML has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
