"""The front page's table, from stored benchmarks of one GPU and one CPU: at most seven rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.interleave import ahead, is_ours, medians, rivals, whole

# folders under benchmarks/results
MACHINES = {"GPU": "NVIDIA-H200", "CPU": "AMD-EPYC-2-cores"}
GPU_STEP, GPU_LAYER, GPU_LOSS = "step[bloom-1b7]", "layer[bloom-1b7-8]", "loss[8192-bf16]"
CPU_STEP, CPU_STEP_BF16, CPU_LOSS = "test_step[fp32]", "test_step[bf16]", "test_loss[512-fp32]"
CPU_LAYER, CPU_LAYER_BF16, GENERATION = "test_layer[bloom-1b7-8]", "test_layer_in_bf16", "test_generation"

Cases = Mapping[str, dict]


@dataclass(frozen=True)
class Quantity:
    """Milliseconds or bytes at the peak, by rival, of one case on one device."""

    device: str
    case: dict
    of_memory: bool = False

    def by_rival(self) -> dict[str, float]:
        """The values, without those of limits."""
        return rivals(self.case.get("memory", {}) if self.of_memory else medians(whole(self.case)))

    def ours(self) -> float:
        """This project's value."""
        return next(value for name, value in self.by_rival().items() if is_ours(name))

    def others(self) -> dict[str, float]:
        """The usual rival, then the best one."""
        others = {name: value for name, value in self.by_rival().items() if not is_ours(name)}
        usual = next((name for name in others if name.startswith(("PEFT", "transformers"))), None)
        best = min(others, key=others.__getitem__)
        return {name: others[name] for name in dict.fromkeys((usual or best, best))}

    def text(self, value: float) -> str:
        """A value with its unit."""
        if self.of_memory:
            return f"{value / 2**20:.0f} MiB" if value < 1000 * 2**20 else f"{value / 2**30:.3g} GiB"
        return f"{value:.3g} ms" if value < 1000 else f"{value / 1e3:.3g} s"

    def loss(self) -> float:
        """Our value as a multiple of the best rival's."""
        return self.ours() / min(self.others().values())

    def compared(self) -> str:
        """The others' values and what multiples of ours they are; a rival that is ahead in bold."""
        texts = []
        for name, value in self.others().items():
            times = f"{value / self.ours():.2g} times"
            if value < self.ours():
                times = f"**{times}: {'smaller' if self.of_memory else 'faster'}**"
            texts.append(f"{name} {self.text(value)} ({times})")
        return ", ".join(texts)

    def what(self) -> str:
        """The case in words."""
        with_or_beyond = "with" if "memory_of_weights" in self.case else "beyond"
        return self.case["title"] + (f", memory {with_or_beyond} the weights" if self.of_memory else "")

    def where(self) -> str:
        """Device and date."""
        environment = self.case["environment"]
        cores = f"{environment['cores']} cores of " if self.device == "CPU" else ""
        return f"{cores}{environment['device']}, {self.case['date']}"


class Notes:
    """What is to be known of some cases' figures, each text once."""

    def __init__(self, cases: Iterable[dict]) -> None:
        self._texts = list(dict.fromkeys(case["note"] for case in cases if "note" in case))

    def mark(self, case: dict) -> str:
        """The number of the case's note, if it has one."""
        return f" [{self._texts.index(case['note']) + 1}]" if "note" in case else ""

    def lines(self) -> list[str]:
        """A paragraph for each."""
        return [line for at, text in enumerate(self._texts, 1) for line in ("", f"[{at}] {text}")]


def table(gpu: Cases, cpu: Cases) -> str:
    """Markdown: each row with what it was measured on and when; where a rival is ahead, in the last one."""
    steps = [("GPU", gpu[GPU_STEP]), ("CPU", cpu[CPU_STEP])]
    compared = {
        "Whole training step": [Quantity(*step) for step in steps],
        "Peak memory of that step": [Quantity(*step, of_memory=True) for step in steps],
        "Loss over the vocabulary": [Quantity("GPU", gpu[GPU_LOSS]), Quantity("CPU", cpu[CPU_LOSS])],
        "One LoRA layer, r=8": [Quantity("GPU", gpu[GPU_LAYER]), Quantity("CPU", cpu[CPU_LAYER])],
        "Generation": [Quantity("CPU", cpu[GENERATION])],
        "Where we lose, the worst of each kind": losses(gpu, cpu),
    }
    notes = Notes(one.case for row in compared.values() for one in row)
    lines = ["| | here | others, and how many times as much | measured on |", "|---|---|---|---|"]
    for name, row in compared.items():
        devices = [one.device for one in row]
        labels = devices if len(set(devices)) == len(row) else range(1, len(row) + 1)
        cells: list[list[str]] = [[f"**{name}**"], [], [], []]
        for label, one in zip(labels, row, strict=True):
            measured = one.where() + notes.mark(one.case)
            texts = (one.what(), one.text(one.ours()), one.compared(), measured)
            for cell, text in zip(cells, texts, strict=True):
                cell.append(f"{label}: {text}")
        lines.append(f"| {' | '.join('<br>'.join(cell) for cell in cells)} |")
    return "\n".join([*lines, *notes.lines()]) + "\n"


def losses(gpu: Cases, cpu: Cases) -> list[Quantity]:
    """Where another project is ahead: the worst case of each device, operation and quantity."""
    worst: dict[tuple, Quantity] = {}
    for device, cases in (("GPU", gpu), ("CPU", cpu)):
        for case in cases.values():
            for one in (Quantity(device, case), Quantity(device, case, of_memory=True)):
                kind = (device, case["group"], one.of_memory)
                if ahead(one.by_rival()) and (kind not in worst or one.loss() > worst[kind].loss()):
                    worst[kind] = one
    return list(worst.values())
