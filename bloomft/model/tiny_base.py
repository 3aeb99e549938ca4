"""``builtin:tiny-from-scratch``: a small real BLOOM, pre-trained once on text that every Python ships with.

Its corpus is the docstrings of the standard library; its tokenizer, byte-level BPE like BLOOM's own, is
trained on the same text. Built on first use, in about a minute on two CPU cores, and cached.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from bloomft.config.keys import default_cache_dir
from bloomft.errors import UserError
from bloomft.files import folder_written_aside
from bloomft.model.patch import fuse_bloom, unfuse_bloom
from bloomft.progress import say, waiting

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # BLOOM's own, under BLOOM's own ids


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Size and training of a small BLOOM."""

    vocab_size: int = 4096
    hidden_size: int
    n_layer: int
    n_head: int
    sequence_length: int = 256  # tokens
    batch_size: int = 8  # rows
    lr: float
    weight_decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TinyRecipe(ModelRecipe):
    """Size and training of the embedded base; part of its cache key."""

    version: int = 1
    hidden_size: int = 192
    n_layer: int = 4
    n_head: int = 6
    lr: float = 8e-3
    steps: int = 110


def tiny_base_folder(recipe: TinyRecipe | None = None, *, cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder of the embedded base, pre-trained now if the cache does not have it.

    The folder's name holds the recipe and the Python version, whose docstrings are the corpus. Raises
    `UserError` when the cache cannot be written or this Python has no docstrings to read.
    """
    recipe = recipe or TinyRecipe()
    identity = f"{sorted(asdict(recipe).items())} {sys.version_info[:3]}"
    name = f"tiny-base-{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}"
    folder = (cache_dir or default_cache_dir()) / name
    if (folder / "config.json").is_file():
        return folder
    with folder_written_aside(folder) as scratch:
        _pretrain(recipe, scratch)
    return folder


def standard_library_docstrings() -> Iterator[str]:
    """Docstrings of the standard library: modules, classes, functions; one text per module, no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        if found := list(_docstrings(tree)):
            yield "\n\n".join(found)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like BLOOM's, with `SPECIAL_TOKENS` first."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    unk, bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """The tokens of all texts, an end of text after each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))
    return [id for encoding in encodings for id in [*encoding.ids, tokenizer.eos_token_id]]


def new_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast) -> BloomForCausalLM:
    """A BLOOM of the recipe's size and seed with random weights and the fused parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = BloomConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return fuse_bloom(BloomForCausalLM(config))


def muon_and_adamw(model: BloomForCausalLM, recipe: ModelRecipe) -> list[torch.optim.Optimizer]:
    """The optimizers of a pre-training: Muon for the hidden matrices and AdamW for the rest."""
    # Muon learns this much text about twice as fast as AdamW alone; it is meant for hidden matrices only.
    hidden = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
    return [
        torch.optim.Muon(
            hidden, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _pretrain(recipe: TinyRecipe, folder: Path) -> None:
    corpus = list(standard_library_docstrings())
    if not corpus:
        raise UserError("this Python has no standard-library sources to pre-train a base on")
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    stream = token_stream(tokenizer, corpus)
    tokens = torch.tensor(stream[: len(stream) // recipe.sequence_length * recipe.sequence_length])
    model = new_model(recipe, tokenizer)
    _fit(model, tokens.view(-1, recipe.sequence_length), recipe)
    unfuse_bloom(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit(model: BloomForCausalLM, rows: torch.Tensor, recipe: TinyRecipe) -> None:
    optimizers = muon_and_adamw(model, recipe)
    warmup = max(1, recipe.steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 1 - step / recipe.steps)
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    model.train()
    say(f"pre-training a tiny base once: {recipe.steps} steps on {rows.numel():,} tokens of docstrings")
    with waiting("pre-training a tiny base, step", recipe.steps) as wait:
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(recipe.steps):
            if len(order) < recipe.batch_size:
                order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
            picked, order = order[: recipe.batch_size], order[recipe.batch_size :]
            loss = model(rows[picked], labels=rows[picked]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            wait.advance(1)
            wait.status = f"loss {loss.item():.3f}"
    say(f"pre-trained: loss {loss.item():.3f}")
    model.eval()
