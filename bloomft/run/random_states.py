"""The states of torch's random generators, saved and restored."""

import torch
from torch import Tensor


def rng_states() -> dict[str, Tensor]:
    """States of torch's generators: the CPU's, and those of every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng_states(states: dict[str, Tensor]) -> None:
    """Restore what `rng_states` returned; states of missing devices are ignored."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu" and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
