"""Tensors that say they are on a GPU: what they say, what is counted, and which waits are seen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lorakernels import lora_linear
from lorakernels.trace.cases import forward_and_backward
from lorakernels.trace.pretend import trace_case
from lorakernels.trace.record import Case, HostSyncError, Trace


def traced(run: Callable[[Trace], None], **host_reads: Callable) -> Trace:
    return trace_case(Case("case", "frozen", run, host_reads))


def test_a_tensor_says_that_it_is_on_the_gpu_until_the_trace_ends():
    kept = []

    def run(trace: Trace) -> None:
        one = torch.empty(2, 3, device="cuda")
        assert (one.device, one.is_cuda, one.is_meta) == (torch.device("cuda:0"), True, False)
        assert one.to("cuda") is one
        assert (one + one).new_empty(1).device.type == torch.zeros(1).to("cuda").device.type == "cuda"
        assert torch.zeros(1).device.type == "cpu"
        kept.append(one)

    traced(run)
    assert (kept[0].device.type, kept[0].is_cuda, kept[0].is_meta) == ("meta", False, True)


def test_only_what_is_recorded_counts():
    def run(trace: Trace) -> None:
        one = torch.empty(4, 4, device="cuda").add_(1)
        with trace.recording("pass"):
            one.view(16).transpose(0, 0).mul(2)
        one.add_(1)

    counts = traced(run).passes
    assert [one.name for one in counts["pass"].launches] == ["mul.Tensor"]


# by the name under which a case allows it, calls that wait for the device
WAITING: list[tuple[str, Callable[[Tensor], object], Callable]] = [
    ("item", lambda x: x.sum().item(), lambda _: 1.0),
    ("item", lambda x: float(x[0, 0]), lambda _: 1.0),
    ("item", lambda x: bool((x > 0).any()), lambda _: True),
    ("item", lambda x: 1 if x.isnan().any() else 0, lambda _: False),
    ("tolist", lambda x: x.tolist(), lambda _: [[0.0]]),
    ("nonzero", lambda x: x.nonzero(), len),
    ("nonzero", lambda x: torch.where(x > 0), len),
    ("nonzero", lambda x: x[x > 0], len),
    ("nonzero", lambda x: x.index_put_((x > 0,), x.new_zeros(())), len),
    ("to the CPU", lambda x: x.cpu(), lambda x: torch.zeros(x.shape)),
    ("to the CPU", lambda x: x.to("cpu"), lambda x: torch.zeros(x.shape)),
    ("to the CPU", lambda x: torch.zeros(4, 4).copy_(x), lambda x: torch.zeros(x.shape)),
    ("synchronize", lambda x: torch.cuda.synchronize(), lambda _: None),
]


@pytest.mark.parametrize(("name", "call", "answer"), WAITING)
def test_a_wait_for_the_device_is_an_error_unless_it_is_allowed(name, call, answer):
    def run(trace: Trace) -> None:
        x = torch.empty(4, 4, device="cuda")
        with trace.recording("pass"):
            call(x)

    with pytest.raises(HostSyncError, match=f"the host waits for the device: {name}"):
        traced(run)
    assert traced(run, **{name: answer}).passes["pass"].host_syncs == [name]


@pytest.mark.parametrize(
    ("copy", "waits"),
    [
        (lambda: torch.zeros(3).to("cuda"), 1),
        (lambda: torch.zeros(3).to("cuda", non_blocking=True), 0),
        (lambda: torch.empty(3, device="cuda").copy_(torch.zeros(3)), 1),
        (lambda: torch.empty(3, device="cuda").copy_(torch.zeros(3), non_blocking=True), 0),
        (lambda: torch.tensor([1.0, 2.0], device="cuda"), 1),
        (lambda: torch.full((3,), 1.0, device="cuda"), 0),
    ],
)
def test_a_copy_from_pageable_memory_waits(copy, waits):
    def run(trace: Trace) -> None:
        with trace.recording("pass"):
            copy()

    assert len(traced(run).passes["pass"].host_syncs) == waits


def test_an_operators_real_body_runs_forward_and_backward():
    def run(trace: Trace) -> None:
        x = torch.empty(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(48, 32, dtype=torch.bfloat16, device="cuda")
        lora_a = torch.empty(8, 32, device="cuda", requires_grad=True)
        lora_b = torch.empty(48, 8, device="cuda", requires_grad=True)
        forward_and_backward(trace, lambda: lora_linear(x, weight, None, lora_a, lora_b, 2.0, backend="aten"))
        assert [one.grad.shape for one in (x, lora_a, lora_b)] == [x.shape, lora_a.shape, lora_b.shape]

    passes = traced(run).passes
    for name in ("forward", "backward"):
        assert {"mm", "mm.dtype", "addmm_"} <= {one.name for one in passes[name].launches}
