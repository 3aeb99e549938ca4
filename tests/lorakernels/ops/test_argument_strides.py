"""Every argument of every implementation in any strides: sliced, expanded, transposed, behind an offset.

What is wrong here is wrong by about its own size, so the bounds are wide: 1e-4 in float32, 2e-2 in bfloat16.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.baselines.cross_entropy import full_logits
from lorakernels import (
    add_layer_norm,
    cpu_gemm,
    frozen_linear,
    layer_norm_shrink,
    linear_cross_entropy,
    lora_linear,
)
from lorakernels.ops.linear_cross_entropy import aten as loss_in_aten
from lorakernels.ops.lora_linear import implementations
from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.ops.lora_linear.reference import keep_mask, plain_lora_linear
from lorakernels.tolerance import relative_error

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LAYOUTS = {
    "contiguous": lambda t: t,
    "behind an offset": lambda t: torch.cat([t.new_full((3, *t.shape[1:]), 9), t])[3:],
    "every second": lambda t: torch.stack([t, t.new_full(t.shape, 9)], -1)[..., 0],
    "every second row": lambda t: torch.stack([t, t.new_full(t.shape, 9)], 1)[:, 0],
    "columns of a wider one": lambda t: torch.cat([t, t.new_full(t.shape, 9)], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "one row expanded": lambda t: t[:1].expand_as(t),
    "one column expanded": lambda t: t[..., :1].expand_as(t),
}
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
layouts = st.sampled_from(list(LAYOUTS))
loss_layouts = {
    "hidden": layouts,
    # of a head whose rows are all the same the gradient of hidden is zero, and any error infinite
    "weight": st.sampled_from([name for name in LAYOUTS if name != "one row expanded"]),
    "labels": layouts,
    "row_gradient": layouts,
}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Normal values of about unit norm in each row of a matrix."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values / (shape[-1] ** 0.5 if len(shape) > 1 else 1)).to(device, dtype)


def assert_close(got: list[torch.Tensor], exact: list[torch.Tensor], bound: float) -> None:
    errors = [relative_error(one.detach(), right.detach()) for one, right in zip(got, exact, strict=True)]
    assert max(errors) < bound, errors


@pytest.mark.parametrize("backend", ["reference", "aten", "aten-wide", "onednn", "triton"])
@settings(max_examples=40, **REPEATABLE)
@given(
    chosen=st.fixed_dictionaries(
        dict.fromkeys(("x", "weight", "bias", "lora_a", "lora_b", "dy", "s", "seed"), layouts)
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), dropout_p=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_lora_linear(backend, chosen, dtype, dropout_p, device):
    if backend == "onednn":
        dtype = torch.float32
        if device != "cpu":
            pytest.skip("oneDNN multiplies on a CPU")
    m, n, k, r = 33, 48, 40, 5
    laid_out = {name: LAYOUTS[layout] for name, layout in chosen.items()}
    x, dy, weight, bias = (
        laid_out[name](normal(*shape, seed=seed, dtype=dtype, device=device))
        for seed, (name, shape) in enumerate(
            {"x": (m, k), "dy": (m, n), "weight": (n, k), "bias": (n,)}.items()
        )
    )
    lora_a = laid_out["lora_a"](normal(r, k, seed=4, device=device))
    lora_b = laid_out["lora_b"](normal(n, r, seed=5, device=device))
    seed = laid_out["seed"](torch.tensor([12345], device=device))
    problem = Problem(x, weight, bias, lora_a, lora_b, 2.0, dropout_p, seed)
    run = implementations.select(problem, backend, "forward")
    y, s = run.forward(problem)
    exact = {"x": x, "lora_a": lora_a, "lora_b": lora_b}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in exact.items()}
    multiplier = keep_mask(seed, m, k, dropout_p) / (1 - dropout_p) if dropout_p else None
    exact_y = plain_lora_linear(
        exact["x"], weight.double(), bias.double(), exact["lora_a"], exact["lora_b"], 2.0, multiplier
    )
    exact_gradients = torch.autograd.grad(exact_y, list(exact.values()), dy.double())
    if "expanded" not in chosen["s"]:  # which would change what it holds
        s = laid_out["s"](s)
    needs = (True, True, True)
    gradients = run.backward(problem, dy, s, needs)
    assert_close([y, *gradients], [exact_y, *exact_gradients], BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@settings(max_examples=40, **REPEATABLE)
@given(
    chosen=st.fixed_dictionaries(
        dict.fromkeys(("norm_weight", "norm_bias", "lora_a", "dh"), layouts)
        # a row of one value has no variance, and its gradient is rounding alone
        | {"x": st.sampled_from([name for name in LAYOUTS if name != "one column expanded"])}
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), dropout_p=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_layer_norm_shrink(backend, chosen, dtype, dropout_p, device):
    shapes = {"x": (33, 40), "norm_weight": (40,), "norm_bias": (40,), "dh": (33, 40)}
    laid_out = {
        name: LAYOUTS[chosen[name]](normal(*shape, seed=seed, dtype=dtype, device=device))
        for seed, (name, shape) in enumerate(shapes.items())
    }
    x, norm_weight, norm_bias, dh = laid_out.values()
    lora_a = LAYOUTS[chosen["lora_a"]](normal(5, 40, seed=4, device=device))
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    h, s, seed = layer_norm_shrink(
        leaf, norm_weight, norm_bias, 1e-5, lora_a, 2.0, dropout_p=dropout_p, backend=backend
    )
    exact_h = torch.nn.functional.layer_norm(exact, [40], norm_weight.double(), norm_bias.double(), 1e-5)
    multiplier = keep_mask(seed, 33, 40, dropout_p) / (1 - dropout_p) if dropout_p else 1
    exact_s = 2.0 * (h.detach().double() * multiplier) @ lora_a.double().T
    assert_close([h, s], [exact_h, exact_s], BOUNDS[dtype])
    if "expanded" not in chosen["dh"]:  # whose gradient may cancel
        gradients = [
            torch.autograd.grad(one, at, dy)[0]
            for one, at, dy in ((h, leaf, dh), (exact_h, exact, dh.double()))
        ]
        assert_close(gradients[:1], gradients[1:], BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@settings(max_examples=40, **REPEATABLE)
@given(
    chosen=st.fixed_dictionaries(
        dict.fromkeys(("residual", "weight", "bias", "dt", "dh"), layouts)
        # a row of one value has no variance, and its gradient is rounding alone
        | {"x": st.sampled_from([name for name in LAYOUTS if name != "one column expanded"])}
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_add_layer_norm(backend, chosen, dtype, device):
    names = ("x", "residual", "weight", "bias", "dt", "dh")
    x, residual, weight, bias, dt, dh = (
        LAYOUTS[chosen[name]](
            normal(
                *((40,) if name in ("weight", "bias") else (33, 40)), seed=seed, dtype=dtype, device=device
            )
        )
        for seed, name in enumerate(names)
    )
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    results = add_layer_norm(*leaves, weight, bias, 1e-5, backend=backend)
    # of the sum as it is rounded: what rounding does to small values a layer norm magnifies
    exact_t = (x + residual).double().requires_grad_()
    exact_h = torch.nn.functional.layer_norm(exact_t, [40], weight.double(), bias.double(), 1e-5)
    assert_close(list(results), [exact_t, exact_h], BOUNDS[dtype])
    gradients = torch.autograd.grad(results, leaves, [dt, dh])
    exact = torch.autograd.grad([exact_t, exact_h], exact_t, [dt.double(), dh.double()])
    assert_close(list(gradients), [*exact, *exact], BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["reference", "aten", "onednn", "triton"])
@pytest.mark.parametrize("layout", ["every second", "one row expanded"])
def test_a_bias_of_the_public_function(backend, layout, device):
    if backend == "onednn" and device != "cpu":
        pytest.skip("oneDNN multiplies on a CPU")
    x, weight = normal(9, 24, seed=0, device=device), normal(40, 24, seed=1, device=device)
    bias = LAYOUTS[layout](normal(40, seed=2, device=device))
    lora_a, lora_b = normal(4, 24, seed=3, device=device), normal(40, 4, seed=4, device=device)
    y = lora_linear(x, weight, bias, lora_a, lora_b, 1.0, backend=backend)
    assert_close([y], [x.double() @ (weight + lora_b @ lora_a).double().T + bias], 1e-4)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("gemm", [cpu_gemm.BLAS, cpu_gemm.ONEDNN], ids=["BLAS", "oneDNN"])
@settings(max_examples=20, **REPEATABLE)
@given(chosen=st.fixed_dictionaries(dict.fromkeys(("x", "weight", "bias", "dy"), layouts)))
def test_frozen_linear(gemm, widens, gelu, chosen, choose_gemm):
    choose_gemm(widens, gemm)
    dtype = torch.bfloat16 if widens else torch.float32
    shapes = {"x": (33, 40), "weight": (48, 40), "bias": (48,), "dy": (33, 48)}
    x, weight, bias, dy = (
        LAYOUTS[chosen[name]](normal(*shape, seed=seed, dtype=dtype))
        for seed, (name, shape) in enumerate(shapes.items())
    )
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y = frozen_linear(leaf, weight, bias, gelu=gelu)
    inner = torch.nn.functional.gelu(exact, approximate="tanh") if gelu else exact
    exact_y = torch.nn.functional.linear(inner, weight.double(), bias.double())
    results = [y, *torch.autograd.grad(y, leaf, dy)]
    assert_close(results, [exact_y, *torch.autograd.grad(exact_y, exact, dy.double())], BOUNDS[dtype])


def loss_problem(chosen: dict[str, str], device: str) -> list[torch.Tensor]:
    """hidden, weight, labels and row_gradient in the chosen layouts."""
    labels = torch.randint(50, (33,), generator=torch.Generator().manual_seed(2)).to(device)
    tensors = {
        "hidden": normal(33, 40, seed=0, device=device) * 6,
        "weight": normal(50, 40, seed=1, device=device) * 6,
        "labels": labels,
        "row_gradient": normal(33, seed=3, device=device),
    }
    return [LAYOUTS[chosen[name]](tensor) for name, tensor in tensors.items()]


def exact_loss(hidden, weight, labels, row_gradient) -> list[torch.Tensor]:
    leaves = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    losses = full_logits(*leaves, labels, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, row_gradient.double())]


@pytest.mark.parametrize("gemm", [cpu_gemm.BLAS, cpu_gemm.ONEDNN], ids=["BLAS", "oneDNN"])
@settings(max_examples=40, **REPEATABLE)
@given(chosen=st.fixed_dictionaries(loss_layouts))
def test_linear_cross_entropy(gemm, chosen, choose_gemm):
    choose_gemm(False, gemm)
    hidden, weight, labels, row_gradient = loss_problem(chosen, "cpu")
    leaves = [one.detach().requires_grad_() for one in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, labels, reduction="none")
    results = [losses.detach(), *torch.autograd.grad(losses, leaves, row_gradient)]
    assert_close(results, exact_loss(hidden, weight, labels, row_gradient), 1e-4)


@pytest.mark.parametrize("implementation", ["aten", "triton"])
@settings(max_examples=25, **REPEATABLE)
@given(
    chosen=st.fixed_dictionaries(loss_layouts),
    saved=st.tuples(*[st.sampled_from([name for name in LAYOUTS if "expanded" not in name])] * 2),
)
def test_implementations_of_linear_cross_entropy(implementation, chosen, saved, device):
    run = loss_in_aten
    if implementation == "triton":
        from lorakernels.ops.linear_cross_entropy import triton as run
    hidden, weight, labels, row_gradient = loss_problem(chosen, device)
    losses, statistics, unscaled = run.forward(hidden, weight, labels, True)
    kept = [LAYOUTS[layout](one) for layout, one in zip(saved, (losses, statistics), strict=True)]
    weight_gradient = run.weight_gradient(hidden, weight, labels, *kept, row_gradient)
    # which is what a compiler is told
    assert weight_gradient.stride() == torch.empty_like(weight).stride()
    results = [losses, unscaled * row_gradient[:, None], weight_gradient]
    assert_close(results, exact_loss(hidden, weight, labels, row_gradient), 1e-4)


def test_layouts_are_what_they_say():
    """Each strides the tensor as its name says, and only the expanded ones change a value."""
    for (name, layout), shape in itertools.product(LAYOUTS.items(), [(6,), (6, 4)]):
        tensor = normal(*shape, seed=0)
        other = layout(tensor)
        assert other.shape == tensor.shape
        assert torch.equal(other, tensor) or "expanded" in name
        unlike = other.stride() != tensor.stride() or other.storage_offset() > 0
        assert unlike or name == "contiguous" or len(shape) == 1
    assert LAYOUTS["every second"](normal(6, seed=0)).stride() == (2,)
    assert LAYOUTS["one row expanded"](normal(6, seed=0)).stride() == (0,)
