"""The whole job on the embedded default: ``python -m bloomft.demo [key=value ...]``.

Pre-trains the small base if the cache does not have it, fine-tunes it with LoRA on the READMEs installed in
this environment, and shows held-out losses and one prompt completed before and after.
"""

if __name__ == "__main__":
    from bloomft.threads import share_cores

    share_cores()  # before torch is imported


import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from bloomft.config import load_config
from bloomft.errors import UserError, run_command
from bloomft.generate import Sampling, generate, load_for_generation
from bloomft.model import quiet_transformers
from bloomft.runtime import setup_process
from bloomft.signals import EXIT_STOPPED
from bloomft.train import train

CONFIG = "configs/bloom-tiny.yaml"
PROMPT = "# tinyfetch\n\n## Installation\n\n"


def main(arguments: Sequence[str]) -> None:
    """The command: [key=value ...]; overrides of ``configs/bloom-tiny.yaml``."""
    start = time.perf_counter()
    if not Path(CONFIG).is_file():
        raise UserError(f"{CONFIG}: not found; run the demo in the project's folder")
    setup_process()
    quiet_transformers()
    console = Console(highlight=False)
    config = load_config(CONFIG, arguments)
    result = train(config)
    if result.stopped:
        sys.exit(EXIT_STOPPED)
    if result.eval_loss is None or result.base_eval_loss is None:
        raise UserError(f"{CONFIG}: nothing is held out, so there is no loss to compare")

    sampling = Sampling(max_new_tokens=90, temperature=0.7, top_p=0.9, seed=1)
    checkpoint = str(result.run_dir / "last.ckpt")
    for title, source in (("the base writes", None), ("after fine-tuning", checkpoint)):
        model, tokenizer = load_for_generation(CONFIG, source, arguments)
        text = PROMPT + generate(model, tokenizer, PROMPT, sampling)
        console.print(Panel(text, title=title, title_align="left"), markup=False)

    table = Table("held-out READMEs", "loss (nats a token)", "perplexity", title_justify="left")
    for name, loss in (("base", result.base_eval_loss), ("after fine-tuning", result.eval_loss)):
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.1f}")
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s in all; the run is in {result.run_dir}/. Next:")
    for command in (
        f'python -m bloomft.generate {CONFIG} last.ckpt --prompt "# My project"',
        f"python -m bloomft.export {CONFIG} last.ckpt",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
