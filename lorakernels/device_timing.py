"""How long a call takes on a CUDA device alone, without the host that launches it.

The call is captured once in a CUDA graph and replayed between two events, so that neither Python nor the
operators' launches are in the time. Before each replay a buffer of twice the L2 cache is written, outside of
the events: a call inside a training step does not find its operands there either, and the write keeps the
device busy until the replay is queued. What cannot be captured is called eagerly between the events.
"""

from collections.abc import Callable

import torch

# Calls before the first one that counts: they load modules and make the vendor libraries' workspaces.
WARM_UP = 2


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """The time of each of `rounds` calls on device, the current one; call must do the same each time.

    Everything happens on a stream of its own, which waits for the work on the current stream; the host waits
    for its end. Capture is in thread-local mode: other threads may go on using the device.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
        replay = _captured(call, stream) or call
        flush = torch.empty(_flush_bytes(device), dtype=torch.uint8, device=device)
        pairs = []
        for _ in range(rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            replay()
            stop.record()
            pairs.append((start, stop))
    stream.synchronize()
    return [1e-3 * start.elapsed_time(stop) for start, stop in pairs]


def _captured(call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None] | None:
    """What replays call, None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError:
        # a synchronisation, a read on the host, or too little memory, which the eager call meets again
        return None
    return graph.replay


def _flush_bytes(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size
