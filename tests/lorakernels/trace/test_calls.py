"""What of a tensor decides how Triton compiles a kernel is kept of it."""

import pytest
import torch

pytest.importorskip("triton")
from lorakernels.ops.lora_linear.kernels import lora_linear_reduce_kernel
from lorakernels.trace.calls import KernelCall, Pointer


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
    assert (call.module, call.name) == ("lorakernels.ops.lora_linear.kernels", "lora_linear_reduce_kernel")
