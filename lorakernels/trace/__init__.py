"""Run the CUDA code on tensors without data, and count what it launches; needs no GPU.

record.py holds what is counted, pretend.py the tensors that say they are CUDA's, costs.py the bytes and FLOPs
of ATen's operations and kernel_costs.py those of the Triton kernels, calls.py what those are compiled by,
attention.py FlexAttention's launches, rates.py the times computed from them, cases.py the operators' cases,
__main__.py the command `python -m lorakernels.trace`.
"""
