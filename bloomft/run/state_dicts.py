"""Whether a state dict read from a file has the structure of one that would be written now."""

import math
from typing import Any

from torch import Tensor


def check_like(value: Any, fresh: Any, place: str) -> None:
    """Raise ValueError, naming the place, unless ``value`` has the structure of ``fresh``.

    That is the same keys, lengths, shapes and dtypes, finite tensors, and numbers where there are numbers.
    """
    if isinstance(fresh, dict) and isinstance(value, dict):
        if odd := sorted(map(str, value.keys() ^ fresh.keys())):
            raise ValueError(f"{place}.{odd[0]} is missing or unexpected")
        for key in fresh:
            check_like(value[key], fresh[key], f"{place}.{key}")
    elif isinstance(fresh, list | tuple) and isinstance(value, list | tuple):
        if len(value) != len(fresh):
            raise ValueError(f"{place} has {len(value)} entries, expected {len(fresh)}")
        for index, (item, like) in enumerate(zip(value, fresh, strict=True)):
            check_like(item, like, f"{place}.{index}")
    elif isinstance(fresh, Tensor) and isinstance(value, Tensor):
        if value.shape != fresh.shape or value.dtype != fresh.dtype:
            raise ValueError(f"{place} is {tuple(value.shape)} {value.dtype}, expected {tuple(fresh.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{place} is not finite")
    elif not (value is None or fresh is None or _are_alike(value, fresh)):
        raise ValueError(f"{place} is a {type(value).__name__}, expected a {type(fresh).__name__}")
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{place} is not a number")


def public(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` without the keys that begin with an underscore, which differ between versions of torch."""
    return {key: value for key, value in state.items() if not key.startswith("_")}


def _are_alike(left: Any, right: Any) -> bool:
    return any(isinstance(left, kind) and isinstance(right, kind) for kind in (str, bool | int | float))
