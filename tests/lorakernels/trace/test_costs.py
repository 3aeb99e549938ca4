"""Bytes and FLOPs of operations and kernels against counts by hand."""

import pytest
import torch

pytest.importorskip("triton")
from lorakernels.trace import costs, kernel_costs
from lorakernels.trace.rates import BYTES_RATE, MATRIX_RATE, device_seconds
from lorakernels.trace.record import Launch, footprint

aten = torch.ops.aten
A, B, C = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 5)
ROWS, INDEX = torch.zeros(100, 4), torch.zeros(7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "expected"),
    [
        (aten.mm.default, (A, B), {}, (24 + 60, 40, 60)),
        (aten.mm.out, (A, B), {"out": C.clone()}, (24 + 60, 40, 60)),
        (aten.addmm.default, (torch.zeros(5), A, B), {}, (20 + 24 + 60, 40, 60)),
        (aten.addmm_.default, (C.clone(), A, B), {}, (40 + 24 + 60, 40, 60)),
        (aten.addmm.default, (torch.zeros(5), A, B), {"beta": 0}, (24 + 60, 40, 60)),
        (aten.bmm.default, (A[None], B[None]), {}, (24 + 60, 40, 60)),
        (aten.baddbmm_.default, (C[None].clone(), A[None], B[None]), {}, (40 + 24 + 60, 40, 60)),
        (aten.add.Tensor, (A, A), {}, (24, 24, 0)),
        (aten.add.Tensor, (A, torch.zeros(1, 1).expand(2, 3)), {}, (24 + 4, 24, 0)),
        (aten.add_.Tensor, (A.clone(), A), {}, (48, 24, 0)),
        (aten.copy_.default, (A.clone(), A), {}, (24, 24, 0)),
        (aten.zero_.default, (A.clone(),), {}, (0, 24, 0)),
        (aten.zeros_like.default, (A,), {}, (0, 24, 0)),
        (aten._to_copy.default, (A,), {"dtype": torch.bfloat16}, (24, 12, 0)),
        (aten.cat.default, ([A, A.clone()],), {}, (48, 48, 0)),
        (aten.embedding.default, (ROWS, INDEX), {}, (7 * 16 + 56, 7 * 16, 0)),
        (aten.index.Tensor, (ROWS, [INDEX]), {}, (7 * 16 + 56, 7 * 16, 0)),
        (aten.index_copy_.default, (ROWS.clone(), 0, INDEX, ROWS[:7]), {}, (7 * 16 + 56, 7 * 16, 0)),
        (aten._foreach_mul_.Scalar, ([A.clone(), C.clone()], 2.0), {}, (64, 64, 0)),
    ],
)
def test_an_operation_reads_and_writes_what_it_must(func, args, kwargs, expected):
    launch = costs.launch_of(func, args, kwargs, func(*args, **kwargs))
    assert (launch.read, launch.written, launch.flops) == expected


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (A, [6])),
        (aten.transpose.int, (A, 0, 1)),
        (aten.unbind.int, (A,)),
        (aten.empty_like.default, (A,)),
        (aten.detach.default, (A,)),
        (aten.mul.Tensor, (torch.zeros(0, 3), torch.zeros(0, 3))),
    ],
)
def test_what_touches_no_element_is_no_launch(func, args):
    assert costs.launch_of(func, args, {}, func(*args)) is None


def test_an_expanded_dimension_is_stored_once():
    assert footprint(torch.zeros(5, 1, dtype=torch.float64).expand(5, 100)) == 40
    assert footprint(torch.zeros(0, 4)) == 0


def test_the_gemm_kernel_reads_its_operands_once_and_multiplies_the_longer_rank():
    tensors = {
        "x_ptr": torch.zeros(4, 8), "weight_ptr": torch.zeros(6, 8), "bias_ptr": torch.zeros(6),
        "left_ptr": torch.zeros(4, 16), "right_ptr": torch.zeros(6, 16), "y_ptr": torch.zeros(4, 6),
    }  # fmt: skip
    sizes = {"M": 4, "N": 6, "K": 8, "R": 16, "BIAS": True}
    launch = kernel_costs.launch_of("lora_linear_gemm_kernel", tensors | sizes, (1, 1, 1))
    assert launch.read == 4 * (4 * 8 + 6 * 8 + 6 + 4 * 16 + 6 * 16)
    assert launch.written == 4 * 4 * 6
    assert launch.flops == 2 * 4 * 6 * (8 + 16)


def test_a_kernel_without_a_cost_is_refused():
    with pytest.raises(KeyError, match="new_kernel"):
        kernel_costs.launch_of("new_kernel", {}, (1, 1, 1))


def test_a_launch_takes_as_long_as_what_binds_it():
    moves = Launch("aten", "clone", "", int(BYTES_RATE) // 2, int(BYTES_RATE) // 2)
    multiplies = Launch("aten", "mm", "", 10, 10, int(3 * MATRIX_RATE))
    assert device_seconds([moves, multiplies]) == pytest.approx(4.0)
