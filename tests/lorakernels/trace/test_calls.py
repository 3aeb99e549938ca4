"""What of a tensor decides how Triton compiles a kernel is kept of it."""

import pytest
import torch

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from lorakernels.ops.lora_linear.triton.parts import lora_linear_reduce_kernel
from lorakernels.trace.calls import Descriptor, KernelCall, Pointer


def test_a_tensor_keeps_its_dtype_alignment_and_storage():
    memory = torch.empty(1000, dtype=torch.bfloat16)
    arguments = {"whole": memory, "aligned": memory[8:].view(8, -1), "unaligned": memory[1:], "size": 8}
    call = KernelCall.of(lora_linear_reduce_kernel, arguments, (4, 1))
    assert dict(call.arguments) == {
        "whole": Pointer(torch.bfloat16, 0, 2000),
        "aligned": Pointer(torch.bfloat16, 16, 2000),
        "unaligned": Pointer(torch.bfloat16, 2, 2000),
        "size": 8,
    }
    assert (call.module, call.name) == (
        "lorakernels.ops.lora_linear.triton.parts",
        "lora_linear_reduce_kernel",
    )


def test_a_descriptor_keeps_its_dtype_and_block():
    memory = torch.empty(64, 128, dtype=torch.bfloat16)
    described = TensorDescriptor.from_tensor(memory, [16, 32])
    call = KernelCall.of(lora_linear_reduce_kernel, {"operand": described}, (1,))
    kept = dict(call.arguments)["operand"]
    assert kept == Descriptor(torch.bfloat16, (16, 32))
    assert (kept.described().base.dtype, kept.described().block_shape) == (torch.bfloat16, [16, 32])
