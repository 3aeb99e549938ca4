"""The GPU targets: limits that a kernel must keep, and published peaks that bound its time."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from lorakernels.ops.lora_linear.triton.tiles import Chip as Traits


@dataclass(frozen=True)
class Chip:
    """One target. Sizes in bytes; peaks (dense) from the vendor's data sheet of the part named."""

    arch: str
    target: GPUTarget
    part: str
    # shared memory one block may use, and all blocks of one multiprocessor (compute unit) together
    shared_limit: int
    shared_per_sm: int
    # multiprocessors, and threads that one holds
    multiprocessors: int
    threads: int
    # matrix rate in 16 bits with float32 accumulation, FLOP/s; memory rate, bytes/s
    peak_flops: float
    peak_bytes: float

    @property
    def nvidia(self) -> bool:
        """Whether the target is CUDA's."""
        return self.target.backend == "cuda"

    @property
    def traits(self) -> Traits:
        """What the choice of a GEMM depends on."""
        return Traits(self.target.arch // 10 if self.nvidia else 0, self.shared_limit)

    def blocks_per_sm(self, registers: int, shared: int, threads: int) -> int:
        """Blocks that fit on one multiprocessor, by registers, shared memory and threads."""
        if self.nvidia:
            # 65,536 registers in units of 8 a thread; the system takes 1 KiB of shared memory a block
            by_registers = 65536 // (max(8, -(-registers // 8) * 8) * threads)
            by_shared = self.shared_per_sm // (shared + 1024)
            return min(by_registers, by_shared, self.threads // threads, 32)
        # four SIMDs of 512 registers a lane, in units of 8, at most 8 waves each
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // (threads // 64), self.shared_per_sm // max(shared, 1), self.threads // threads)


KIB = 1024


def _cuda(
    arch: int,
    part: str,
    limit: int,
    per_sm: int,
    multiprocessors: int,
    threads: int,
    flops: float,
    rate: float,
) -> Chip:
    target = GPUTarget("cuda", arch, 32)
    return Chip(
        f"sm_{arch}",
        target,
        part,
        limit * KIB,
        per_sm * KIB,
        multiprocessors,
        threads,
        flops * 1e12,
        rate * 1e12,
    )


def _hip(arch: str, part: str, limit: int, multiprocessors: int, flops: float, rate: float) -> Chip:
    target, shared = GPUTarget("hip", arch, 64), limit * KIB
    return Chip(arch, target, part, shared, shared, multiprocessors, 2048, flops * 1e12, rate * 1e12)


CHIPS = {
    chip.arch: chip
    for chip in (
        _cuda(80, "A100 80GB SXM", 163, 164, 108, 2048, 312, 2.04),
        _cuda(89, "GeForce RTX 4090", 99, 100, 128, 1536, 165, 1.01),
        _cuda(90, "H100 SXM", 227, 228, 132, 2048, 989, 3.35),
        _cuda(100, "B200", 227, 228, 148, 2048, 2250, 8.0),
        _cuda(120, "GeForce RTX 5090", 99, 100, 170, 1536, 210, 1.79),
        _hip("gfx942", "Instinct MI300X", 64, 304, 1307, 5.3),
        _hip("gfx950", "Instinct MI355X", 160, 256, 2500, 8.0),
    )
}
