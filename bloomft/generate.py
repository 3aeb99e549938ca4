"""Generate text with the base or a trained model: ``python -m bloomft.generate CONFIG [CHECKPOINT]``.

Without CHECKPOINT the base generates, for comparison. The same seed gives the same text.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores

    share_cores()  # before torch is imported

import math
import sys
from collections.abc import Sequence

from transformers import TextStreamer

from bloomft.command_line import CommandParser, run_command, split_overrides
from bloomft.errors import UserError
from bloomft.model.base import quiet_transformers
from bloomft.process import setup_process
from bloomft.run.generation import Sampling, generate, load_for_generation

_USAGE = """CONFIG [CHECKPOINT] --prompt TEXT
       [--max-new-tokens N] [--temperature N] [--top-p N]
       [--repetition-penalty N] [--seed N]
       [key=value ...]"""
_ABOUT = "Generate text with the base, a checkpoint or an exported model."
_EXAMPLES = {
    "run.yaml last.ckpt --prompt '# My project'": "with what the run has learned so far",
    "run.yaml --prompt '# My project'": "with the base alone, to compare",
    "runs/run/merged --prompt - < prompt.txt": "with an exported model",
}


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG [CHECKPOINT] --prompt TEXT [options] [key=value ...]."""
    parser = CommandParser("generate", _USAGE, _ABOUT, _EXAMPLES)
    parser.add_argument(
        "config", metavar="CONFIG", help="the YAML file of the run, or a merged model's folder"
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a checkpoint or an exported folder; default: the base",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", required=True, help="text to continue; - reads standard input"
    )
    for name, kind, default, meaning in (
        ("--max-new-tokens", int, Sampling.max_new_tokens, "the most tokens to generate"),
        ("--temperature", float, Sampling.temperature, "0 takes the most likely token"),
        ("--top-p", float, Sampling.top_p, "draw from the likeliest tokens that add up to this"),
        ("--repetition-penalty", float, Sampling.repetition_penalty, "above 1 discourages repetition"),
        ("--seed", int, Sampling.seed, "the same seed gives the same text"),
    ):
        parser.add_argument(
            name, metavar="N", type=kind, default=default, help=f"{meaning}; default {default}"
        )
    options, overrides = split_overrides(parser, arguments)
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--max-new-tokens must be ≥ 1, --temperature ≥ 0 and --top-p in (0, 1]")
    if not 0 < options.repetition_penalty < math.inf:
        raise UserError("--repetition-penalty must be > 0")
    if not 0 <= options.seed < 2**63:
        raise UserError("--seed must be ≥ 0 and < 2^63")
    setup_process()
    quiet_transformers()
    model, tokenizer = load_for_generation(options.config, options.checkpoint, overrides)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.repetition_penalty, options.seed
    )
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(model, tokenizer, prompt, sampling, streamer)


if __name__ == "__main__":
    run_command(main)
