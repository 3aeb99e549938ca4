"""add_layer_norm among torch's own operators, and bad arguments."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from lorakernels import add_layer_norm, layer_norm_shrink
from lorakernels.ops.add_layer_norm import check

M, K, EPS = 12, 40, 1e-5
BACKENDS = ["reference", "aten", "triton"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WEIGHT, BIAS = torch.linspace(0.5, 1.5, K), torch.linspace(-1, 1, K)


def block(x: torch.Tensor, residual: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """What both results are used for in a transformer: what follows the norm is added to the sum."""
    t, h = add_layer_norm(x, residual, WEIGHT.to(x.device), BIAS.to(x.device), EPS, backend=backend)
    return t + torch.sin(h)


def plain_block(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    t = x + residual
    return t + torch.sin(layer_norm(t, [K], WEIGHT.to(x.device), BIAS.to(x.device), EPS))


def results(run, *leading: int, device: str) -> list[torch.Tensor]:
    """The output and the gradients of x and of the residual."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*leading, K, generator=generator).to(device).requires_grad_() for _ in range(2)]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, right in zip(got, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_opcheck(backend, shape, device):
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, dh, dt = torch.randn(4, *shape, K, device=device).to(dtype).unbind()
        weight, bias = torch.ones(2, K, device=device, dtype=dtype).unbind()
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        opcheck(torch.ops.lorakernels.add_layer_norm.default, (*leaves, weight, bias, EPS, backend))
        mean, rstd = torch.rand(2, *shape, 1, device=device).unbind()
        for added in (dt, None):
            arguments = (dh, x, weight, mean, rstd, added, backend)
            opcheck(torch.ops.lorakernels.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_those_of_torch(backend, device):
    got = results(lambda x, residual: block(x, residual, backend), 3, 5, device=device)
    assert_close(got, results(plain_block, 3, 5, device=device))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_whole_for_every_length(backend, compiler, device):
    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return block(x, residual, backend)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for rows in (7, 12, 33):
        assert_close(results(compiled, 2, rows, device=device), results(plain_block, 2, rows, device=device))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_checkpointing(compiler, device):
    def replayed(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, torch.sin(x), residual, use_reentrant=False)

    run = replayed if compiler is None else torch.compile(replayed, fullgraph=True, backend=compiler)
    plain = results(lambda x, residual: plain_block(torch.sin(x), residual), M, device=device)
    assert_close(results(run, M, device=device), plain)


def begun_at_x(x: torch.Tensor, residual: torch.Tensor, backend: str) -> torch.Tensor:
    """A residual connection around what follows `layer_norm_shrink`."""
    lora_a = torch.ones(3, K, device=x.device)
    h, *_, handed_on = layer_norm_shrink(
        torch.sin(x), WEIGHT.to(x.device), BIAS.to(x.device), EPS, lora_a, 1.0, backend=backend, return_x=True
    )
    return handed_on + torch.sin(h) + residual


def plainly_begun_at_x(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    x = torch.sin(x)
    return x + torch.sin(layer_norm(x, [K], WEIGHT.to(x.device), BIAS.to(x.device), EPS)) + residual


@pytest.mark.parametrize("way", ["plain", "checkpoint", "aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_that_begins_at_the_shrinks_input(backend, way, device):
    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return begun_at_x(x, residual, backend)

    def replayed(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return checkpoint(run, x, residual, use_reentrant=False)

    ways = {"plain": run, "checkpoint": replayed}
    chosen = ways[way] if way in ways else torch.compile(run, fullgraph=True, backend=way)
    assert_close(results(chosen, M, device=device), results(plainly_begun_at_x, M, device=device))


def test_x_that_is_handed_on_takes_no_memory_and_no_change_in_place(device):
    problem = check.random_problem(M, K, torch.float32, device)
    lora_a, parameters = torch.ones(3, K, device=device), (problem.weight, problem.bias, EPS)
    leaf = problem.x.requires_grad_()
    handed_on = layer_norm_shrink(leaf, *parameters, lora_a, 1.0, return_x=True)[3]
    assert handed_on.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="modified inplace"):
        handed_on.add_(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_gradient_is_refused(backend, device):
    problem = check.random_problem(M, K, torch.float32, device)
    parameters = problem.weight, problem.bias, EPS
    x = problem.x.requires_grad_()
    shrunk = layer_norm_shrink(x, *parameters, torch.ones(3, K, device=device), 1.0, backend=backend)
    for h in (add_layer_norm(x, problem.residual, *parameters, backend=backend)[1], shrunk[0]):
        (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="add_layer_norm is differentiable once"):
            dx.sum().backward()


def test_saves_the_sum_and_thin_tensors_only(device):
    problem, saved = check.random_problem(50, K, torch.float32, device), []
    x, residual = problem.x.requires_grad_(), problem.residual.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        t, _ = add_layer_norm(x, residual, problem.weight, problem.bias, EPS)
    known = {one.untyped_storage().data_ptr() for one in (t, problem.weight)}
    extra = [one for one in saved if one.untyped_storage().data_ptr() not in known]
    assert sum(one.numel() for one in extra) == 2 * len(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_on_entry(backend, dtype, device):
    problem = check.random_problem(M, K, torch.float32, device)
    inside = (problem.x, problem.residual, problem.weight, problem.bias)
    x = problem.x.clone().requires_grad_()
    with torch.autocast(device, dtype=dtype):
        t, h = add_layer_norm(x, *inside[1:], EPS, backend=backend)
        (t + h).sum().backward()
    plain = add_layer_norm(*(one.to(dtype) for one in inside), EPS, backend=backend)
    assert torch.equal(t, plain[0])
    assert torch.equal(h, plain[1])
    assert (t.dtype, h.dtype, x.grad.dtype) == (dtype, dtype, torch.float32)


def test_under_autocast_x_is_handed_on_as_it_is(device):
    """Not cast: a residual keeps its digits."""
    problem = check.random_problem(M, K, torch.float32, device)
    x, lora_a = problem.x.requires_grad_(), torch.ones(3, K, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        h, *_, handed_on = layer_norm_shrink(x, problem.weight, problem.bias, EPS, lora_a, 1.0, return_x=True)
    assert handed_on is x
    assert h.dtype == torch.bfloat16


def test_both_results_may_be_changed_in_place(device):
    problem = check.random_problem(M, K, torch.float32, device)
    x, residual = (one.view(3, 4, K).requires_grad_() for one in (problem.x, problem.residual))
    t, h = add_layer_norm(x, residual, problem.weight, problem.bias, EPS)
    expected = h * 2
    assert torch.equal(h.mul_(2), expected)
    # what is saved is the sum itself
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def good_arguments() -> dict:
    return {
        "x": torch.randn(3, 8), "residual": torch.randn(3, 8), "weight": torch.ones(8),
        "bias": torch.zeros(8), "eps": EPS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., K\] with K >= 1, got \[\]"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x: expected float16.*got torch.int64"),
        ({"residual": torch.randn(1, 8)}, ValueError, r"residual: .*shape \[3, 8\], got \[1, 8\]"),
        ({"residual": torch.randn(3, 8).half()}, TypeError, "residual: .*float32, got torch.float16"),
        ({"residual": torch.ones(3, 8, device="meta")}, ValueError, "residual: expected x's device cpu"),
        ({"weight": torch.ones(9)}, ValueError, r"weight: expected shape \[8\], got \[9\]"),
        ({"bias": torch.ones(8).half()}, TypeError, "bias: .*float32, got torch.float16"),
        ({"bias": torch.ones(8).requires_grad_()}, ValueError, "bias: expected a frozen tensor"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight: expected x's device cpu"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
        ({"backend": "onednn"}, ValueError, "backend: expected one of auto, .*triton, got 'onednn'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        add_layer_norm(**{**good_arguments(), **change})
    assert "\n" not in str(caught.value)


def test_triton_refuses_float64(device):
    arguments = {
        name: value.double().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in good_arguments().items()
    }
    with pytest.raises(ValueError, match=r"backend: 'triton'.*float64"):
        add_layer_norm(**arguments, backend="triton")
