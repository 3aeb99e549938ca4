"""What a micro-batch's forward and backward pass read: made and checked on the host, before they start."""

import torch
from torch import Tensor

from bloomft.batch import IGNORE_INDEX, Batch, pinned
from bloomft.model.fused_classes import rows_with_labels

# Rows of the loss are filled up to a multiple of this share of all rows: so many sizes are met at most.
SIZES = 8

# By name: those of the model's forward, and where adapters drop something "seed", int64 [1].
Inputs = dict[str, Tensor]


def step_inputs(batch: Batch, labels: int, vocabulary: int, *, fill_rows: bool) -> Inputs:
    """``batch``, and ``supervised_rows`` [n] and ``num_items_in_batch`` [], both int64, on the CPU.

    ``labels`` counts those of the whole optimizer step; as a tensor, so that a captured step does not keep
    the first one's. With ``fill_rows`` n is one of `SIZES` numbers, reached by rows without a label. Raises
    ValueError for labels that are neither `IGNORE_INDEX` nor in 0..vocabulary - 1.
    """
    given = batch["labels"]
    if (known := given[given != IGNORE_INDEX]).numel():
        lowest, highest = torch.stack(known.aminmax()).tolist()
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"labels: expected 0..{vocabulary - 1} or {IGNORE_INDEX}, "
                f"got values from {lowest} to {highest}"
            )
    rows = rows_with_labels(given, batch.get("document_ids"))
    if fill_rows:
        rows = _filled(rows, given.numel())
    return {**batch, "supervised_rows": rows, "num_items_in_batch": torch.tensor(labels)}


def row_sizes(total: int) -> list[int]:
    """The numbers of rows that the loss of ``total`` rows is computed for, ascending: at most `SIZES`."""
    unit = -(-total // SIZES)
    return [*range(unit, total, unit), total]


def _filled(rows: Tensor, total: int) -> Tensor:
    """``rows`` [n] out of ``total`` and the first others, ascending, to the next of `SIZES` sizes."""
    size = next(size for size in row_sizes(total) if size >= len(rows))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[rows] = True
    others = (~chosen).nonzero()[:, 0]
    chosen[others[: size - len(rows)]] = True
    return chosen.nonzero()[:, 0]


class StaticInputs:
    """Tensors on a device that hold the inputs of one micro-batch after another, always at the same address.

    ``first`` gives their shapes, of which only the length of supervised_rows may change.
    """

    def __init__(self, first: Inputs, device: torch.device) -> None:
        self._places = {name: torch.empty_like(tensor, device=device) for name, tensor in first.items()}
        rows = first["labels"].numel()
        self._places["supervised_rows"] = torch.empty(rows, dtype=torch.int64, device=device)

    def load(self, inputs: Inputs) -> Inputs:
        """``inputs`` at their places, copied in the order of the device's work, without waiting for it."""
        loaded = {}
        for name, place in self._places.items():
            tensor = inputs[name]
            loaded[name] = place[: len(tensor)] if name == "supervised_rows" else place
            if tensor.shape != loaded[name].shape:
                raise RuntimeError(
                    f"{name}: expected shape {list(loaded[name].shape)} as before, got {list(tensor.shape)}"
                )
            loaded[name].copy_(pinned(tensor, place.device), non_blocking=True)
        return loaded
