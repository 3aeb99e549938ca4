"""Load a BLOOM base model and its tokenizer, and tell one base from another."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, BloomForCausalLM, PreTrainedTokenizerFast

from bloomft.config import ModelConfig, TransformerConfig
from bloomft.errors import UserError
from bloomft.patch import patch_bloom

TINY_BASE = "builtin:tiny"


@dataclass
class Base:
    """A frozen base model in its stored dtype, with the identity that checkpoints remember.

    ``name`` is what the configuration says, ``location`` what ``from_pretrained`` was given.
    """

    model: BloomForCausalLM
    tokenizer: PreTrainedTokenizerFast
    name: str
    location: str
    dtype: torch.dtype
    fingerprint: str

    @property
    def pad_token_id(self) -> int:
        """What fills the ends of rows; never attended to and never a label."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def load_base(config: TransformerConfig) -> Base:
    """Load model and tokenizer from the hub, a folder, or the embedded ``builtin:tiny`` (made on first use).

    The weights keep the dtype they are stored in, on the CPU. Raises `UserError` when they are not to be had,
    are not BLOOM, or do not belong together.
    """
    name = config.pretrained_model_name_or_path
    if name == TINY_BASE:
        from bloomft.tiny_base import tiny_base_folder

        location, options = str(tiny_base_folder()), {}
    else:
        location = os.path.expanduser(name)
        keys = ("revision", "subfolder", "cache_dir", "local_files_only", "token")
        options = {key: value for key in keys if (value := getattr(config, key)) is not None}
        # A path that is not there must not be taken for a hub name.
        if not Path(location).is_dir() and (location.startswith((".", "/")) or location.count("/") > 1):
            key = "model.transformer.pretrained_model_name_or_path"
            raise UserError(f"{location}: no such folder; {key} names a hub model or a local folder")
    try:
        with Console(stderr=True).status(f"loading {name}"):
            kind = AutoConfig.from_pretrained(location, **options).model_type
            if kind != "bloom":
                raise UserError(f"{name}: a {kind} model; this program fine-tunes BLOOM models only")
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            model = BloomForCausalLM.from_pretrained(location, dtype="auto", **options)
    except (OSError, ValueError) as error:
        raise UserError(_not_loaded(name, error)) from error
    if not tokenizer.is_fast:
        raise UserError(f"{name}: no fast tokenizer (tokenizer.json) among its files")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    return Base(model, tokenizer, name, location, model.dtype, fingerprint(model))


def patch_base(base: Base, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> BloomForCausalLM:
    """Move the base to ``device`` and ``dtype`` and put fresh adapters in: the model that trains."""
    model = base.model.to(device=device, dtype=dtype)
    lora = config.lora
    try:
        return patch_bloom(
            model,
            lora.lora_dim,
            lora.lora_scale,
            lora.attention_layer_name,
            lora.lora_dropout,
            lora.parts,
        )
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error


def fingerprint(model: BloomForCausalLM, samples: int = 1024) -> str:
    """Hash of the architecture and of ``samples`` evenly spaced elements of each stored parameter.

    Cheap on the largest model; two bases that differ anywhere to speak of differ here. Take it in the stored
    dtype, before any cast.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().reshape(-1)
        picked = flat[
            torch.linspace(0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64).long()
        ]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(picked.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a command's own output."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _not_loaded(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        return f"{name}: not a loadable BLOOM folder (config.json, tokenizer.json, *.safetensors): {first}"
    return (
        f"{name}: cannot be had from the model hub ({type(error).__name__}) and is no local folder; "
        f"download it elsewhere and pass model.transformer.pretrained_model_name_or_path=/path/to/the/folder"
    )
