"""linear_cross_entropy, frozen_linear and the layer norms with more in them against float64."""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.lora_items import DTYPES, precision
from benchmarks.gpu_check.pool import Item, Setting
from lorakernels import (
    add_layer_norm,
    frozen_linear,
    layer_norm_shrink,
    linear_cross_entropy,
    linear_cross_entropy_in_blocks,
)
from lorakernels.ops.add_layer_norm import check as sum_check
from lorakernels.ops.add_layer_norm import implementations as sum_implementations
from lorakernels.ops.frozen_linear.implementations import fused
from lorakernels.ops.frozen_linear.reference import Problem as FrozenProblem
from lorakernels.ops.layer_norm_shrink import check as norm_check
from lorakernels.ops.layer_norm_shrink import implementations as norm_implementations
from lorakernels.ops.linear_cross_entropy import aten, check
from lorakernels.ops.lora_linear.reference import keep_mask

# BLOOM's vocabulary
VOCABULARY = 250_880
EXACT_ROWS = 256
# as the trainer's GradScaler has it in float16, where gradients of a mean would underflow
LOSS_SCALE = 2.0**10


def first() -> list[Item]:
    """The loss over BLOOM's vocabulary."""
    return [Item(f"linear_cross_entropy, {dtype}", check_loss, {"dtype": dtype}) for dtype in DTYPES]


def rest() -> list[Item]:
    """The loss's own implementations at odd sizes, the frozen linear layer, the layer norms."""
    return [
        *(Item(f"linear_cross_entropy, odd sizes, {d}", check_odd_loss, {"dtype": d}) for d in DTYPES),
        *(Item(f"frozen_linear, {dtype}", check_frozen, {"dtype": dtype}) for dtype in DTYPES),
        *(Item(f"layer_norm_shrink, {dtype}", check_norm, {"dtype": dtype}) for dtype in DTYPES),
        *(Item(f"add_layer_norm, {dtype}", check_sum, {"dtype": dtype}) for dtype in DTYPES),
    ]


