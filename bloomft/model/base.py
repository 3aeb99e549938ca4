"""Load a BLOOM base model and its tokenizer, and tell one base from another."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BloomForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bloomft.config.keys import LoraConfig, TransformerConfig, default_cache_dir
from bloomft.errors import UserError
from bloomft.files import in_use, mark_used
from bloomft.model.base_files import (
    INDEX,
    StoredTensors,
    base_file,
    check_complete,
    check_tensors,
    damaged_file,
    remembered_fingerprint,
    weight_files,
)
from bloomft.model.base_identity import base_identity
from bloomft.model.patch import patch_bloom
from bloomft.process import check_memory, release_mapped_pages
from bloomft.progress import say, waiting

TINY_BASE = "builtin:tiny"  # carried by the package
SCRATCH_BASE = "builtin:tiny-from-scratch"  # pre-trained on first use
EMBEDDED_BASE = Path(__file__).parent / "embedded_base"  # see recipe.json there, and pretraining/


@dataclass
class Base:
    """A frozen base model in its stored dtype, with the identity that checkpoints remember.

    ``name`` is what the configuration says, ``location`` what ``from_pretrained`` was given; ``stored`` reads
    the weights' files; ``identity`` is name, revision, subfolder and fingerprint, see `base_identity`.
    """

    model: BloomForCausalLM
    tokenizer: PreTrainedTokenizerFast
    name: str
    location: str
    stored: StoredTensors
    dtype: torch.dtype
    identity: dict[str, str | None]


def load_base(config: TransformerConfig, *, weights: bool = True) -> Base:
    """Load model and tokenizer from the hub, a folder, or an embedded base: ``builtin:tiny``, which the
    package carries, or ``builtin:tiny-from-scratch``, pre-trained on first use.

    The weights keep the dtype they are stored in, whatever config.json says of it, on the CPU; where they are
    stored in several, all get the narrowest that holds each of them exactly, and a line on stderr says so.
    Without ``weights`` the model stays on the meta device, for `shard_base` to fill, and its files are only
    checked and identified.
    Only safetensors files are read. Raises `UserError`, with the file where there is one, when model or
    tokenizer cannot be loaded, are not BLOOM's, are not exactly the tensors that config.json describes, or
    do not belong together.
    """
    name = config.pretrained_model_name_or_path
    location, options = _location(config)
    folder, reading = None, "config.json"
    try:
        with waiting(f"loading {name}"), in_use(Path(location) / "config.json"):
            folder = base_file(location, "config.json", options).parent
            settings = AutoConfig.from_pretrained(location, **options)
            _check_settings(name, settings, folder)
            reading = "tokenizer.json"
            loaded = AutoTokenizer.from_pretrained(location, **options)
            tokenizer = _checked_tokenizer(name, loaded, settings.vocab_size)
            reading = INDEX
            files = weight_files(location, options)
            dtypes = check_tensors(files, settings)
            dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()
            stored = StoredTensors(files)
            where = files[0] if len(files) == 1 else folder / INDEX
            if weights:
                pair: tuple[BloomForCausalLM, dict[str, set[str]]]
                pair = BloomForCausalLM.from_pretrained(  # type: ignore[assignment]  # two with output_loading_info
                    location, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
                )
                model, found = pair
                check_complete(found["missing_keys"], found["unexpected_keys"], where)
            else:
                with torch.device("meta"):
                    model = BloomForCausalLM(settings).eval()
                if model.lm_head.weight is not model.transformer.word_embeddings.weight:
                    raise UserError(f"{name}: its head is not the embedding; train.strategy=ddp can train it")
                torch.nn.Module.to(model, dtype)
                stored.check_complete(model, where)
        if len(dtypes) > 1:
            *narrow, wide = (str(each).removeprefix("torch.") for each in (*sorted(dtypes, key=str), dtype))
            say(f"{name}: stored in {' and '.join(narrow)}, loaded in {wide}")
        fingerprint = remembered_fingerprint(model, files, default_cache_dir())
    except UserError:
        raise
    except Exception as error:  # whatever the parsers of transformers and tokenizers raise on a damaged file
        raise UserError(_not_loaded(name, folder, reading, error)) from error
    return Base(model, tokenizer, name, location, stored, model.dtype, base_identity(config, fingerprint))


def _location(config: TransformerConfig) -> tuple[str, dict[str, Any]]:
    """The arguments of ``from_pretrained``: a folder or a name on the hub, and options."""
    name = config.pretrained_model_name_or_path
    if name == TINY_BASE:
        return str(EMBEDDED_BASE), {}
    if name == SCRATCH_BASE:
        from bloomft.model.tiny_base import tiny_base_folder

        folder = tiny_base_folder()
        mark_used(folder / "config.json")
        return str(folder), {}
    location = os.path.expanduser(name)
    keys = ("revision", "subfolder", "cache_dir", "local_files_only", "token")
    options = {key: value for key in keys if (value := getattr(config, key)) is not None}
    # A missing path must not be taken for a hub name.
    if not os.path.isdir(location) and (location.startswith((".", "/")) or location.count("/") > 1):
        key = "model.transformer.pretrained_model_name_or_path"
        raise UserError(f"{location}: no such folder; {key} names a hub model or a local folder")
    return location, options


def _check_settings(name: str, settings: PreTrainedConfig, folder: Path) -> None:
    if settings.model_type != "bloom":
        raise UserError(f"{name}: a {settings.model_type} model; this program fine-tunes BLOOM models only")
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: has an adapter beside the base; merge it or move adapter_config.json away"
        )
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(f"{path}: quantization_config: a quantized base cannot be fine-tuned here")
    sizes = {key: getattr(settings, key) for key in ("vocab_size", "hidden_size", "n_layer", "n_head")}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {key} is {value!r}; expected an integer ≥ 1")
    if settings.hidden_size % settings.n_head:
        raise UserError(
            f"{path}: hidden_size {settings.hidden_size} is not a multiple of n_head {settings.n_head}"
        )
    if settings.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"{path}: dtype is {settings.dtype}; expected float16, bfloat16, float32 or float64")


def _checked_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: no fast tokenizer (tokenizer.json) among its files")
    highest = max([*tokenizer.get_vocab().values(), *tokenizer.all_special_ids], default=-1)
    if highest < 0:
        raise UserError(f"{name}: its tokenizer (tokenizer.json) has no tokens")
    if highest >= vocab_size:
        raise UserError(
            f"{name}: the tokenizer has token {highest}, the model tokens below {vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def patch_base(
    base: Base, lora: LoraConfig, device: torch.device, dtype: torch.dtype, tokens: int = 1
) -> BloomForCausalLM:
    """Move the base to ``device`` and ``dtype`` and add new adapters: the model to train.

    A base without weights stays on the meta device, with adapters on ``device``.

    Raises `UserError` where adapters do not fit the model, or where the device has less memory than they and
    the largest activation of ``tokens`` tokens take at the very least.
    """
    adapted = [
        layer.in_features + layer.out_features
        for name, layer in base.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(f".{lora.attention_layer_name}")
    ]
    # adapters with their gradient and two moments in float32; the feed-forward layer's input in 16 bits
    check_memory(f"model.lora.lora_dim {lora.lora_dim}", 4 * 4 * lora.lora_dim * sum(adapted), device)
    width = 4 * base.model.config.hidden_size
    check_memory(f"train.batch_size x data.max_length ({tokens} tokens)", 2 * width * tokens, device)
    on_meta = base.model.device.type == "meta"
    model = _moved(base.model, base.model.device if on_meta else device, dtype)
    try:
        return patch_bloom(
            model,
            lora.lora_dim,
            lora.lora_scale,
            lora.attention_layer_name,
            lora.lora_dropout,
            lora.parts,
            device,
        )
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error


def _moved(model: BloomForCausalLM, device: torch.device, dtype: torch.dtype) -> BloomForCausalLM:
    """``model`` on ``device`` in ``dtype``, in place; at no time are two copies of all weights in memory."""
    parameters = list(model.parameters())
    with waiting("preparing the base,", sum(p.nbytes for p in parameters), in_bytes=True) as wait:
        for parameter in parameters:
            before = parameter.data
            parameter.data = before.to(device, dtype)
            wait.advance(before.nbytes)
            if parameter.data.data_ptr() != before.data_ptr():
                release_mapped_pages(before.data_ptr(), before.nbytes)
    return model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # buffers; @wraps(Module.to) adds self


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a command's own output."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _not_loaded(name: str, folder: Path | None, reading: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if folder is not None:
        return damaged_file(folder) or f"{folder / reading}: cannot be loaded: {reason}"
    if os.path.isdir(name):
        return f"{name}: not a loadable BLOOM folder (config.json, tokenizer.json, *.safetensors): {reason}"
    return (
        f"{name}: not a local folder, and it could not be downloaded from the model hub "
        f"({type(error).__name__}); download it elsewhere and pass "
        "model.transformer.pretrained_model_name_or_path=/path/to/the/folder"
    )
