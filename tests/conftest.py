"""Triton's interpreter where there is no GPU, switched on before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    # Triton's own functions look at it when it is first imported, kernels when they are decorated.
    os.environ["TRITON_INTERPRET"] = "1"
