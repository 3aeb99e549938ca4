"""lora_linear among torch's own operators: opcheck, compile, autocast, checkpointing, gradients on demand."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lorakernels import LoRALinear, lora_linear
from lorakernels.ops.lora_linear import check


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(
    device: str, dropout_p: float = 0.0, backend: str = "auto", k: int = 24, n: int = 40, r: int = 4
) -> LoRALinear:
    layer = LoRALinear.from_linear(nn.Linear(k, n, device=device), r, 2.0, dropout_p=dropout_p)
    nn.init.normal_(layer.lora_b)
    layer.backend = backend
    return layer


def gradients(function, layer: LoRALinear, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, lora_a and lora_b."""
    x = x.clone().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.lora_a, layer.lora_b])]


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_opcheck_of_the_forward(backend, shape, device):
    layer = make_layer(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(*shape, 24, device=device, dtype=dtype, requires_grad=True)
        tensors = (x, layer.weight.to(dtype), layer.bias.to(dtype), layer.lora_a, layer.lora_b)
        opcheck(torch.ops.lorakernels.lora_linear_forward.default, (*tensors, 2.0, 0.0, backend))


@pytest.mark.parametrize(
    "needs", [[True] * 3, [False, True, True], [False, False, True], [True, False, False]]
)
@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_opcheck_of_the_backward(backend, needs, device):
    layer = make_layer(device)
    x, dy, s = (torch.randn(6, size, device=device) for size in (24, 40, 4))
    tensors = (dy, x, layer.weight, layer.bias, layer.lora_a.detach(), layer.lora_b.detach(), s)
    seed = torch.zeros(0, dtype=torch.int64, device=device)
    opcheck(torch.ops.lorakernels.lora_linear_backward.default, (*tensors, seed, 2.0, 0.0, backend, needs))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_whole_and_once_for_every_length(compiler, device):
    layer = make_layer(device)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step, rows in enumerate((7, 12, 33, 64, 5)):
        x = torch.randn(2, rows, 24, device=device)
        expected = gradients(layer, layer, x)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            for got, right in zip(gradients(compiled, layer, x), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    # the first length is compiled as a constant, the second as a variable; every later one finds that graph
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype, device):
    layer = make_layer(device, backend=backend)
    x = torch.randn(9, 24, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = layer(x)
        assert y.dtype == dtype
        # inside autocast on purpose: it must not reach into the operator's own products
        dy = torch.randn_like(y)
        y.backward(dy)
    assert (x.grad.dtype, layer.lora_a.grad.dtype) == (torch.float32, torch.float32)
    no_seed = torch.empty(0, dtype=torch.int64, device=device)
    inside = check.Case(
        x.detach().to(dtype), layer.weight.to(dtype), layer.bias.to(dtype), layer.lora_a.detach(),
        layer.lora_b.detach(), layer.scale, 0.0, no_seed, dy,
    )  # fmt: skip
    results = [y.detach(), x.grad.to(dtype), layer.lora_a.grad, layer.lora_b.grad]
    assert check.failures(results, inside, roundings=2 if backend == "aten" else 1) == []


def test_autocast_leaves_float64_alone(device):
    layer = make_layer(device).double()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(torch.randn(3, 24, device=device, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing_replays_the_same_mask(dropout_p, compiler, device):
    layer = make_layer(device, dropout_p, k=16, n=40, r=16)
    with torch.no_grad():
        layer.lora_a.copy_(torch.eye(16))
    x = torch.rand(8, 16, device=device) + 0.5

    def whole(value: torch.Tensor) -> torch.Tensor:
        return layer(torch.sin(value))

    def replayed(value: torch.Tensor) -> torch.Tensor:
        return checkpoint(whole, value, use_reentrant=False)

    run = replayed if compiler is None else torch.compile(replayed, fullgraph=True, backend=compiler)
    torch.manual_seed(0)
    y, dx, da, db = gradients(run, layer, x)
    # with A the identity the forward's mask can be read off its output, and must explain every gradient
    inner, b = torch.sin(x), layer.lora_b.detach()
    s = torch.linalg.lstsq(b, (y - layer.bias - inner @ layer.weight.T).T).solution.T
    keep = (s / inner > 0.1) / (1 - dropout_p)
    assert (keep == 0).any() == (dropout_p > 0)
    ds = layer.scale * (2 * y) @ b
    torch.testing.assert_close(db, layer.scale * (2 * y).T @ (inner * keep), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(da, ds.T @ (inner * keep), rtol=1e-4, atol=1e-3)
    expected_dx = ((2 * y) @ layer.weight + ds * keep) * torch.cos(x)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b", "x lora_b", "lora_a lora_b"])
def test_only_wanted_gradients_are_computed(backend, wanted, device):
    problem = check.random_case(10, torch.randn(30, 20, device=device), 4, torch.float32, bias=False)
    expected = dict(zip(check.RESULTS, check.plain_results(problem), strict=True))
    x, weight, bias, lora_a, lora_b = (None if t is None else t.detach().clone() for t in problem.inputs)
    leaves = {"x": x, "lora_a": lora_a, "lora_b": lora_b}
    for name in wanted.split():
        leaves[name].requires_grad_()
    lora_linear(x, weight, bias, lora_a, lora_b, problem.scale, backend=backend).backward(problem.dy)
    for name, result in (("x", "dx"), ("lora_a", "dA"), ("lora_b", "dB")):
        if name in wanted.split():
            torch.testing.assert_close(leaves[name].grad, expected[result], rtol=1e-4, atol=1e-4)
        else:
            assert leaves[name].grad is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saves_x_and_thin_tensors_only(dropout_p, device):
    layer = make_layer(device, dropout_p, k=96, n=200)
    x = torch.randn(50, 96, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    known = {
        t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.bias, layer.lora_a, layer.lora_b)
    }
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert sum(t.numel() for t in extra) <= 50 * layer.r + 1


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_result_may_be_changed_in_place(shape, device):
    layer, x = make_layer(device), torch.randn(*shape, 24, device=device)
    in_place = gradients(lambda x: layer(x).mul_(2).add_(1), layer, x)
    expected = gradients(lambda x: layer(x) * 2 + 1, layer, x)
    assert all(torch.equal(got, right) for got, right in zip(in_place, expected, strict=True))


def test_double_backward_is_refused(device):
    layer = make_layer(device)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def good_arguments() -> dict:
    return {
        "x": torch.randn(3, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6),
        "lora_a": torch.randn(2, 8), "lora_b": torch.randn(6, 2), "scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., K\]"),
        ({"x": torch.randn(3, 9)}, ValueError, r"weight: expected shape \[N, 9\].*got \[6, 8\]"),
        ({"weight": torch.randn(6)}, ValueError, r"weight: .*got \[6\]"),
        ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \[6\], got \[8\]"),
        ({"lora_a": torch.randn(2, 9)}, ValueError, r"lora_a: expected shape \[r, 8\].*got \[2, 9\]"),
        ({"lora_a": torch.randn(0, 8)}, ValueError, r"lora_a: .*r >= 1, got \[0, 8\]"),
        ({"lora_b": torch.randn(2, 6)}, ValueError, r"lora_b: expected shape \[6, 2\], got \[2, 6\]"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x: expected float16.*got torch.int64"),
        (
            {"weight": torch.ones(6, 8, dtype=torch.int8)},
            TypeError,
            "weight: .*torch.float32, got torch.int8",
        ),
        ({"bias": torch.randn(6).half()}, TypeError, "bias: .*torch.float32, got torch.float16"),
        ({"lora_a": torch.randn(2, 8).half()}, TypeError, "lora_a: expected torch.float32"),
        ({"lora_b": torch.randn(6, 2).double()}, TypeError, "lora_b: .*torch.float32, got torch.float64"),
        (
            {"lora_b": torch.randn(6, 2, device="meta")},
            ValueError,
            "lora_b: expected x's device cpu, got meta",
        ),
        ({"weight": torch.randn(6, 8).requires_grad_()}, ValueError, "weight: expected a frozen tensor"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend: expected one of auto, reference, aten, onednn, triton, got 'cuda'",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        lora_linear(**{**good_arguments(), **change})


def test_triton_refuses_float64(device):
    arguments = {
        name: value.double().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in good_arguments().items()
    }
    with pytest.raises(ValueError, match=r"backend: 'triton'.*float64"):
        lora_linear(**arguments, backend="triton")
