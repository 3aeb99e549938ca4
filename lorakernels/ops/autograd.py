"""What autograd may do with an operator: differentiate it once."""

from collections.abc import Callable
from typing import NoReturn


def differentiable_once(operator: str) -> Callable[..., NoReturn]:
    """What an operator's backward, itself an operator, is registered with as its own backward: it raises.

    Raises RuntimeError, naming the operator, where a gradient of its gradient is asked for.
    """

    def refuse(ctx, *_gradients):
        raise RuntimeError(
            f"{operator} is differentiable once: its backward has no gradient (double backward)"
        )

    return refuse
