"""The whole workflow on the embedded model: ``python -m bloomft.demo [key=value ...]``.

Pre-trains the small base if the cache does not have it, fine-tunes it with LoRA on the READMEs installed in
this environment, and shows held-out losses and one prompt completed before and after.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores

    share_cores()  # before torch is imported

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from bloomft.command_line import CommandParser, call_command, run_command, split_overrides
from bloomft.config.loading import find_config, load_config
from bloomft.errors import UserError
from bloomft.model.base import SCRATCH_BASE, quiet_transformers
from bloomft.process import setup_process
from bloomft.run.checkpoint import LAST, load_checkpoint
from bloomft.run.generation import Sampling, generate, load_for_generation
from bloomft.run.log import METRICS

CONFIG = "configs/bloom-tiny.yaml"
BASE_KEY = "model.transformer.pretrained_model_name_or_path"
PROMPT = "# tinyfetch\n\n## Installation\n\n"


_ABOUT = """The whole workflow on a small embedded model: fine-tune it with LoRA on the
READMEs of the installed Python packages, then show held-out losses and what it
writes before and after."""
_EXAMPLES = {
    "": "a minute or two on two CPU cores",
    "optim.scheduler.num_training_steps=20": "in less time",
    "--from-scratch": "with a base that is pre-trained on this machine",
}


def main(arguments: Sequence[str]) -> None:
    """The command: [key=value ...]; overrides of ``configs/bloom-tiny.yaml``."""
    parser = CommandParser("demo", "[--from-scratch] [key=value ...]", _ABOUT, _EXAMPLES)
    parser.add_argument(
        "--from-scratch", action="store_true", help="pre-train the base here, once, for a minute or two"
    )
    options, overrides = split_overrides(parser, arguments)
    if options.from_scratch:
        overrides = [f"{BASE_KEY}={SCRATCH_BASE}", *overrides]
    start = time.perf_counter()
    setup_process()
    quiet_transformers()
    console = Console(highlight=False)
    config = str(find_config(CONFIG))
    run_dir = load_config(config, overrides).train.run_dir
    call_command("train", [config, *overrides])
    base_loss, loss = _held_out_losses(run_dir)

    sampling = Sampling(max_new_tokens=120, temperature=0.5, top_p=0.9, repetition_penalty=1.25, seed=1)
    checkpoint = str(run_dir / LAST)
    for title, source in (("the base writes", None), ("after fine-tuning", checkpoint)):
        model, tokenizer = load_for_generation(config, source, overrides)
        text = PROMPT + generate(model, tokenizer, PROMPT, sampling)
        console.print(Panel(text, title=title, title_align="left"), markup=False)

    table = Table("held-out READMEs", "loss (nats per token)", "perplexity", title_justify="left")
    for name, value in (("base", base_loss), ("after fine-tuning", loss)):
        table.add_row(name, f"{value:.4f}", f"{math.exp(value):.1f}")
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s in total; the run is in {run_dir}/. Next:")
    for command in (
        f'python -m bloomft.generate {CONFIG} last.ckpt --prompt "# My project"',
        f"python -m bloomft.export {CONFIG} last.ckpt",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _held_out_losses(run_dir: Path) -> tuple[float, float]:
    """Held-out losses of the base and after the last step, read from the run's folder."""
    before = load_checkpoint(run_dir / LAST).base_eval_loss
    last = json.loads((run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    if before is None or "eval_loss" not in last:
        raise UserError(f"{CONFIG}: nothing is held out, so there is no loss to compare")
    return before, last["eval_loss"]


if __name__ == "__main__":
    run_command(main)
