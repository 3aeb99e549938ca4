"""A checkpoint's adapters on their base: the model that was trained."""

from pathlib import Path

import torch
from transformers import BloomForCausalLM

from bloomft.config.keys import LoraConfig
from bloomft.errors import UserError
from bloomft.model.base import Base, patch_base
from bloomft.model.base_identity import check_base
from bloomft.model.patch import load_adapter_state
from bloomft.run.checkpoint import TrainingState


def load_trained(base: Base, state: TrainingState, path: Path, device: torch.device) -> BloomForCausalLM:
    """``base`` with the adapters of ``state``, read from ``path``, in the stored dtype, in eval mode.

    Raises `UserError` if the base is not the one that the checkpoint was trained on, or the adapters do not
    fit.
    """
    check_base(state.base, base.identity, path)
    try:
        model = patch_base(base, LoraConfig(**state.lora), device, base.dtype)
        load_adapter_state(model, state.adapters)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    return model.eval()
