"""Every Triton launch happens while its tensors' device is the current one."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from lorakernels.ops.linear_cross_entropy import triton as cross_entropy
from lorakernels.ops.lora_linear import triton as lora_linear
from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.ops.lora_linear.triton import parts, pointer_gemm, thin, tma_gemm
from lorakernels.ops.lora_linear.triton.tiles import Family, Gemm, Tile


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
    for module in (cross_entropy, parts, thin, pointer_gemm, tma_gemm):
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


TMA = Gemm(Family.TMA, Tile(32, 64, 32, 4, 2))


@pytest.mark.parametrize(("gemm", "kernel"), [(None, "gemm"), (TMA, "tma")])
def test_lora_linear(gemm, kernel, launches, device):
    dtype = torch.float32 if gemm is None else torch.float16
    x, weight, bias, lora_a, lora_b, dy = (
        torch.randn(*shape, device=device, dtype=dtype)
        for shape in ((6, 16), (32, 16), (32,), (4, 16), (32, 4), (6, 32))
    )
    seed = torch.ones(1, dtype=torch.int64, device=device)
    problem = Problem(x, weight, bias, lora_a, lora_b, 1.0, 0.5, seed)
    _, s = lora_linear.forward(problem, gemm=gemm)
    for needs in ((True, True, True), (True, False, False)):
        lora_linear.backward(problem, dy, s, needs, gemm=gemm)
    names = ("pack", "shrink", "reduce", "backward", "sum", kernel)
    assert {name for name, _ in launches} == {f"lora_linear_{name}_kernel" for name in names}
    assert all(tensors and tensors[-1] is x for _, tensors in launches)
