"""layer_norm_shrink among torch's own operators, with lora_linear after it, and bad arguments of both."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lorakernels import layer_norm_shrink, lora_linear
from lorakernels.ops.layer_norm_shrink import check

M, N, K, R = 12, 40, 24, 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Composition:
    """A layer norm and an adapted layer, either as one operator and another or plainly."""

    def __init__(self, device: str, dropout_p: float = 0.0, backend: str = "auto") -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.norm = (normal(K), normal(K), 1e-5)
        self.weight, self.bias, self.scale = normal(N, K), normal(N), 2.0
        self.lora_a, self.lora_b = normal(R, K).requires_grad_(), normal(N, R).requires_grad_()
        self.x = normal(M, K)
        self.options = {"dropout_p": dropout_p, "backend": backend}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        h, *shrunk = layer_norm_shrink(x, *self.norm, self.lora_a, self.scale, **self.options)
        return self.layer(h, shrunk=tuple(shrunk))

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        norm_weight, norm_bias, eps = self.norm
        return self.layer(torch.nn.functional.layer_norm(x, [K], norm_weight, norm_bias, eps))

    def layer(self, h: torch.Tensor, **more) -> torch.Tensor:
        adapters = (self.lora_a, self.lora_b)
        return lora_linear(h, self.weight, self.bias, *adapters, self.scale, **self.options, **more)

    def gradients(self, function, x: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The output and the gradients of x, lora_a and lora_b, under one dropout mask."""
        x = (self.x if x is None else x).clone().requires_grad_()
        torch.manual_seed(0)
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, self.lora_a, self.lora_b])]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, right in zip(got, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_opcheck(backend, shape, device):
    for dtype in (torch.float32, torch.bfloat16):
        problem = check.random_problem(1, K, R, dtype, torch.float32, device)
        x = torch.randn(*shape, K, device=device, dtype=dtype, requires_grad=True)
        arguments = (problem.norm_weight, problem.norm_bias, 1e-5, problem.lora_a, 2.0, 0.0, backend)
        opcheck(torch.ops.lorakernels.layer_norm_shrink.default, (x, *arguments))


@pytest.mark.parametrize("backend", ["reference", "aten", "aten-wide", "triton"])
def test_opcheck_of_lora_linear_with_s(backend, device):
    made = Composition(device)
    s, seed = torch.randn(M, R, device=device), torch.ones(1, dtype=torch.int64, device=device)
    for dropout_p, drawn in ((0.0, seed[:0]), (0.5, seed)):
        x = made.x.clone().requires_grad_()
        arguments = (x, made.weight, made.bias, made.lora_a, made.lora_b, 2.0, dropout_p, backend, s, drawn)
        opcheck(torch.ops.lorakernels.lora_linear_forward.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_composition_is_what_the_parts_are(dropout_p, backend, device):
    made = Composition(device, dropout_p, backend)
    assert_close(made.gradients(made), made.gradients(made.apart))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_whole_for_every_length(compiler, device):
    made = Composition(device)
    compiled = torch.compile(made.__call__, fullgraph=True, backend=compiler)
    for rows in (7, 12, 33):
        x = torch.randn(2, rows, K, device=device)
        assert_close(made.gradients(compiled, x), made.gradients(made, x))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing_replays_the_same_mask(dropout_p, compiler, device):
    made = Composition(device, dropout_p)

    def replayed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda value: made(torch.sin(value)), x, use_reentrant=False)

    expected = made.gradients(lambda x: made(torch.sin(x)))
    run = replayed if compiler is None else torch.compile(replayed, fullgraph=True, backend=compiler)
    got = made.gradients(run)
    if compiler is None or not dropout_p:
        assert_close(got, expected)
        return
    # a compiled graph draws another mask; it is one mask where dB fits the S that y shows
    y, _, _, db = got
    norm_weight, norm_bias, eps = made.norm
    h = torch.nn.functional.layer_norm(torch.sin(made.x), [K], norm_weight, norm_bias, eps)
    frozen = h @ made.weight.T + made.bias
    s = torch.linalg.lstsq(made.lora_b.detach(), (y - frozen).T).solution.T
    torch.testing.assert_close(db, (2 * y).T @ s, rtol=1e-3, atol=1e-2)


def test_only_x_asks_for_a_gradient(device):
    """A first layer's h needs none, though lora_a is trained: no product is made for it."""
    made = Composition(device)
    h, s, seed = layer_norm_shrink(made.x, *made.norm, made.lora_a, made.scale)
    assert [one.requires_grad for one in (h, s, seed)] == [False] * 3
    made(made.x).sum().backward()
    assert made.lora_a.grad is not None


def test_saves_x_and_thin_tensors_only(device):
    made, saved = Composition(device, 0.5), []
    x = torch.randn(50, K, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm_shrink(x, *made.norm, made.lora_a, made.scale, **made.options)
    known = {t.untyped_storage().data_ptr() for t in (x, *made.norm[:2])}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert sum(t.numel() for t in extra) <= 2 * len(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_autocast_casts_on_entry(backend, dtype, device):
    made = Composition(device, 0.0, backend)
    x = made.x.clone().requires_grad_()
    inside = [made.x, *made.norm[:2]]
    with torch.autocast(device, dtype=dtype):
        h, s, _ = layer_norm_shrink(x, *made.norm, made.lora_a, 2.0, backend=backend)
        h.sum().backward()
    cast = [one.to(dtype) for one in inside]
    plain = layer_norm_shrink(*cast, 1e-5, made.lora_a, 2.0, backend=backend)
    assert torch.equal(h, plain[0])
    assert torch.equal(s, plain[1])
    assert (h.dtype, s.dtype, x.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_h_may_be_changed_in_place(device):
    made = Composition(device)
    h, _, _ = layer_norm_shrink(made.x.view(3, 4, K), *made.norm, made.lora_a, 2.0)
    expected = h * 2
    assert torch.equal(h.mul_(2), expected)


def good_arguments() -> dict:
    return {
        "x": torch.randn(3, 8), "norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "eps": 1e-5,
        "lora_a": torch.randn(2, 8), "scale": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., K\] with K >= 1, got \[\]"),
        ({"x": torch.randn(3, 0)}, ValueError, r"x: .*K >= 1, got \[3, 0\]"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x: expected float16.*got torch.int64"),
        ({"norm_weight": torch.ones(9)}, ValueError, r"norm_weight: expected shape \[8\], got \[9\]"),
        ({"norm_bias": torch.ones(1, 8)}, ValueError, r"norm_bias: expected shape \[8\], got \[1, 8\]"),
        ({"norm_weight": torch.ones(8).half()}, TypeError, "norm_weight: .*float32, got torch.float16"),
        ({"norm_bias": torch.ones(8).requires_grad_()}, ValueError, "norm_bias: expected a frozen tensor"),
        ({"norm_weight": torch.ones(8).requires_grad_()}, ValueError, "norm_weight: expected a frozen"),
        ({"norm_bias": torch.ones(8, device="meta")}, ValueError, "norm_bias: expected x's device cpu"),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
        ({"lora_a": torch.randn(2, 9)}, ValueError, r"lora_a: expected shape \[r, 8\].*got \[2, 9\]"),
        ({"lora_a": torch.randn(0, 8)}, ValueError, r"lora_a: .*r >= 1, got \[0, 8\]"),
        ({"lora_a": torch.randn(2, 8).half()}, TypeError, "lora_a: expected torch.float32"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        (
            {"backend": "onednn"},
            ValueError,
            "backend: expected one of auto, reference, aten, triton, got 'onednn'",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        layer_norm_shrink(**{**good_arguments(), **change})
    assert "\n" not in str(caught.value)


def test_triton_refuses_float64(device):
    arguments = {
        name: value.double().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in good_arguments().items()
    }
    with pytest.raises(ValueError, match=r"backend: 'triton'.*float64"):
        layer_norm_shrink(**arguments, backend="triton")


NO_SEED, SEED = torch.empty(0, dtype=torch.int64), torch.ones(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("shrunk", "dropout_p", "error", "message"),
    [
        ((torch.randn(3, 3), NO_SEED), 0.0, ValueError, r"S of shape \[3, 2\], got \[3, 3\]"),
        ((torch.randn(3, 2), SEED), 0.0, ValueError, r"a seed of shape \[0\] for dropout 0.0, got \[1\]"),
        ((torch.randn(3, 2), NO_SEED), 0.5, ValueError, r"a seed of shape \[1\] for dropout 0.5, got \[0\]"),
        ((torch.randn(3, 2).half(), NO_SEED), 0.0, TypeError, "S in torch.float32, got torch.float16"),
        ((torch.randn(3, 2), SEED.int()), 0.5, TypeError, "a seed in torch.int64, got torch.int32"),
        ((torch.randn(3, 2, device="meta"), NO_SEED), 0.0, ValueError, "S on x's device cpu, got meta"),
        ((torch.randn(3, 2).requires_grad_(), NO_SEED), 0.0, ValueError, "S without a gradient"),
    ],
)
def test_what_lora_linear_cannot_take_for_s_is_named(shrunk, dropout_p, error, message):
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    lora_a, lora_b = torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(error, match=f"^shrunk: expected {message}") as caught:
        lora_linear(x, weight, bias, lora_a, lora_b, 1.0, dropout_p=dropout_p, shrunk=shrunk)
    assert "\n" not in str(caught.value)
