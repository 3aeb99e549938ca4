"""Text from the base or a trained model, and the loading of that model."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BloomForCausalLM, GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from bloomft.config.keys import TransformerConfig
from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.model.base import Base, load_base, patch_base
from bloomft.model.base_identity import check_adapter_base, check_merged_base, refuse_adapter_alone
from bloomft.model.patch import fuse_bloom
from bloomft.model.peft_format import CONFIG_NAME, load_peft_adapter, load_peft_config
from bloomft.process import pick_device
from bloomft.run.checkpoint import find_checkpoint, load_checkpoint
from bloomft.run.trained_model import load_trained


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a temperature of 0 always takes the most likely token.

    ``repetition_penalty`` divides the logits of tokens that the text has already (arXiv:1909.05858, section
    4.1); 1 leaves them.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0


def generate(
    model: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> str:
    """The continuation of ``prompt``, without the prompt and without special tokens.

    It ends with the tokenizer's end of text or one that the model's generation_config names, or after
    ``sampling.max_new_tokens``; nothing else of that generation_config has an effect. A ``streamer`` is
    given the text as it is generated. Raises `UserError` for a prompt without a single token and for ends of
    text that are not token ids.
    """
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    if encoded["input_ids"].shape[1] == 0:
        raise UserError("--prompt: expected at least one character")
    input_ids = encoded["input_ids"].to(model.device)
    settings = _generation_config(model, tokenizer, sampling)
    torch.manual_seed(sampling.seed)
    with torch.no_grad(), _replaced_generation_config(model, settings):
        output = model.generate(
            input_ids,
            generation_config=settings,
            attention_mask=torch.ones_like(input_ids),
            streamer=streamer,
        )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)[0]


def _generation_config(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> GenerationConfig:
    """What ``sampling`` says, and of the model's own generation_config its ends of text."""
    drawing: dict[str, bool | float] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    for end in ends:
        if end is not None and type(end) is not int:
            raise UserError(f"generation_config.json: eos_token_id is {own!r}; expected token ids")
    # The tokenizer's too: training ends every document with it.
    ids = {end for end in (tokenizer.eos_token_id, *ends) if end in range(model.config.vocab_size)}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(ids) or None,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **drawing,
    )


@contextlib.contextmanager
def _replaced_generation_config(model: BloomForCausalLM, settings: GenerationConfig) -> Iterator[None]:
    """Inside, ``settings`` is the model's own, from which ``model.generate`` fills in what is not set."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def load_for_generation(
    source: str, checkpoint: str | None, overrides: Sequence[str] = ()
) -> tuple[BloomForCausalLM, PreTrainedTokenizerFast]:
    """Model in eval mode and tokenizer.

    ``source`` is a configuration or a folder with a merged model. ``checkpoint`` is None (the base alone), a
    checkpoint, or an exported folder: an adapter is put on the base, a merged model is loaded as it is.
    """
    if os.path.isdir(source):  # unlike Path.is_dir, no error for a name that is too long
        if checkpoint is not None or overrides:
            raise UserError(f"{source}: a folder is used as it is, without checkpoint or key=value")
        refuse_adapter_alone(Path(source))
        return _load_folder(source, pick_device("auto"))
    config = load_config(source, overrides)
    device = pick_device(config.train.device)  # fails before a base is loaded
    if checkpoint is None:
        return _fused(load_base(config.model.transformer), device)
    path = find_checkpoint(checkpoint, config.train.run_dir)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _load_adapter_folder(config.model.transformer, path, device)
    if path.is_dir():
        check_merged_base(path, config.model.transformer)
        return _load_folder(str(path), device)
    state = load_checkpoint(path)
    base = load_base(config.model.transformer)
    return load_trained(base, state, path, device), base.tokenizer


def _load_folder(folder: str, device: torch.device) -> tuple[BloomForCausalLM, PreTrainedTokenizerFast]:
    return _fused(load_base(TransformerConfig(pretrained_model_name_or_path=folder)), device)


def _fused(base: Base, device: torch.device) -> tuple[BloomForCausalLM, PreTrainedTokenizerFast]:
    """A base without adapters in the fused parts that it is trained in, so that both generate alike."""
    model = base.model.to(device).requires_grad_(False)  # type: ignore[arg-type]  # as in patch_base
    return fuse_bloom(model).eval(), base.tokenizer


def _load_adapter_folder(
    transformer: TransformerConfig, folder: Path, device: torch.device
) -> tuple[BloomForCausalLM, PreTrainedTokenizerFast]:
    shape = load_peft_config(folder)
    base = load_base(transformer)
    if (note := check_adapter_base(folder, base.identity)) is not None:
        print(note, file=sys.stderr)
    model = patch_base(base, shape, device, base.dtype)
    load_peft_adapter(model, folder)
    return model.eval(), base.tokenizer
