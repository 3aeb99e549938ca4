"""Causal attention with linear biases, beside others', and beside vendors' without biases."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines import attention as baselines
from benchmarks.gpu_check.attention_items import RESULTS, exact_results, judge, make_problem
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed.sides import MODES, Case, Differentiated, Side, UnavailableError, other_side
from lorakernels import alibi_attention, attention_mask, dispatch

# batch, heads, tokens, head dimension: BLOOM-1b7's, BLOOM-560m's, and long rows
SHAPES = ((4, 16, 2048, 128), (4, 16, 2048, 64), (1, 16, 8192, 128))
TINY = ((2, 4, 32, 16), (2, 4, 32, 8), (1, 4, 64, 16))
DOCUMENTS = 4
DTYPE = torch.bfloat16
FLOOR, OURS = "FlashAttention 2, without ALiBi", "lorakernels"
PACKED = f"lorakernels, {DOCUMENTS} documents"
VENDORS = {FLOOR: SDPBackend.FLASH_ATTENTION, "cuDNN, without ALiBi": SDPBackend.CUDNN_ATTENTION}
OTHERS = {"eager (transformers)": baselines.eager, "SDPA with a bias": baselines.sdpa_with_bias}
# They round biases of up to thousands to bfloat16; results have to be nearer to the truth than zero is.
OTHERS_AT_MOST = 1.0

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def items() -> list[Item]:
    """Every shape eagerly, then as graphs."""
    return [
        Item(
            f"attention {'x'.join(map(str, full))}{suffix}",
            check_attention,
            {"full": full, "tiny": tiny, "mode": mode},
            limit=60.0,
        )
        for mode, suffix in MODES.items()
        for full, tiny in zip(SHAPES, TINY, strict=True)
    ]


def check_attention(
    findings: Findings, setting: Setting, full: tuple[int, ...], tiny: tuple[int, ...], mode: str
) -> None:
    """Every side in bfloat16, its query, key and value being views of one projection."""
    batch, heads, length, width = setting.pick(full, tiny)
    tensors, slopes, incoming = make_problem(setting, batch, heads, length, width, DTYPE)
    documents = (torch.arange(length, device=setting.device) * DOCUMENTS // length).expand(batch, length)
    mask = attention_mask(documents, batch, length, torch.device(setting.device))

    @functools.cache
    def exact(with_bias: bool, packed: bool) -> list[Tensor]:
        return exact_results(tensors, slopes * with_bias, documents if packed else None, incoming)

    def named(with_bias: bool, packed: bool) -> list[tuple[str, Tensor]]:
        return list(zip(RESULTS, exact(with_bias, packed), strict=True))

    def differentiated(attend: Attend) -> Differentiated:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return Differentiated(lambda: attend(*leaves), leaves, incoming)

    def make_ours(packed: bool) -> Side:
        options = {"mask": mask} if packed else {}
        both = differentiated(lambda *leaves: alibi_attention(*leaves, slopes, **options))

        def wrong(got: list[Tensor]) -> list[str]:
            found = Findings()
            judge(found, "packed" if packed else "whole", got, exact(True, packed), DTYPE)
            findings.figures.extend(found.figures)
            return found.faults

        return Side(both.phases(), both.results, named(True, packed), wrong)

    def make_other(attend: Attend, with_bias: bool) -> Side:
        return other_side(differentiated(attend), named(with_bias, False), OTHERS_AT_MOST)

    builders: dict[str, Callable[[], Side]] = {
        name: functools.partial(make_vendor, make_other, backend, setting.device)
        for name, backend in VENDORS.items()
    }
    builders[OURS] = lambda: make_ours(False)
    builders[PACKED] = lambda: make_ours(True)
    for name, attend in OTHERS.items():
        builders[name] = lambda attend=attend: make_other(lambda *leaves: attend(*leaves, slopes), True)
    name = dispatch.dtype_name(DTYPE)
    Case(
        f"attention[{batch}-{heads}-{length}-{width}]",
        "alibi_attention",
        f"ALiBi attention, B={batch} T={length} heads={heads} D={width} {name}",
        FLOOR,
        mode,
        seconds=2.0,
        extra={"case": {"B": batch, "T": length, "heads": heads, "D": width, "dtype": name}},
    ).measure(findings, setting, builders)


def make_vendor(make: Callable[[Attend, bool], Side], backend: SDPBackend, device: str) -> Side:
    """torch's causal attention by one backend; UnavailableError where that needs a GPU."""
    if backend == SDPBackend.CUDNN_ATTENTION and device != "cuda":
        raise UnavailableError("cuDNN needs a GPU")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return make(attend, False)
