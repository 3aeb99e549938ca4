"""What the LoRA linear must cost at least on a chip: bytes, operations, and the time at published peaks.

Arithmetic, not a measurement: max(bytes / peak memory rate, FLOP / peak matrix rate) for every tensor read or
written once.
"""

from dataclasses import dataclass

from lorakernels.aot.chips import Chip

# (K, N) of fused query-key-value projections, N = 3·K, of hidden sizes in use
SHAPES = ((1024, 3072), (1536, 4608), (2048, 6144), (2560, 7680), (4096, 12288))
ROWS, RANK, BYTES = 8192, 16, 2


@dataclass(frozen=True)
class Work:
    """One part of the operator: what it moves and computes."""

    part: str
    bytes: int
    flops: int

    def microseconds(self, chip: Chip) -> float:
        """The least time on that chip."""
        return 1e6 * max(self.bytes / chip.peak_bytes, self.flops / chip.peak_flops)


def work(m: int, n: int, k: int, r: int, size: int) -> list[Work]:
    """The parts of forward and backward in elements of size bytes, S and dS in float32."""
    x, y, weight, a, b, s = (size * m * k, size * m * n, size * n * k, size * r * k, size * r * n, 4 * m * r)
    return [
        Work("frozen forward", x + weight + y, 2 * m * n * k),
        Work("shrink", x + a + s, 2 * m * k * r),
        Work("forward", x + weight + y + s + b, 2 * m * n * (k + r)),
        Work("frozen backward", y + weight + x, 2 * m * n * k),
        Work("dS and dB", y + b + s + s + b, 4 * m * n * r),
        Work("dx", y + weight + x + s + a, 2 * m * k * (n + r)),
        Work("dA", x + s + a, 2 * m * k * r),
    ]


def table(chip: Chip) -> str:
    """The roofline of every shape on that chip, and the share that LoRA adds to the frozen layer."""
    parts = [one.part for one in work(1, 1, 1, 1, BYTES)]
    lines = [
        f"{chip.arch}, least microseconds for M={ROWS}, r={RANK}, 16 bits, at the peaks of {chip.part}: "
        f"{chip.peak_flops / 1e12:.0f} TFLOP/s, {chip.peak_bytes / 1e12:.2f} TB/s",
        f"  {'K':>6} {'N':>6} " + " ".join(f"{part:>15}" for part in parts) + f" {'LoRA adds':>10}",
    ]
    for k, n in SHAPES:
        times = {one.part: one.microseconds(chip) for one in work(ROWS, n, k, RANK, BYTES)}
        frozen = times["frozen forward"] + times["frozen backward"]
        added = sum(times.values()) - 2 * frozen
        lines.append(
            f"  {k:6d} {n:6d} "
            + " ".join(f"{times[part]:15.1f}" for part in parts)
            + f" {100 * added / frozen:9.1f}%"
        )
    return "\n".join(lines)
