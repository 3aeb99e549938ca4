"""A training step next to busy processes, by how long OpenMP's threads spin before they sleep.

    python -m benchmarks.busy_machine [--neighbours 0 1 2 4] [--seconds 15] [--json FILE]

libgomp's threads wait for each other by spinning, for many milliseconds by default: with more runnable
threads than cores, they take up the time in which the thread they wait for would have finished. The settings
are read when libgomp is loaded, so each runs in a separate process; they alternate, medians are reported.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

SETTINGS = {
    "libgomp's default": {},
    "spin count 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin count 20,000": {"GOMP_SPINCOUNT": "20000"},
}
OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
TURNS, LEAST_STEPS = 2, 3


def measure_steps(seconds: float) -> list[float]:
    """Times of steps, forward and backward, of two layers of BLOOM-560m's width; for a fresh process."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    from bloomft.model.patch import patch_bloom
    from bloomft.process import setup_process

    setup_process()
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=8192, hidden_size=1024, n_layer=2, n_head=16)
    model = patch_bloom(BloomForCausalLM(config)).train()
    ids = torch.randint(config.vocab_size, (1, 512))
    times = []
    while len(times) < LEAST_STEPS + 1 or sum(times) < seconds:
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        times.append(time.perf_counter() - start)
    return times[1:]  # the first one measures and chooses kernels


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """``count`` processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds_of_a_step(settings: dict[str, str], seconds: float) -> list[float]:
    """`measure_steps` in a process with these variables in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | settings
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--step", str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy_machine")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=15.0, help="of steps for each setting")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(measure_steps(options.step)))
        return
    table = {}
    for count in options.neighbours:
        samples = {name: [] for name in SETTINGS}
        with busy_processes(count):
            for _ in range(TURNS):
                for name, settings in SETTINGS.items():
                    samples[name] += seconds_of_a_step(settings, options.seconds / TURNS)
        table[count] = {name: round(1e3 * median(times), 1) for name, times in samples.items()}
        print(f"{count} busy processes, ms a step: {table[count]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "milliseconds": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
