"""Which modules do what their class says and nothing else, so that calling them may be replaced."""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly a ``kind``, with its class's forward and no hook.

    A subclass, PyTorch's parametrizations among them, may compute something else.
    """
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered to run when ``module`` is called or in its backward pass."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def replaced_method(module: nn.Module) -> str | None:
    """The name of a method that the instance overrides, as accelerate's hooks do with forward."""
    own, instance = vars(type(module)), vars(module)
    return next((name for name in instance if callable(own.get(name))), None)
