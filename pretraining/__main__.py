"""Pre-train the shipped base model: ``python -m pretraining --out DIR``.

Collects the text (see `pretraining.corpus`), trains a tokenizer on it and then the model, and
writes a Hugging Face folder in bfloat16 with ``recipe.json`` beside the weights. A run that was ended, by
SIGTERM or SIGINT or without notice, resumes from its last checkpoint under ``--work`` with the same command.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores

    share_cores()  # before torch is imported

import argparse
import contextlib
import io
import json
import math
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerFast

from bloomft.command_line import run_command
from bloomft.data.documents import installed_readmes
from bloomft.errors import UserError
from bloomft.files import write_atomically
from bloomft.model.patch import fuse_bloom, unfuse_bloom
from bloomft.model.tiny_base import (
    ModelRecipe,
    muon_and_adamw,
    new_model,
    token_stream,
    train_tokenizer,
)
from pretraining.corpus import README_REPEATS, collect

PROBE = """# Sorting tools

A small library for sorting large files. It needs Python 3.8 or newer and no other package.

## Installation

Install the latest release with pip:

    pip install sorting-tools

## Usage

The function `sort_file` takes the name of a file and returns the number of lines that were written. If the
file does not exist, a `FileNotFoundError` is raised.

    from sorting_tools import sort_file

    count = sort_file("data.txt", reverse=True)
"""  # of no source; recipe.json records the loss on it, which every machine can compute again


@dataclass(frozen=True, kw_only=True)
class Recipe(ModelRecipe):
    """Size and training of the shipped base."""

    hidden_size: int = 256
    n_layer: int = 5
    n_head: int = 4
    lr: float = 6e-3
    warmup_steps: int = 100
    decay: float = 0.4  # the last part of the run, in which the learning rate falls linearly to 0


@dataclass
class Text:
    """What training reads: tokens of the corpus, of its held-out part, and of the READMEs installed here."""

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray  # [tokens] uint16
    held_out: np.ndarray
    readmes: np.ndarray
    sources: list[dict[str, str | int]]


def prepare(recipe: Recipe, work: Path) -> Text:
    """Collect and tokenize the corpus, or read what an earlier call left in ``work``."""
    done = work / "sources.json"
    if not done.is_file():
        corpus = collect(work / "downloads", recipe.seed)
        # By the text, so that repeated texts are all on one side.
        held_out = [text for text in corpus.texts if zlib.crc32(text.encode()) % 100 == 0]
        train = [text for text in corpus.texts if zlib.crc32(text.encode()) % 100 != 0]
        tokenizer = train_tokenizer(train, recipe.vocab_size)
        tokenizer.save_pretrained(work / "tokenizer")
        for name, texts in (("train", train), ("held_out", held_out), ("readmes", installed_readmes())):
            np.save(work / f"{name}.npy", np.array(token_stream(tokenizer, texts), dtype=np.uint16))
        write_atomically(done, json.dumps(corpus.sources).encode())
    arrays = {name: np.load(work / f"{name}.npy") for name in ("train", "held_out", "readmes")}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    return Text(tokenizer=tokenizer, sources=json.loads(done.read_text()), **arrays)


class Pretraining:
    """Model, optimizers and position in the text; `save` and the constructor keep it in ``work``."""

    def __init__(self, recipe: Recipe, text: Text, work: Path) -> None:
        self.recipe, self.text, self._file = recipe, text, work / "state.pt"
        self.model = new_model(recipe, text.tokenizer)
        self._optimizers = muon_and_adamw(self.model, recipe)
        self.step = 0
        self.log: list[dict[str, float]] = []
        if self._file.is_file():
            state = torch.load(self._file, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, values in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.step, self.log = state["step"], state["log"]

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.step * self.recipe.batch_size * self.recipe.sequence_length

    def save(self) -> None:
        """Write everything that a later run needs, atomically."""
        content = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.step,
            "log": self.log,
        }
        torch.save(state, content)
        write_atomically(self._file, content.getbuffer())

    def train_step(self, progress: float) -> float:
        """One step at ``progress`` (0 to 1) of the run; returns the loss in nats a token."""
        recipe = self.recipe
        factor = min(1.0, (self.step + 1) / recipe.warmup_steps, (1 - progress) / recipe.decay)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
        rows = self._rows(self.step)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def _rows(self, step: int) -> torch.Tensor:
        """The batch [rows, tokens] of a step; each pass cuts the text at other places, in another order."""
        length, batch = self.recipe.sequence_length, self.recipe.batch_size
        rows = len(self.text.train) // length - 1
        steps_a_pass = rows // batch
        generator = np.random.default_rng([self.recipe.seed, step // steps_a_pass])
        offset = int(generator.integers(length))
        order = generator.permutation(rows)
        picked = order[step % steps_a_pass * batch :][:batch]
        starts = offset + picked[:, None] * length
        return torch.from_numpy(self.text.train[starts + np.arange(length)].astype(np.int64))


@torch.no_grad()
def mean_loss(model: BloomForCausalLM, tokens: np.ndarray, length: int) -> float:
    """Mean loss in nats a token over rows of ``length`` tokens, in the precision of the weights."""
    model.eval()
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    total = sum(model(part, labels=part).loss.item() * len(part) for part in rows.split(16))
    return total / len(rows)


def probe_loss(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean loss on `PROBE` in nats a token, in one row."""
    ids = np.array(tokenizer.encode(PROBE, add_special_tokens=False))
    return mean_loss(model, ids, len(ids))


