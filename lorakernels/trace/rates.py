"""Times computed from what a trace counts, at rates measured on one NVIDIA H200 (2026-11, torch 2.11)."""

from collections.abc import Iterable

from lorakernels.trace.record import Launch

# FLOP/s of an 8192³ bfloat16 product of random data, bytes/s of a copy that reads and writes
MATRIX_RATE, BYTES_RATE = 741e12, 4.26e12
# FLOP/s of float32 products without TF32: the data sheet's of that card, not measured
WIDE_RATE = 67e12
# seconds of the host: of an addmm, and of a Triton kernel that takes TMA descriptors, the dearest measured
HOST = {"aten": 14e-6, "triton": 50e-6, "flex": 50e-6}


def device_seconds(launches: Iterable[Launch]) -> float:
    """The sum over launches of what binds each: its bytes or its FLOPs."""
    return sum(
        max(one.bytes / BYTES_RATE, one.flops / (WIDE_RATE if one.wide else MATRIX_RATE)) for one in launches
    )


def host_seconds(launches: Iterable[Launch]) -> float:
    """What the launches alone cost the host; autograd and Python come on top."""
    return sum(HOST[one.kind] for one in launches)
