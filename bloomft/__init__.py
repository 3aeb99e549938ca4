"""Fine-tune BLOOM with LoRA on the fused kernels of `lorakernels`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bloomft.model.patch import patch_bloom, unpatch_bloom

__all__ = ["patch_bloom", "unpatch_bloom"]
__version__ = "0.1.0"  # of the distribution; pyproject.toml reads it from here


def __getattr__(name: str) -> Any:
    # On first use: the commands set up their process before torch and transformers are imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bloomft.model import patch

    return getattr(patch, name)
