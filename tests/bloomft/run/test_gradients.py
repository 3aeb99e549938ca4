"""The flat buffer of gradients: what torch does for one parameter at a time, done as one."""

import pytest
import torch
from torch import nn

from bloomft.run.gradients import ALIGNMENT, ROW, FlatGradients

SHAPES = [(3, 7), (5, 2), (1, 1), (40, 33)]


def parameters_of(shapes, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def loss_of(parameters) -> torch.Tensor:
    return sum((parameter.sin() ** 3).sum() for parameter in parameters)


def test_gradients_are_added_up_at_their_places_as_by_backward():
    flat, plain = parameters_of(SHAPES), parameters_of(SHAPES)
    gradients = FlatGradients(flat)
    places = [parameter.grad.data_ptr() for parameter in flat]
    assert all(place % (4 * ALIGNMENT) == gradients.buffer.data_ptr() % (4 * ALIGNMENT) for place in places)
    for _ in range(3):
        gradients.add(loss_of(flat))
        loss_of(plain).backward()
    for ours, theirs in zip(flat, plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert places == [parameter.grad.data_ptr() for parameter in flat]
    gradients.zero()
    assert not any(parameter.grad.any() for parameter in flat)


@pytest.mark.parametrize("largest", [0.0, 0.5, 1e4, 1e-30])
def test_clipping_is_that_of_torch(largest):
    flat, plain = parameters_of(SHAPES), parameters_of(SHAPES)
    gradients = FlatGradients(flat)
    gradients.add(loss_of(flat))
    loss_of(plain).backward()
    norm = gradients.clip(largest)
    expected = nn.utils.clip_grad_norm_(plain, largest or float("inf"))
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(flat, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_what_is_not_finite_spreads_as_in_torch(value, largest):
    flat, plain = parameters_of(SHAPES), parameters_of(SHAPES)
    gradients = FlatGradients(flat)
    for parameter in flat:
        parameter.grad.fill_(1.0)[0] = value
    for parameter in plain:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[0] = value
    norm, expected = gradients.clip(largest), nn.utils.clip_grad_norm_(plain, largest or float("inf"))
    assert torch.equal(norm.isnan(), expected.isnan())
    for ours, theirs in zip(flat, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


def test_the_norm_of_millions_loses_no_digits():
    (parameter,) = parameters_of([(3000, 4 * ROW)])
    gradients = FlatGradients([parameter])
    parameter.grad.copy_(parameter.detach())
    exact = parameter.detach().double().norm()
    # one float32 sum is off by 5e-4 here
    assert abs(gradients.clip(0.0) - exact) / exact < 1e-6


def test_a_parameter_that_no_gradient_reaches_is_an_error():
    parameters = parameters_of(SHAPES)
    gradients = FlatGradients(parameters)
    with pytest.raises(RuntimeError, match="no gradient reached 2 of 4 adapter tensors"):
        gradients.add(loss_of(parameters[:2]))