def export(training: Pretraining, out: Path) -> None:
    """Write the model in bfloat16, the tokenizer, and ``recipe.json`` with the losses of what was written."""
    recipe, text = training.recipe, training.text
    model = unfuse_bloom(training.model.to(torch.bfloat16))
    model.save_pretrained(out)
    text.tokenizer.save_pretrained(out)
    stored = fuse_bloom(BloomForCausalLM.from_pretrained(out, dtype=torch.float32))
    record = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "corpus_tokens": len(text.train),
        "tokens_read": training.tokens,
        "steps": training.step,
        "torch": torch.__version__,
        "losses": {
            "held-out part of the corpus": round(mean_loss(stored, text.held_out, recipe.sequence_length), 4),
            "probe": round(probe_loss(stored, text.tokenizer), 4),
            "READMEs installed here": round(mean_loss(stored, text.readmes, recipe.sequence_length), 4),
        },
        "losses_are": "nats a token, of the bfloat16 weights in float32 arithmetic, rows of 256 tokens",
        "log": training.log[:: max(1, len(training.log) // 40)],
        "readme_repeats": README_REPEATS,
        "sources": text.sources,
    }
    write_atomically(out / "recipe.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"{out}: {record['losses']}", file=sys.stderr)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that ask for an end; while it is open they are collected and do nothing else."""
    requests: list[int] = []
    previous = {
        number: signal.signal(number, lambda received, _: requests.append(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> None:
    """The command: --out DIR [--work DIR] [--tokens N]."""
    parser = argparse.ArgumentParser(prog="python -m pretraining")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, default=Path("pretraining-work"), help="downloads and checkpoints"
    )
    parser.add_argument("--tokens", type=int, default=20_000_000, help="how much to read before the end")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between two checkpoints")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise UserError("--tokens must be above 0")

    options.work.mkdir(parents=True, exist_ok=True)
    text = prepare(Recipe(), options.work)
    training = Pretraining(Recipe(), text, options.work)
    print(f"{len(text.train):,} tokens; starting at step {training.step}", file=sys.stderr)
    losses: list[float] = []
    saved = logged = time.perf_counter()
    with _stop_requests() as requests:
        while training.tokens < options.tokens:
            progress = training.tokens / options.tokens
            losses.append(training.train_step(progress))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is {losses[-1]} at step {training.step}; start over with a lower lr"
                )
            if training.step % 50 == 0:
                now = time.perf_counter()
                mean = sum(losses) / len(losses)
                speed = len(losses) * training.recipe.batch_size * training.recipe.sequence_length
                training.log.append({"step": training.step, "loss": round(mean, 4)})
                print(
                    f"step {training.step} tokens {training.tokens:,} loss {mean:.4f} "
                    f"{progress:.1%} {speed / (now - logged):,.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
                losses, logged = [], now
            if requests or time.perf_counter() - saved > options.save_every:
                training.save()
                saved = time.perf_counter()
            if requests:
                print(f"stopped at step {training.step}; the same command resumes", file=sys.stderr)
                return
    training.save()
    export(training, options.out)


if __name__ == "__main__":
    run_command(main)
