"""Generate text with the base or a trained model: ``python -m bloomft.generate CONFIG [CHECKPOINT]``.

Without CHECKPOINT the base generates, for comparison. The same seed gives the same text.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores

    share_cores()  # before torch is imported

import sys
from collections.abc import Sequence

from transformers import TextStreamer

from bloomft.command_line import CommandParser, run_command, split_overrides
from bloomft.errors import UserError
from bloomft.model.base import quiet_transformers
from bloomft.process import setup_process
from bloomft.run.generation import Sampling, generate, load_for_generation


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG [CHECKPOINT] --prompt TEXT [options] [key=value ...]."""
    parser = CommandParser(prog="python -m bloomft.generate", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the YAML file of the run, or an exported folder")
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint or an exported folder; default: the base")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens)
    parser.add_argument(
        "--temperature", type=float, default=Sampling.temperature, help="0: always the most likely token"
    )
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    options, overrides = split_overrides(parser, arguments)
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--max-new-tokens must be ≥ 1, --temperature ≥ 0 and --top-p in (0, 1]")
    if not 0 <= options.seed < 2**63:
        raise UserError("--seed must be ≥ 0 and < 2^63")
    setup_process()
    quiet_transformers()
    model, tokenizer = load_for_generation(options.config, options.checkpoint, overrides)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(model, tokenizer, prompt, sampling, streamer)


if __name__ == "__main__":
    run_command(main)
