"""Every Triton launch happens while its tensors' device is the current one."""

import contextlib

import pytest
import torch

from lorakernels.ops.linear_cross_entropy import triton as cross_entropy
from lorakernels.ops.lora_linear import triton as lora_linear


class Launches:
    """Stands in for torch.cuda.device_of and for the kernels; notes the tensor whose device is current."""

    def __init__(self) -> None:
        self.current: list[torch.Tensor] = []
        self.seen: list[tuple[str, torch.Tensor | None]] = []

    @contextlib.contextmanager
    def device_of(self, tensor: torch.Tensor):
        self.current.append(tensor)
        yield
        self.current.pop()

    def watched(self, name: str, kernel):
        class Watched:
            def __getitem__(_, grid):
                self.seen.append((name, self.current[-1] if self.current else None))
                return kernel[grid]

        return Watched()


@pytest.fixture
def launches(monkeypatch) -> Launches:
    watch = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", watch.device_of)
    for module in (cross_entropy, lora_linear):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, watch.watched(name, getattr(module, name)))
    return watch


def test_linear_cross_entropy(launches, device):
    hidden, weight = torch.randn(6, 16, device=device), torch.randn(30, 16, device=device)
    labels = torch.arange(6, device=device)
    losses, statistics, _ = cross_entropy.forward(hidden, weight, labels, True)
    cross_entropy.weight_gradient(hidden, weight, labels, losses, statistics, losses)
    names = {name for name, _ in launches.seen}
    assert names == {"linear_cross_entropy_forward_kernel", "linear_cross_entropy_backward_kernel"}
    assert all(tensor is hidden for _, tensor in launches.seen)


def test_lora_linear(launches, device):
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((6, 16), (30, 16), (30,)))
    lora_a, lora_b, dy = (torch.randn(*shape, device=device) for shape in ((4, 16), (30, 4), (6, 30)))
    seed = torch.ones(1, dtype=torch.int64, device=device)
    _, s = lora_linear.forward(x, weight, bias, lora_a, lora_b, 1.0, 0.5, seed)
    for needs in ((True, True, True), (True, False, False)):
        lora_linear.backward(dy, x, weight, lora_a, lora_b, s, 1.0, 0.5, seed, needs)
    assert {name for name, _ in launches.seen} == {
        "lora_linear_shrink_kernel",
        "lora_linear_reduce_kernel",
        "lora_linear_forward_kernel",
        "lora_linear_backward_kernel",
        "lora_linear_backward_a_kernel",
    }
    assert all(tensor is x for _, tensor in launches.seen)
