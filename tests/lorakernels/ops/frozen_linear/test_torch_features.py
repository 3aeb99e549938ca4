"""The layer after GELU under checkpointing and torch.compile, on a CPU, and in a trace as on a GPU."""

import collections

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from lorakernels import frozen_linear
from lorakernels.ops import frozen_linear as module
from lorakernels.ops.frozen_linear import implementations, triton
from lorakernels.trace.cases import empty, forward_and_backward
from lorakernels.trace.pretend import trace_case
from lorakernels.trace.record import Case, Trace


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class FeedForward:
    """Two frozen layers with GELU between them."""

    def __init__(self, width: int = 16, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        make = torch.Generator(device).manual_seed(0)
        self.up, self.down = (
            torch.randn(shape, generator=make, device=device).to(dtype) / 4
            for shape in ((4 * width, width), (width, 4 * width))
        )
        self.x = torch.randn(2, 9, width, generator=make, device=device).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return frozen_linear(frozen_linear(x, self.up), self.down, gelu=True)

    def checkpointed(self, x: Tensor) -> Tensor:
        return checkpoint(self.__call__, x, use_reentrant=False)

    def gradient(self, function) -> Tensor:
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(function(x).square().sum(), x)[0]


class Calls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_checkpointing_computes_neither_gelu_nor_the_product_again(choose_gemm, device):
    choose_gemm(widens=False)
    made = FeedForward(device=device)
    y = made.checkpointed(made.x.clone().requires_grad_())
    with Calls() as calls:
        y.sum().backward()
    counts = calls.counts
    if device == "cpu":
        assert counts["lorakernels.frozen_linear.default"] == 1  # the first layer's, which gelu's input is
    else:
        assert counts["lorakernels.frozen_linear.default"] == counts["aten.gelu.default"] == 0
    assert counts["lorakernels.frozen_linear_backward.default"] >= 1
    assert torch.equal(made.gradient(made.checkpointed), made.gradient(made))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["__call__", "checkpointed"])
def test_compiles_whole(name, compiler, choose_gemm, device, monkeypatch):
    # it would be poisoned inside the compiled graph too, which inductor does not take
    monkeypatch.setattr(torch, "empty", SHIPPED_EMPTY)
    choose_gemm(widens=False)
    made = FeedForward(device=device)
    compiled = torch.compile(getattr(made, name), fullgraph=True, backend=compiler)
    torch.testing.assert_close(made.gradient(compiled), made.gradient(made))
    with torch.no_grad():
        torch.testing.assert_close(compiled(made.x), made(made.x))


def test_what_stands_for_the_result_takes_no_memory(choose_gemm, device):
    choose_gemm(widens=False)
    x, weight = torch.randn(18, 64, device=device, requires_grad=True), torch.randn(16, 64, device=device)
    saved = module._Saved.apply(x, weight, True)
    assert saved.shape == (18, 16)
    assert saved.untyped_storage().nbytes() == saved.element_size()


# before a fixture changes it
SHIPPED_EMPTY = torch.empty
ROWS, WIDTH = 8192, 2048
PLAIN, CHECKPOINTED = (lambda run, x: run(x)), (lambda run, x: checkpoint(run, x, use_reentrant=False))


def launched(backend: str, call, dtype: torch.dtype = torch.bfloat16) -> dict[str, list[str]]:
    """The launches of two frozen layers with GELU between, as on an H100, in either pass."""

    def run(trace: Trace) -> None:
        up, down = empty(4 * WIDTH, WIDTH, dtype=dtype), empty(WIDTH, 4 * WIDTH, dtype=dtype)
        x = empty(ROWS, WIDTH, dtype=dtype, trained=True)

        def feed_forward(x: Tensor) -> Tensor:
            return frozen_linear(frozen_linear(x, up), down, gelu=True)

        forward_and_backward(trace, lambda: call(feed_forward, x))

    trace = trace_case(Case("feed forward", f"lorakernels:{backend}", run))
    return {name: [one.name for one in counts.launches] for name, counts in trace.passes.items()}


@pytest.mark.parametrize(
    ("call", "again"), [(PLAIN, []), (CHECKPOINTED, ["mm"])], ids=["saved", "checkpointed"]
)
def test_launches_on_a_gpu(call, again, monkeypatch):
    two_steps = {"forward": ["mm", "gelu", "mm"], "backward": [*again, "mm", "gelu_backward", "mm"]}
    assert launched("aten", call) == two_steps
    # interpreted, the kernel has no launch to count
    monkeypatch.setattr(triton, "backward", lambda dy, weight, x, *, tile: x.new_zeros(x.shape))
    uncached = implementations._with_shipped_tiles.__wrapped__
    monkeypatch.setattr(implementations, "_with_shipped_tiles", uncached)
    assert launched("triton", call) == two_steps | {"backward": [*again, "new_zeros", "mm"]}
    # it multiplies 16 bits
    assert launched("triton", call, torch.float32) == two_steps


def test_on_a_gpu_gelus_input_is_all_that_is_saved():
    kept = []

    def call(run, x):
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda one: kept.append(tuple(one.shape)) or one, lambda one: one
        )
        with hooks:
            return run(x)

    launched("aten", call)
    weights = {(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}
    assert set(kept) - weights == {(ROWS, 4 * WIDTH)}
    assert len(kept) == 3


def test_no_operator_is_called_where_no_gradient_is_asked_for():
    def call(run, x):
        with torch.no_grad():
            return run(x).requires_grad_()

    names = []
    shipped = module._forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_forward", lambda *tensors: names.append(1) or shipped(*tensors))
        assert launched("aten", call)["forward"] == ["mm", "gelu", "mm"]
        assert names == []
        launched("aten", PLAIN)
    assert names == [1]
