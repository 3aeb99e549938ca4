"""Every Triton launch happens while its tensors' device is the current one."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from lorakernels.ops.linear_cross_entropy import triton as cross_entropy
from lorakernels.ops.lora_linear import triton as lora_linear
from lorakernels.ops.lora_linear.problem import Problem


@dataclass
class Watched:
    """A kernel whose launches note the tensors whose device is the current one, innermost last."""

    name: str
    kernel: object
    current: list[torch.Tensor]
    seen: list[tuple[str, list[torch.Tensor]]]

    def __getitem__(self, grid):
        self.seen.append((self.name, list(self.current)))
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, list[torch.Tensor]]]:
    """The name of every kernel that is launched, and what torch.cuda.device_of was entered with."""
    current, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (cross_entropy, lora_linear):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Watched(name, getattr(module, name), current, seen))
    return seen


def test_linear_cross_entropy(launches, device):
    hidden, weight = torch.randn(6, 16, device=device), torch.randn(30, 16, device=device)
    labels = torch.arange(6, device=device)
    losses, statistics, _ = cross_entropy.forward(hidden, weight, labels, True)
    cross_entropy.weight_gradient(hidden, weight, labels, losses, statistics, losses)
    assert {name for name, _ in launches} == {
        "linear_cross_entropy_forward_kernel",
        "linear_cross_entropy_backward_kernel",
    }
    assert all(tensors and tensors[-1] is hidden for _, tensors in launches)


def test_lora_linear(launches, device):
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((6, 16), (30, 16), (30,)))
    lora_a, lora_b, dy = (torch.randn(*shape, device=device) for shape in ((4, 16), (30, 4), (6, 30)))
    seed = torch.ones(1, dtype=torch.int64, device=device)
    problem = Problem(x, weight, bias, lora_a, lora_b, 1.0, 0.5, seed)
    _, s = lora_linear.forward(problem)
    for needs in ((True, True, True), (True, False, False)):
        lora_linear.backward(problem, dy, s, needs)
    assert {name for name, _ in launches} == {
        "lora_linear_shrink_kernel",
        "lora_linear_reduce_kernel",
        "lora_linear_forward_kernel",
        "lora_linear_backward_kernel",
        "lora_linear_backward_a_kernel",
    }
    assert all(tensors and tensors[-1] is x for _, tensors in launches)
