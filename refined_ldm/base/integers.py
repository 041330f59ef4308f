"""Checks of numbers, from Python, YAML, JSON, papermill or a shell.

papermill, JSON and forms write 5 as 5.0, which is accepted as 5. Other values are refused, with the parameter's name.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

LARGEST_SEED = 2**63 - 1
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz; a wrong rate could need any amount of memory


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int: 5, 5.0, or an integer of NumPy or PyTorch. `name`: of the parameter, for the message.

    Raises ValueError for a fraction, NaN, infinity, True, a text, and for a number below `least` or above `most`.
    """
    found = _as_int(value)
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"{name} must be {_expected(least, most)}, got {value!r:.80}")
    return found


def whole_numbers(**values: Any) -> tuple[int, ...]:
    """Each of the values as an int, in their order: `seed, index = whole_numbers(seed=seed, index=index)`.

    A `seed` has its range, any other is 0 or more. Raises ValueError as `whole` does. Notebook: all of them.
    """
    return tuple(whole_seed(value) if name == "seed" else whole(name, value, 0) for name, value in values.items())


def whole_seed(value: Any) -> int:
    """A seed as an int: 0 to 2**63 - 1, of which 0 and 0.0 are the same. Raises ValueError."""
    return whole("seed", value, 0, LARGEST_SEED)


def whole_rate(value: Any, name: str = "sample_rate") -> int:
    """A sample rate in Hz as an int: 1 kHz to 1 MHz. Raises ValueError."""
    return whole(f"{name} (Hz)", value, LOWEST_RATE, HIGHEST_RATE)


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a finite float: an int, a float, or a number of NumPy or PyTorch. `name`: as in `whole`.

    Raises ValueError for NaN, infinity, True, a text, and for a number below `least` or above `most`.
    """
    found = _plain(value)
    is_number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if not is_number or not least <= found <= most:
        limits = "a finite number" if math.inf in (-least, most) else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {limits}, got {value!r:.80}")
    return float(found)


def cast_numbers(settings: Any) -> None:
    """Cast the numbers of a frozen dataclass to the types of its fields; floats must be finite; lists become tuples.

    Raises ValueError naming the field.
    """
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        object.__setattr__(settings, field.name, _cast(field.name, getattr(settings, field.name), kinds[field.name]))


def _cast(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, UnionType):  # int | None
        return None if value is None else _cast(name, value, get_args(kind)[0])
    if get_origin(kind) is tuple:
        count = None if get_args(kind)[-1] is Ellipsis else len(get_args(kind))
        if not isinstance(value, list | tuple) or count not in (None, len(value)):
            raise ValueError(f"{name} must be a list{f' of {count}' if count else ''}, got {value!r:.80}")
        return tuple(_cast(name, item, get_args(kind)[0]) for item in value)
    if kind is int:
        return whole(name, value)
    if kind is float:
        return number(name, value)
    return value


def _plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python, None for several; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):
        return None


def _as_int(value: Any) -> int | None:
    value = _plain(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _expected(least: int | None, most: int | None) -> str:
    if least is None and most is None:
        return "a whole number"
    if most is None:
        return f"a whole number, {least} or more"
    return f"a whole number between {least} and {most}"


# Types of command-line options


def integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """For argparse: the type of an option that is a whole number from `least` to `most`; 15.0 and 1e3 are whole."""

    def read(text: str) -> int:
        try:
            found = Decimal(text)
            is_whole = found.is_finite() and abs(found.adjusted()) < 40 and found == int(found)
        except InvalidOperation:
            is_whole = False
        try:
            return whole("it", int(found) if is_whole else text, least, most)
        except ValueError as fault:
            raise ArgumentTypeError(str(fault).removeprefix("it ")) from fault

    return read


def real(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """For argparse: the type of an option that is a finite number from `least` to `most`, and greater than `above`."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and least <= found <= most and found > above):
            limits = [f"{least:g} or more"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            limits += [f"at most {most:g}"] * (most < math.inf)
            raise ArgumentTypeError(", ".join(["must be a finite number", *limits]) + f", got {text!r:.80}")
        return found

    return read