def check_loss(findings: Findings, setting: Setting, dtype: str) -> None:
    """Mean over half of the rows, with the head frozen, as in training, in blocks, and trained."""
    # in float64 the head takes 2 GiB, in each of several processes
    rows, width, vocabulary = setting.pick((2048, 1024, VOCABULARY), (24, 32, 4100))
    hidden, weight, labels = make_loss_problem(setting, rows, width, vocabulary, DTYPES[dtype])
    labels[::2] = -100
    with precision(dtype):
        share = torch.full((rows,), LOSS_SCALE / (rows // 2), device=hidden.device)
        exact = exact_loss(hidden, weight, labels, share)
        exact[0] = exact[0].sum() / (rows // 2)
        for trained in (False, True):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
            loss = linear_cross_entropy(h, w, labels)
            (loss * LOSS_SCALE).backward()
            name = "head trained" if trained else "head frozen"
            judge(findings, name, [loss.detach(), h.grad, w.grad], exact, hidden, weight)
        h = hidden.clone().requires_grad_()
        loss = linear_cross_entropy_in_blocks(h, weight.split(vocabulary // 3), labels)
        (loss * LOSS_SCALE).backward()
        judge(findings, "head in blocks", [loss.detach(), h.grad, None], exact, hidden, weight)


def check_odd_loss(findings: Findings, setting: Setting, dtype: str) -> None:
    """Each implementation directly, every reduction, strides, all rows ignored, autocast."""
    sizes = setting.pick(((333, 517, 9001), (1, 64, 50_257)), ((7, 33, 901), (1, 16, 130)))
    for rows, width, vocabulary in sizes:
        hidden, weight, labels = make_loss_problem(setting, rows, width, vocabulary, DTYPES[dtype])
        with precision(dtype):
            incoming = torch.rand(rows, dtype=torch.float64, device=hidden.device) + 0.5
            exact = exact_loss(hidden, weight, labels, incoming)
            exact_sum = exact_loss(hidden, weight, labels, torch.ones_like(incoming))
            exact_sum[0] = exact_sum[0].sum()
            for implementation in (aten, triton_loss()):
                got = own_results(implementation, hidden, weight, labels, incoming.float())
                name = implementation.__name__.rpartition(".")[2]
                judge(findings, f"{rows} rows, {name}", got, exact, hidden, weight)
            strided = (
                hidden.T.contiguous().T,
                weight.T.contiguous().T,
                torch.stack([labels, labels], 1)[:, 0],
            )
            for name, (h, w, target) in {"rows": (hidden, weight, labels), "strided": strided}.items():
                h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
                losses = linear_cross_entropy(h, w, target, reduction="none")
                got = [losses.detach(), *torch.autograd.grad(losses, [h, w], incoming.to(losses.dtype))]
                judge(findings, f"{rows} {name}, none", got, exact, hidden, weight)
                total = linear_cross_entropy(h, w, target, reduction="sum")
                got = [total.detach(), *torch.autograd.grad(total, [h, w])]
                judge(findings, f"{rows} {name}, sum", got, exact_sum, hidden, weight)
            nothing = linear_cross_entropy(h, w, torch.full_like(labels, -100))
            findings.require(bool(nothing.isnan()), "all rows ignored: the mean is a number")
            gradients = torch.autograd.grad(nothing, [h, w])
            findings.require(
                not any(one.any() for one in gradients), "all rows ignored: a gradient is not zero"
            )
        if DTYPES[dtype] != torch.float32:
            with torch.autocast(setting.device, DTYPES[dtype]):
                total = linear_cross_entropy(hidden.float(), weight.float(), labels, reduction="sum")
            judge(findings, f"{rows} rows, autocast", [total, None, None], exact_sum, hidden, weight)


def check_frozen(findings: Findings, setting: Setting, dtype: str) -> None:
    """The layer alone and after GELU, at BLOOM's sizes and odd ones, and every kernel for its gradient."""
    shapes = setting.pick(
        ((8192, 8192, 2048), (8192, 2048, 8192), (131, 517, 77)), ((40, 64, 48), (13, 51, 7))
    )
    for (m, k, n), with_gelu in ((shape, with_gelu) for shape in shapes for with_gelu in (False, True)):
        x, weight = (torch.randn(size, k, device=setting.device).to(DTYPES[dtype]) for size in (m, n))
        weight, bias = weight / k**0.5, torch.randn(n, device=setting.device).to(DTYPES[dtype])
        dy = torch.randn(m, n, device=setting.device).to(DTYPES[dtype])
        for by_columns in (False, True):
            stored = weight.T.contiguous().T if by_columns else weight
            wide = x.double().requires_grad_()
            activated = gelu(wide, approximate="tanh") if with_gelu else wide
            right = linear(activated, weight.double(), bias.double())
            exact = [right.detach(), *torch.autograd.grad(right, wide, dy.double())]
            with precision(dtype):
                leaf = x.clone().requires_grad_()
                y = frozen_linear(leaf, stored, bias, gelu=with_gelu)
                got = [y.detach(), *torch.autograd.grad(y, leaf, dy)]
            name = f"{m}x{k}x{n}{', gelu' if with_gelu else ''}{', weight by columns' if by_columns else ''}"
            for result, one, exactly, terms in zip(("y", "dx"), got, exact, (k, n), strict=True):
                # gelu is rounded before the product, the gradient of that before gelu's derivative
                findings.compare(
                    f"{name}: {result}", one, exactly, x.dtype,
                    operands=x.dtype, terms=terms, roundings=2,
                )  # fmt: skip
            problem = FrozenProblem(dy, stored, x)
            for one in fused(problem) if with_gelu else ():
                findings.compare(
                    f"{name}: dx, {one.name}", one.backward(*problem), exact[1], x.dtype,
                    operands=x.dtype, terms=n, roundings=one.roundings,
                )  # fmt: skip


def check_norm(findings: Findings, setting: Setting, dtype: str) -> None:
    """Every implementation, with float32 adapters and x's own, with dropout, and the operator's dx."""
    shapes = setting.pick(
        ((8192, 2048, 8), (8192, 2048, 64), (333, 517, 128), (77, 16_384, 5)), ((40, 48, 8), (13, 51, 70))
    )
    for m, k, rank in shapes:
        for adapter_dtype in dict.fromkeys((torch.float32, DTYPES[dtype])):
            plain = norm_check.random_problem(m, k, rank, DTYPES[dtype], adapter_dtype, setting.device)
            seed = torch.tensor([m], device=setting.device)
            for dropout_p in (0.0, 0.1):
                problem = replace(plain, dropout_p=dropout_p, seed=seed)
                multiplier = keep_mask(seed, m, k, dropout_p) / (1 - dropout_p) if dropout_p else None
                for name in ("reference", "aten", "triton"):
                    case = f"{m}x{k} r={rank} {adapter_dtype}, dropout {dropout_p}, {name}"
                    with precision(dtype):
                        got = norm_implementations.select(plain, name).forward(problem)
                        wrong = norm_check.failures(got, problem, multiplier)
                    findings.faults += [f"{case}: {line}" for line in wrong]
        parameters = (plain.norm_weight, plain.norm_bias, plain.eps)
        leaf, wide = plain.x.clone().requires_grad_(), plain.x.double().requires_grad_()
        h, _, _ = layer_norm_shrink(leaf, *parameters, plain.lora_a, plain.scale, backend="triton")
        exact = layer_norm(wide, [k], parameters[0].double(), parameters[1].double(), plain.eps)
        dh = torch.randn_like(h)
        (dx,), (right,) = torch.autograd.grad(h, leaf, dh), torch.autograd.grad(exact, wide, dh.double())
        findings.compare(f"{m}x{k} r={rank}: dx", dx, right, dx.dtype, operands=dx.dtype, terms=k)


def check_sum(findings: Findings, setting: Setting, dtype: str) -> None:
    """Every implementation of both directions, and the operator's gradient of both that are added."""
    shapes = setting.pick(((8192, 2048), (333, 517), (77, 16_384), (1, 33)), ((40, 48), (13, 51)))
    for m, k in shapes:
        problem = sum_check.random_problem(m, k, DTYPES[dtype], setting.device)
        for name in ("reference", "aten", "triton"):
            run = sum_implementations.select(problem, name)
            wrong = sum_check.failures(run.forward(problem), problem)
            for adds in (True, False):
                back = sum_check.random_backward_problem(m, k, DTYPES[dtype], setting.device, adds=adds)
                wrong += sum_check.backward_failures(run.backward(back), back, run.roundings)
            findings.faults += [f"{m}x{k}, {name}: {line}" for line in wrong]
        leaves = [one.clone().requires_grad_() for one in (problem.x, problem.residual)]
        parameters = (problem.weight, problem.bias, problem.eps)
        results = add_layer_norm(*leaves, *parameters, backend="triton")
        incoming = [torch.randn_like(one) for one in results]
        t = results[0].detach().double().requires_grad_()
        h = layer_norm(t, [k], problem.weight.double(), problem.bias.double(), problem.eps)
        (exact,) = torch.autograd.grad([t, h], t, [one.double() for one in incoming])
        for name, dx in zip(("dx", "dresidual"), torch.autograd.grad(results, leaves, incoming), strict=True):
            findings.compare(f"{m}x{k}: {name}", dx, exact, dx.dtype, operands=dx.dtype, terms=k)


def make_loss_problem(
    setting: Setting, rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels; the logits have a standard deviation of about 2."""
    generator = torch.Generator(setting.device).manual_seed(rows + width)
    options = {"generator": generator, "device": setting.device}
    hidden = (2 * torch.randn(rows, width, **options)).to(dtype)
    weight = (torch.randn(vocabulary, width, **options) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), **options)


def exact_loss(hidden: Tensor, weight: Tensor, labels: Tensor, incoming: Tensor) -> list[Tensor]:
    """Losses [T] and, for the gradient incoming [T] of each, those of hidden and weight; in float64."""
    wide = weight.double()
    losses = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    dhidden, dweight = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    for rows in torch.nonzero(labels != -100)[:, 0].split(EXACT_ROWS):
        part = hidden[rows].double()
        logits = part @ wide.T
        target = labels[rows][:, None]
        losses[rows] = logits.logsumexp(1) - logits.gather(1, target)[:, 0]
        gradient = logits.softmax(1).scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float64))
        gradient *= incoming[rows].double()[:, None]
        dhidden[rows] = gradient @ wide
        dweight += gradient.T @ part
    return [losses, dhidden, dweight]


def triton_loss() -> ModuleType:
    """The implementation in Triton; imported late, since the interpreter must be selected first."""
    from lorakernels.ops.linear_cross_entropy import triton

    return triton


def own_results(
    implementation: ModuleType, hidden: Tensor, weight: Tensor, labels: Tensor, incoming: Tensor
) -> list[Tensor]:
    """Losses and gradients of an implementation, without the operator around it."""
    losses, statistics, unscaled = implementation.forward(hidden, weight, labels, True)
    dhidden = (unscaled * incoming[:, None]).to(hidden.dtype)
    dweight = implementation.weight_gradient(hidden, weight, labels, losses, statistics, incoming)
    return [losses, dhidden, dweight]


def judge(
    findings: Findings,
    name: str,
    got: list[Tensor | None],
    exact: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
) -> None:
    """Loss and gradients by the operator's own rule; what was not asked for is None."""
    largest_logit = max(
        float((part.double() @ weight.double().T).abs().max()) for part in hidden.split(EXACT_ROWS)
    )
    bounds = check.bounds(
        exact, hidden.dtype, rows=len(hidden), width=hidden.shape[1], vocabulary=len(weight),
        largest_logit=largest_logit, rounds_products=hidden.dtype.itemsize == 2,
    )  # fmt: skip
    for result, one, right, bound in zip(check.RESULTS, got, exact, bounds, strict=True):
        if one is not None:
            dtype = torch.float32 if result == "loss" else hidden.dtype
            findings.compare(f"{name}: {result}", one, right, dtype, at_most=bound)
