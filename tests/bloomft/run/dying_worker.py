"""``python -m bloomft.train`` whose process 1 is killed in its sixth step, the first time."""

import os
import signal

from bloomft import train
from bloomft.command_line import run_command
from bloomft.run.signals import watch_signals
from bloomft.run.state import RunState


def main() -> None:
    watch_signals()
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        take = RunState.optimizer_step

        def optimizer_step(run: RunState, rows: int) -> None:
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            take(run, rows)

        RunState.optimizer_step = optimizer_step
    run_command(train.main)


if __name__ == "__main__":
    main()
