"""Triton's interpreter, unless there is a GPU or TRITON_INTERPRET is set; before anything imports Triton."""

import os

from bloomft.process import share_cores

share_cores()  # before torch is imported

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton's own functions look at it when it is first imported, kernels when they are decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")
