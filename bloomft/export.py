"""Turn a checkpoint into files that other programs load: ``python -m bloomft.export CONFIG CHECKPOINT``.

``--format merged`` (default) is a Hugging Face folder; ``--format adapter`` is PEFT's format.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores

    share_cores()  # before torch is imported

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BloomForCausalLM

from bloomft.batch import IGNORE_INDEX, Batch
from bloomft.command_line import CommandParser, parse_command, run_command
from bloomft.config.keys import Config
from bloomft.data.loading import load_data
from bloomft.errors import UserError
from bloomft.files import check_folder, folder_written_aside
from bloomft.model.base import Base, load_base, quiet_transformers
from bloomft.model.base_identity import EXPORT_MARK
from bloomft.model.patch import fuse_bloom, unfuse_bloom, unpatch_bloom
from bloomft.model.peft_format import save_peft_adapter
from bloomft.process import pick_device, setup_process
from bloomft.progress import Task, waiting
from bloomft.run.checkpoint import find_checkpoint, load_checkpoint
from bloomft.run.evaluation import evaluate
from bloomft.run.trained_model import load_trained


@dataclass
class MergeShift:
    """How far merging moved the model: the price of rounding W + s·B·A to the base's dtype.

    Attributes:
        logits: largest absolute difference of the logits on the probed rows, and ``logits_scale`` the largest
            absolute logit there.
        unmerged_loss, merged_loss: held-out losses, None without held-out text.
        transformers_loss: that of the merged model with transformers' own attention, which differs in 16
            bits; None in float32 and without held-out text.
    """

    logits: float
    logits_scale: float
    unmerged_loss: float | None
    merged_loss: float | None
    transformers_loss: float | None


def export(config: Config, checkpoint: Path, output: Path, kind: str) -> MergeShift | None:
    """Write ``output`` from ``checkpoint``; ``kind`` is "merged" or "adapter".

    The folder is written under a temporary name and atomically replaces an earlier export; anything else
    there is a `UserError`, and so are logits or losses that are not finite. Returns how far merging moved the
    model, None for an adapter.
    """
    base_name = os.path.expanduser(config.model.transformer.pretrained_model_name_or_path)
    kept = (Path.cwd(), checkpoint, Path(base_name))
    _check_output(output, kept)
    check_folder(output)
    device = pick_device(config.train.device)  # fails before a base is loaded
    state = load_checkpoint(checkpoint)
    base = load_base(config.model.transformer)
    model = load_trained(base, state, checkpoint, device)
    shift = None
    if kind == "merged":
        model, shift = _merge(config, base, model, checkpoint)
    with waiting(f"writing {output}"), folder_written_aside(output) as scratch:
        if kind == "merged":
            model.save_pretrained(scratch)
            base.tokenizer.save_pretrained(scratch)
        else:
            save_peft_adapter(model, scratch, base.location, config.model.transformer.revision)
        about = {"checkpoint": checkpoint.name, "step": state.step, "format": kind}
        about["base"] = base.identity
        about["files"] = sorted(path.name for path in scratch.iterdir())
        (scratch / EXPORT_MARK).write_text(json.dumps(about, indent=2) + "\n")
        _check_output(output, kept)  # loading took a while
    return shift


def _check_output(output: Path, kept: Iterable[Path]) -> None:
    """Raise `UserError` unless ``output`` is new, empty, or an earlier export with no other file in it.

    It must neither be nor contain any of the paths ``kept``.
    """
    folder = Path(os.path.realpath(output))
    for path in kept:
        if Path(os.path.realpath(path)).is_relative_to(folder):
            raise UserError(f"--output {output}: the export would replace {path}; name a separate folder")
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; choose another folder with --output") from error
    if not names:
        return
    try:
        listed = json.loads((folder / EXPORT_MARK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        raise UserError(f"{output}: exists and is not an earlier export; choose another folder with --output")
    if foreign := sorted(name for name in names - {EXPORT_MARK} if name not in listed):
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise UserError(
            f"{output}: {shown}: not written by the earlier export there; move it or choose --output"
        )


def _merge(
    config: Config, base: Base, model: BloomForCausalLM, checkpoint: Path
) -> tuple[BloomForCausalLM, MergeShift]:
    """Plain transformers with the adapters in its weights, and how far that moved it."""
    try:
        heldout = load_data(config.data, base.tokenizer).heldout
    except UserError as error:
        print(f"held-out loss is not compared: {error}")
        heldout = None
    if heldout is not None:
        probe = next(heldout.eval_batches(1))["input_ids"]
    else:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(model.config.vocab_size, (1, config.data.max_length), generator=generator)
    measured = []
    for merging in (False, True):
        if merging:
            # Fused again for the measurement: plain transformers would ignore document_ids.
            with waiting("merging"):
                model = fuse_bloom(unpatch_bloom(model, merge=True).requires_grad_(False))
        with torch.no_grad():
            logits = model(probe.to(model.device), use_cache=False).logits.float()
        loss = (
            None
            if heldout is None
            else evaluate(model, heldout, config.train.batch_size, config.train.eval_max_batches)
        )
        measured.append((logits, loss))
    (unmerged, unmerged_loss), (merged, merged_loss) = measured
    unfuse_bloom(model)
    transformers_loss = None
    if heldout is not None and base.dtype.itemsize == 2:
        batches = heldout.eval_batches(config.train.batch_size, config.train.eval_max_batches)
        with waiting(
            "row of plain transformers", len(heldout.eval_rows(config.train.eval_max_batches))
        ) as wait:
            transformers_loss = _loss_by_document(model, batches, wait)
    shift = MergeShift(
        (merged - unmerged).abs().max().item(),
        unmerged.abs().max().item(),
        unmerged_loss,
        merged_loss,
        transformers_loss,
    )
    for name, value in dataclasses.asdict(shift).items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{checkpoint}: {name} is {value} after merging; nothing was written")
    return model, shift


@torch.no_grad()
def _loss_by_document(model: BloomForCausalLM, batches: Iterable[Batch], wait: Task) -> float:
    """Mean loss over the labels, in nats per token, of a plain model, which does not support packing."""
    total, count = 0.0, 0
    for batch in batches:
        for ids, labels, documents in zip(
            batch["input_ids"], batch["labels"], batch["document_ids"], strict=True
        ):
            for document in documents[documents >= 0].unique().tolist():
                own = documents == document
                text, targets = (tensor[own][None].to(model.device) for tensor in (ids, labels))
                total += model(text, labels=targets, use_cache=False, num_items_in_batch=1).loss.item()
                count += int((targets != IGNORE_INDEX).sum())
            wait.advance(1)
    return total / count


_USAGE = """CONFIG CHECKPOINT [--output DIR]
       [--format merged|adapter] [key=value ...]"""
_ABOUT = """Turn a checkpoint into files that other programs load: a whole model in Hugging
Face's format (merged), or its adapter in PEFT's (adapter)."""
_EXAMPLES = {
    "run.yaml last.ckpt": "the merged model, into runs/run/merged",
    "run.yaml step-500.ckpt --format adapter": "an earlier state, as an adapter",
}


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG CHECKPOINT [--output DIR] [--format merged|adapter] [key=value ...]."""
    parser = CommandParser("export", _USAGE, _ABOUT, _EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or its name inside the run's folder"
    )
    parser.add_argument("--output", metavar="DIR", help="folder to write; default <run folder>/<format>")
    parser.add_argument("--format", choices=("merged", "adapter"), default="merged", help="default: merged")
    options, config = parse_command(parser, arguments)
    setup_process()
    quiet_transformers()
    run_dir = config.train.run_dir
    checkpoint = find_checkpoint(options.checkpoint, run_dir)
    output = Path(options.output) if options.output else run_dir / options.format
    shift = export(config, checkpoint, output, options.format)
    if shift is not None:
        print(
            f"merged in float32: logits moved by at most {shift.logits:.2e} "
            f"(largest logit {shift.logits_scale:.2f})"
        )
        if shift.merged_loss is not None and shift.unmerged_loss is not None:
            moved = shift.merged_loss - shift.unmerged_loss
            print(
                f"held-out loss {shift.unmerged_loss:.6f} unmerged, "
                f"{shift.merged_loss:.6f} merged ({moved:+.1e})"
            )
        if shift.transformers_loss is not None:
            print(
                f"held-out loss {shift.transformers_loss:.6f} with transformers' own attention, which rounds "
                "scores and biases to 16 bits"
            )
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
