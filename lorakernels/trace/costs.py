"""Bytes and FLOPs of one ATen operation, from its arguments and its result."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lorakernels.trace.record import Launch, described, footprint, is_wide

aten = torch.ops.aten

# They make a tensor without writing it, or only describe one anew.
_WITHOUT_LAUNCH = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.detach, aten._unsafe_view, aten.lift_fresh, aten.resize_, aten.set_,
}  # fmt: skip
# What they change in place they do not read.
_OVERWRITING = {
    aten.copy_, aten.fill_, aten.zero_, aten.random_, aten.uniform_, aten.normal_, aten.bernoulli_,
}  # fmt: skip
# Of their first argument they read the shape alone.
_MAKING = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like}
# With beta = 0 they do not read their first argument.
_ADDING = {aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_}
# Of their first argument they read the rows that they return.
_GATHERING = {aten.embedding, aten.index, aten.index_select, aten.gather}
# Of their first argument they write as much as they are given in the last.
_SCATTERING = {aten.index_copy_, aten.index_put_, aten.scatter_}


def launch_of(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Launch | None:
    """The launch of a call of an operator; None where the device has nothing to do."""
    operator, schema = func.overloadpacket, func._schema
    if operator in _WITHOUT_LAUNCH or _is_view(schema):
        return None
    given = list(tensors_in((args, kwargs)))
    changed: list[Tensor] = []
    output: list[Tensor] = []
    for argument, value in _named(schema, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tensors_in(value)
            # out=
            output += tensors_in(value) if argument.kwarg_only or operator in _OVERWRITING else []
    returned = list(tensors_in(result))
    written = _distinct([*changed, *(one for one in returned if not _among(one, given))])
    if not any(one.numel() for one in written):
        return None
    read = [one for one in _distinct(given) if not _among(one, output)]
    if operator in _ADDING and kwargs.get("beta", 1) == 0:
        read = [one for one in read if one is not args[0]]
    if operator in _MAKING:
        read = []
    bytes_read, bytes_written = sum(map(footprint, read)), sum(map(footprint, written))
    if operator in _GATHERING:
        bytes_read += bytes_written - footprint(args[0])
    if operator in _SCATTERING:
        bytes_read -= footprint(args[0])
        bytes_written = footprint(given[-1])
    flops = _flops(operator, args, kwargs, result)
    return Launch(
        "aten",
        str(func).removeprefix("aten.").removesuffix(".default"),
        f"{_listed(given)} -> {_listed(written)}",
        bytes_read,
        bytes_written,
        flops,
        wide=bool(flops) and is_wide(args[1].dtype),
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def _named(schema: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _is_view(schema: Any) -> bool:
    aliases = [one.alias_info for one in schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)


def _flops(operator: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Of a matrix product, in place or not, by torch's own formulas."""
    out_of_place = getattr(aten, operator.__name__.removesuffix("_"), operator)
    formula = flop_registry.get(out_of_place)
    # without dtypes and factors
    sizes = [one for one in args if isinstance(one, Tensor)]
    return 0 if formula is None else int(formula(*sizes, out_val=result))


def _among(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is one for one in others)


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(one): one for one in tensors}.values())


def _listed(tensors: list[Tensor], most: int = 4) -> str:
    more = "" if len(tensors) <= most else f" and {len(tensors) - most} more"
    return ", ".join(map(described, tensors[:most])) + more
