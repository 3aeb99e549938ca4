"""Every item of the speed half, the most important first, and what fills the caches for them."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu_check.pool import Item
from benchmarks.gpu_check.speed import (
    attention_items,
    block_items,
    gelu_items,
    layer_items,
    loss_items,
    step_items,
)
from benchmarks.gpu_check.speed.sides import EAGER, WARM


def speed_items() -> list[Item]:
    """In the order in which they are timed, one at a time."""
    modules = (step_items, layer_items, loss_items, attention_items, block_items, gelu_items)
    return [item for module in modules for item in module.items()]


def warming(items: Sequence[Item]) -> list[Item]:
    """The same once without a clock, to run side by side first: compilers write what they make to disk."""
    return [
        replace(item, name=f"compile for: {item.name}", arguments={**item.arguments, "mode": WARM})
        for item in items
        if item.arguments["mode"] == EAGER
    ]
