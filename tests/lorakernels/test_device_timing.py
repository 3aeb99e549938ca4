"""Times of a device alone: what is between the events, and in which order, on stand-ins for torch.cuda."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels import device_timing

L2 = 5000
# milliseconds of the device that a write of the flush buffer, an eager call and a replay take
FLUSH, EAGER, REPLAY = 100.0, 7.0, 3.0


class Device:
    """A device whose clock the work moves, and a log of that work."""

    def __init__(self, capture_fails: bool):
        self.now, self.log, self.capturing, self.streams = 0.0, [], False, []
        self.capture_fails = capture_fails

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def call(self) -> None:
        assert self.streams, "not on a stream of its own"
        if self.capturing and self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.work("captured" if self.capturing else "call", 0.0 if self.capturing else EAGER)

    @contextlib.contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        assert (stream, capture_error_mode) == (self.streams[-1], "thread_local")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            graph.replay = lambda: self.work("replay", REPLAY)

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def make_stream(self, device):
        return SimpleNamespace(
            wait_stream=lambda other: self.log.append(f"wait for {other}"),
            synchronize=lambda: self.log.append("synchronize"),
        )

    def event(self, enable_timing):
        assert enable_timing

        def record():
            self.log.append("event")
            event.at = self.now

        event = SimpleNamespace(record=record, elapsed_time=lambda other: other.at - event.at)
        return event


class Writes(TorchDispatchMode):
    """Tells the device of every write of zeros."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.zero_.default:
            self.device.work(f"flush {args[0].nbytes}", FLUSH)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch, request) -> Device:
    device = Device(request.param)
    for name, value in {
        "Stream": device.make_stream, "stream": device.stream, "current_stream": lambda _: "the caller's",
        "Event": device.event, "CUDAGraph": SimpleNamespace, "graph": device.graph,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=L2),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def times(device: Device, rounds: int) -> list[float]:
    with Writes(device):
        return device_timing.seconds(device.call, torch.device("cpu"), rounds)


ROUND = [f"flush {2 * L2}", "event", "replay", "event"]


@pytest.mark.parametrize("device", [False], indirect=True)
def test_a_replayed_graph_is_timed_and_the_flush_is_not(device):
    assert times(device, 3) == pytest.approx(3 * [1e-3 * REPLAY])
    assert device.log == ["wait for the caller's", "call", "call", "captured", *3 * ROUND, "synchronize"]


@pytest.mark.parametrize("device", [True], indirect=True)
def test_what_cannot_be_captured_is_called(device):
    assert times(device, 2) == pytest.approx(2 * [1e-3 * EAGER])
    eager = ["call" if one == "replay" else one for one in ROUND]
    assert device.log == ["wait for the caller's", "call", "call", *2 * eager, "synchronize"]
    assert not device.streams
