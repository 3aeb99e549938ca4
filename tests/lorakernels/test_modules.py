"""LoRALinear: initialisation, state, merging, and updates on chosen parts of interleaved rows."""

import math

import pytest
import torch
from torch import nn

from lorakernels import LoRALinear, RowParts, dispatch


def trained(linear: nn.Linear, r: int = 4, scale: float = 2.0, **options) -> LoRALinear:
    layer = LoRALinear.from_linear(linear, r, scale, **options)
    nn.init.normal_(layer.lora_b)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_layer_computes_what_the_base_does(dtype):
    linear = nn.Linear(20, 30, dtype=dtype)
    layer = LoRALinear.from_linear(linear, 4, 2.0)
    x = torch.randn(5, 20, dtype=dtype)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert layer.lora_a.dtype == layer.lora_b.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert not layer.lora_b.any()
    # Kaiming uniform with a = sqrt(5): uniform within 1 / sqrt(K)
    assert 0.8 / math.sqrt(20) < layer.lora_a.abs().max() <= 1 / math.sqrt(20)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert linear.weight.requires_grad


def test_state_dict_round_trip():
    linear = nn.Linear(6, 10)
    layer, other = trained(linear), trained(nn.Linear(6, 10))
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged(dtype, bias):
    linear = nn.Linear(20, 30, bias=bias, dtype=dtype)
    before = linear.weight.clone()
    layer = trained(linear)
    merged = layer.merged()
    expected = linear.weight.float() + layer.scale * layer.lora_b @ layer.lora_a
    assert torch.equal(merged.weight, expected.to(dtype))
    torch.testing.assert_close(layer.delta_weight(), layer.scale * layer.lora_b @ layer.lora_a)
    assert torch.equal(linear.weight, before)
    assert type(merged) is nn.Linear
    assert (merged.bias is None) == (not bias)
    x = torch.randn(4, 20, dtype=dtype)
    torch.testing.assert_close(merged(x), layer(x), rtol=0.02, atol=0.05) if dtype == torch.bfloat16 else (
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    )


def test_dropout_acts_in_training_alone():
    layer = trained(nn.Linear(20, 30), dropout_p=0.5)
    x = torch.randn(4, 20)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.merged()(x))


HEADS, HEAD_DIM = 3, 4
NAMES = ("q", "k", "v")
OUT = HEADS * len(NAMES) * HEAD_DIM


def expected_rows(chosen: tuple[str, ...]) -> list[int]:
    """Written out: head by head, part by part, row by row."""
    return [
        (head * len(NAMES) + NAMES.index(name)) * HEAD_DIM + i
        for head in range(HEADS)
        for name in NAMES
        if name in chosen
        for i in range(HEAD_DIM)
    ]


@pytest.mark.parametrize("backend", ["aten", "triton", "reference"])
@pytest.mark.parametrize("chosen", [("q",), ("v",), ("q", "v"), ("v", "k"), NAMES])
def test_parts_change_the_chosen_rows_alone(chosen, backend, device):
    linear = nn.Linear(16, OUT, device=device)
    parts = RowParts(HEADS, NAMES, chosen)
    rows = expected_rows(chosen)
    assert parts.rows(OUT).tolist() == rows
    layer = trained(linear, parts=parts)
    layer.backend = backend
    assert layer.lora_b.shape == (len(rows), 4)
    x = torch.randn(5, 16, device=device)
    changed = (layer(x) - linear(x)).abs().amax(0) > 1e-5
    assert changed.nonzero().flatten().tolist() == rows
    update = layer.scale * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer.delta_weight()[rows], update)
    torch.testing.assert_close(layer.full_lora_b()[rows], layer.lora_b)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-4)
    dy = torch.randn(5, OUT, device=device)
    layer(x).backward(dy)
    torch.testing.assert_close(
        layer.lora_b.grad, layer.scale * dy[:, rows].T @ (x @ layer.lora_a.T), rtol=1e-4, atol=1e-4
    )


def test_contiguous_thirds_are_not_the_parts():
    # the mistake that interleaved rows invite must be visible
    rows = RowParts(HEADS, NAMES, ("q",)).rows(OUT).tolist()
    assert rows != list(range(OUT // 3))


def test_the_order_in_which_parts_are_chosen_does_not_matter():
    assert RowParts(2, NAMES, ("v", "q")) == RowParts(2, NAMES, ["q", "v"])


def test_parts_compile_whole():
    layer = trained(nn.Linear(16, OUT), parts=RowParts(HEADS, NAMES, ("q", "v")))
    x = torch.randn(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"r": 2.0}, "r: expected an integer >= 1, got 2.0"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"dropout_p": 1.0}, "dropout_p: expected a probability"),
        ({"parts": RowParts(5, NAMES, ("q",))}, "parts: expected a multiple of 5 heads x 3 parts.*got 36"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(16, OUT), **{"r": 4, "scale": 1.0, **options})


def test_bad_modules_are_named():
    with pytest.raises(TypeError, match=r"linear: expected torch\.nn\.Linear, got Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(1, 1, 1), 4, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, NAMES, ("q",)), "heads"),
        ((2, (), ("q",)), "names"),
        ((2, ("q", "q"), ("q",)), "names"),
        ((2, NAMES, ()), "chosen"),
        ((2, NAMES, ("query",)), "chosen: expected a non-empty subset of .*'query'"),
        ((2, NAMES, ("q", "q")), "chosen"),
    ],
)
def test_bad_parts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowParts(*arguments)


def test_the_dropout_seed_of_a_layer_fixes_its_masks():
    layer, x = trained(nn.Linear(24, 40), dropout_p=0.5), torch.randn(6, 24)
    layer.dropout_seed = torch.tensor([3])
    first = layer(x)
    assert torch.equal(layer(x), first)
    layer.dropout_seed.fill_(4)
    assert not torch.equal(layer(x), first)
    assert layer.state_dict().keys() == {"weight", "bias", "lora_a", "lora_b"}
    torch.testing.assert_close(layer.eval()(x), x @ (layer.weight + layer.delta_weight()).T + layer.bias)


def test_prepare_chooses_before_the_first_forward(monkeypatch):
    monkeypatch.setitem(dispatch.LARGE, "cpu", 0)
    layer = trained(nn.Linear(24, 40, dtype=torch.bfloat16), dropout_p=0.1)
    layer.prepare(50)
    problems = set(dispatch.kernel_choices())
    assert all("M<=64 N=40 K=24 r=4, dropout" in problem for problem in problems)
    assert {problem.split(" on ")[0] for problem in problems} == {
        "lora_linear forward",
        "lora_linear backward",
    }
    trained(nn.Linear(24, 40, dtype=torch.float64)).prepare(50)
    sole = [choice for name, choice in dispatch.kernel_choices().items() if name not in problems]
    assert [(one["winner"], one["milliseconds"]) for one in sole] == 2 * [("aten", {})], "checked, not timed"
    monkeypatch.setattr(dispatch, "_measure", None)
    layer(torch.randn(5, 10, 24, dtype=torch.bfloat16)).sum().backward()
