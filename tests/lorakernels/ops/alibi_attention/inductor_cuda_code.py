"""Prints of inductor's CUDA code of alibi_attention how it finds each row's blocks, and its kernels' options.

The mask is made eagerly (of fixed and of varying length), by its operator while a compiler traces, or, the
mistake that the operator prevents, by its plain operations while a compiler traces. Tensors are fake, kernels
are written and not compiled, and torch is told that there is an H100: a process of its own, without a GPU.
"""

import ctypes
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._dynamo import _trace_wrapped_higher_order_op
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import flex_attention
from torch.utils import _triton

from lorakernels import AttentionMask, alibi_attention, attention_mask
from lorakernels.aot.chips import CHIPS
from lorakernels.ops.alibi_attention import flex, mask

CUDA, META = 1, 14  # places in c10's registry of device guards


# what inductor asks of a device
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


def pretend_cuda() -> None:
    """Make this process believe in one H100, for as long as nothing runs on it."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "_get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "_lazy_init": None,
        "synchronize": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: CHIPS["sm_90"].target))
    # FlexAttention's trace makes a 0-d tensor on the device: torch.tensor would copy, which takes a real one
    fill = lambda value, **options: torch.full((), value, **options)  # noqa: E731
    _trace_wrapped_higher_order_op.torch = SimpleNamespace(**{**vars(torch), "tensor": fill})
    # patterns are traced on the device before the first graph
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None
    # what was found before, without a GPU
    _triton.has_triton.cache_clear()
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)


def generated_code(function, arguments) -> str:
    """Inductor's code of function, compiled for arguments."""
    codes = []

    def keep(graph: GraphLowering) -> SimpleNamespace:
        code = graph.codegen()[0]
        codes.append(getattr(code, "value", code))
        raise InterruptedError

    GraphLowering.compile_to_module = keep
    try:
        torch.compile(function, fullgraph=True)(*arguments)
    except Exception:
        if not codes:
            raise
    return codes[0]


def head_strides(made: str, dynamic: bool) -> dict[str, str]:
    """By name, what inductor's code multiplies a row's number with, for a mask made in one of three ways."""
    torch._dynamo.reset()
    parts = [torch.empty(4, 2048, 16, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    parts = [part.transpose(1, 2) for part in parts]
    slopes, ids = torch.empty(16, device="cuda"), torch.empty(4, 2048, dtype=torch.int64, device="cuda")
    given = attention_mask(ids, 4, 2048, ids.device)
    if dynamic:
        for tensor, dimensions in [*((part, [2]) for part in parts), (ids, [1]), (given.starts, [1])]:
            torch._dynamo.mark_dynamic(tensor, dimensions)
        for tensor in given[1:]:
            torch._dynamo.mark_dynamic(tensor, list(range(2, tensor.ndim)))

    def attend(query, key, value, slopes, given, ids):
        if made == "eager":
            return alibi_attention(query, key, value, slopes, mask=given)
        if made == "traced":
            return alibi_attention(query, key, value, slopes, document_ids=ids)
        traced = AttentionMask(*mask._mask._init_fn(ids, ids.shape[1], ids.device))
        return flex.masked_attention(query, key, value, slopes, traced)

    code = generated_code(attend, (*parts, slopes, given, ids))
    return dict(re.findall(r"(stride_(?:full_)?kv_(?:idx|num_blks)_h) = (.*)", code))


def traced_passes(options: dict[str, Any]) -> list[tuple[GraphModule, list[Tensor]]]:
    """The graphs of the forward and the backward pass, and their inputs, traced on the CPU.

    Autograd would ask for the GPU.
    """
    torch._dynamo.reset()
    passes = []

    def keep(graph, inputs):
        passes.append((graph, inputs))
        return make_boxed_func(graph.forward)

    # a row of its own for each of the batch: an index that is a constant could not be lowered by itself
    given = attention_mask(torch.zeros(2, 256, dtype=torch.int64), 2, 256, "cpu")
    parts = [torch.empty(2, 2, 256, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    with (
        patch.object(flex_attention, "_validate_device", lambda *_: None),
        functorch.patch(force_non_lazy_backward_lowering=True),
    ):
        compiled = torch.compile(flex.masked_attention, fullgraph=True, backend=backend, dynamic=False)
        compiled(*parts, torch.empty(2), given, options)
    return passes


def kernel_options(graph: GraphModule, inputs: list[Tensor]) -> dict[str, str]:
    """The tiles, stages and warps of FlexAttention's kernel in inductor's code for graph, by name."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        moved = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda") for one in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
        lowering = GraphLowering(graph, example_inputs=moved)
        with V.set_fake_mode(mode), V.set_graph_handler(lowering), DebugContext():
            lowering.run(*moved)
            code = lowering.codegen()[0]
    code = getattr(code, "value", code)
    found = re.findall(r"(BLOCK_[MN]\d?) : tl.constexpr = (\d+)", code)
    # beside the template's kernel there is one for the sums of rows, whose decorator has neither
    return dict(found + re.findall(r"^(num_stages|num_warps)=(\d+)", code, re.MULTILINE))


def main() -> None:
    """Print the strides, and for every candidate the options of the forward and the backward, as JSON."""
    candidates = [*flex.FORWARD.values(), *flex.BACKWARD.values()]
    traced = [traced_passes(options) for options in candidates]
    pretend_cuda()
    settings = {"force_disable_caches": True, "compile_threads": 1, "joint_graph_constant_folding": False}
    with config.patch(settings), torch.no_grad():
        options = [[kernel_options(*one) for one in passes] for passes in traced]
        with FakeTensorMode(allow_non_fake_inputs=True):
            cases = [("eager", False), ("eager", True), ("traced", False), ("plain", False)]
            strides = [head_strides(*case) for case in cases]
        print(json.dumps([strides, options]))


if __name__ == "__main__":
    main()
