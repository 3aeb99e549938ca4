"""alibi_attention against exact ALiBi: slope·(j - i) in float64 from the float32 slopes, documents masked."""

import itertools

import torch
from torch import Tensor

from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from lorakernels import alibi_attention, alibi_slopes, attention_mask

HEAD_DIMS = (128, 64, 80, 96, 8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# batch, heads, tokens, head dimension, and those of the rehearsal; a GPU compiles for each of them
ODD_SHAPES = (
    ((1, 16, 2048, 64), (1, 4, 70, 16)),
    ((3, 5, 1000, 24), (3, 5, 33, 24)),
    ((1, 16, 127, 128), (1, 4, 31, 32)),
    ((2, 3, 129, 80), (2, 3, 17, 20)),
    ((4, 2, 17, 16), (4, 2, 9, 16)),
    ((2, 2, 1, 64), (2, 2, 1, 16)),
)
RESULTS = ("out", "dq", "dk", "dv")
# 16 bits: the probabilities are rounded as well as the output, and one more step of the gradients is
ROUNDINGS = (2, 3, 3, 3)
# the largest absolute value of gradients that are 0, those of a lone token: rounding of sums of about 10
VANISHED = 1e-5
# bfloat16, 2,048 tokens: relative error of the worst head
LARGEST = (2.5e-3, 3.5e-3, 3.5e-3, 3.5e-3)


def first() -> list[Item]:
    """Packed rows of 2,048 tokens, every row with different documents."""
    return [
        Item(f"alibi_attention packed, head dim {d}, bf16", check_packed, {"head_dim": d}) for d in HEAD_DIMS
    ]


def rest() -> list[Item]:
    """Other dtypes, odd lengths, one row and several, padding, and fewer queries than keys."""
    return [
        *(
            Item(
                f"alibi_attention {'x'.join(map(str, full))}, {d}",
                check_shape,
                {"full": full, "tiny": tiny, "dtype": d},
            )
            for (full, tiny), d in itertools.product(ODD_SHAPES, DTYPES)
        ),
        *(Item(f"alibi_attention last queries alone, {d}", check_last_queries, {"dtype": d}) for d in DTYPES),
    ]


def check_packed(findings: Findings, setting: Setting, head_dim: int) -> None:
    """Eager and compiled, with the batch's mask and without."""
    batch, heads, length = setting.pick((4, 16, 2048), (3, 4, 160))
    tensors, slopes, incoming = make_problem(setting, batch, heads, length, head_dim, torch.bfloat16)
    documents = packed_documents(setting, batch, length)
    exact = exact_results(tensors, slopes, documents, incoming)
    mask = attention_mask(documents, batch, length, torch.device(setting.device))

    def by_mask(query, key, value):
        return alibi_attention(query, key, value, slopes, mask=mask)

    def by_documents(query, key, value):
        return alibi_attention(query, key, value, slopes, document_ids=documents)

    variants = {
        "mask": by_mask,
        "documents": by_documents,
        "mask, compiled": torch.compile(by_mask, **setting.compiler),
        "documents, compiled": torch.compile(by_documents, **setting.compiler),
    }
    bounds = setting.pick(LARGEST, (None,) * 4)
    for name, function in variants.items():
        judge(findings, name, results(function, tensors, incoming), exact, torch.bfloat16, bounds)


def check_shape(
    findings: Findings, setting: Setting, full: tuple[int, ...], tiny: tuple[int, ...], dtype: str
) -> None:
    """Lengths that no block divides, by rows and by documents, padded and whole."""
    batch, heads, length, head_dim = setting.pick(full, tiny)
    tensors, slopes, incoming = make_problem(setting, batch, heads, length, head_dim, DTYPES[dtype])
    padded = packed_documents(setting, batch, length)
    # the data pipeline gives padding the id -1
    padded[:, length - length // 4 :] = -1
    for kind, documents in {"whole": None, "padded": padded}.items():
        exact = exact_results(tensors, slopes, documents, incoming)

        def attend(query, key, value, documents=documents):
            return alibi_attention(query, key, value, slopes, document_ids=documents)

        judge(findings, kind, results(attend, tensors, incoming), exact, DTYPES[dtype])


def check_last_queries(findings: Findings, setting: Setting, dtype: str) -> None:
    """As in generation with a cache: the queries are the last positions."""
    batch, heads, length, head_dim = setting.pick((2, 16, 2048, 128), (2, 4, 70, 16))
    (query, key, value), slopes, incoming = make_problem(
        setting, batch, heads, length, head_dim, DTYPES[dtype]
    )
    documents = packed_documents(setting, batch, length)
    for queries, ids in itertools.product((1, 5, length // 2, length - 1), (None, documents)):
        last = (query[:, :, length - queries :], key, value)
        dout = incoming[:, :, length - queries :]
        exact = exact_results(last, slopes, ids, dout)

        def attend(query, key, value, ids=ids):
            return alibi_attention(query, key, value, slopes, document_ids=ids)

        name = f"{queries} of {length}, {'whole' if ids is None else 'packed'}"
        judge(findings, name, results(attend, last, dout), exact, DTYPES[dtype])
        with torch.no_grad():
            out = attend(*last)
        judge(findings, f"{name}, no gradients", [out], exact[:1], DTYPES[dtype])


def make_problem(
    setting: Setting, batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """query, key and value as views into one projection, slopes, and the output's gradient."""
    generator = torch.Generator(setting.device).manual_seed(length + head_dim)
    options = {"generator": generator, "device": setting.device}
    fused = torch.randn(batch, length, heads, 3, head_dim, **options).to(dtype)
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    incoming = torch.randn(batch, heads, length, head_dim, **options).to(dtype)
    return (query, key, value), alibi_slopes(heads, setting.device), incoming


def packed_documents(setting: Setting, batch: int, length: int) -> Tensor:
    """Ids [B, T] of documents whose borders differ from row to row; some are one token long."""
    generator = torch.Generator().manual_seed(length)
    borders = torch.rand(batch, length, generator=generator) < 6 / length
    borders[:, length // 3] = borders[:, (length // 3 + 1) % length] = True
    return borders.int().cumsum(1).to(setting.device, torch.int32)


def results(function, tensors: tuple[Tensor, ...], incoming: Tensor) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def exact_results(
    tensors: tuple[Tensor, ...], slopes: Tensor, documents: Tensor | None, incoming: Tensor
) -> list[Tensor]:
    """Press et al. 2021 (arXiv:2108.12409) in float64, a head at a time: [out, dq, dk, dv]."""
    query, key, _ = tensors
    batch, heads, queries, head_dim = query.shape
    length = key.shape[2]
    j = torch.arange(length, device=query.device)
    i = j[length - queries :, None]
    exact = [torch.zeros(like.shape, dtype=torch.float64, device=like.device) for like in (query, *tensors)]
    for b in range(batch):
        allowed = j <= i
        if documents is not None:
            begins = torch.ones_like(documents[b], dtype=torch.bool)
            begins[1:] = documents[b, 1:] != documents[b, :-1]
            number = begins.cumsum(0)
            allowed = allowed & (number[i] == number)
        for h in range(heads):
            q, k, v, dout = (tensor[b, h].double() for tensor in (*tensors, incoming))
            scores = q @ k.T * head_dim**-0.5 + slopes[h].double() * (j - i)
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            dp = dout @ v.T
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * head_dim**-0.5
            for whole, part in zip(exact, (p @ v, ds @ k, ds.T @ q, p.T @ dout), strict=True):
                whole[b, h] = part
    return exact


def judge(
    findings: Findings,
    name: str,
    got: list[Tensor],
    exact: list[Tensor],
    dtype: torch.dtype,
    bounds: tuple[float | None, ...] = (None,) * 4,
) -> None:
    """The worst head of each result, by the rule or by the bound that is given instead."""
    for result, one, right, rounds, bound in zip(RESULTS, got, exact, ROUNDINGS, bounds, strict=False):
        if not right.any():
            largest = float(one.abs().max())
            findings.require(largest <= VANISHED, f"{name}: {result}: up to {largest:.2g} instead of 0")
            continue
        findings.compare_heads(
            f"{name}: {result}", one, right, dtype,
            operands=dtype, terms=right.shape[2], roundings=rounds, at_most=bound,
        )  # fmt: skip
