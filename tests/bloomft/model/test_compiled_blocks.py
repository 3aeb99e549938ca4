"""Compiled blocks: one compilation for packed rows, one beside it for all other shapes."""

import pytest
import torch

from bloomft.model import compiled_blocks
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.fused_classes import checkpoint_blocks
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import close, tokens, with_trained_adapters

SHAPE = (2, 24)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps which sizes of each graph's inputs vary, and the calls that each graph gets."""

    def __init__(self) -> None:
        self.varies: list[bool] = []
        self.calls: list[int] = []

    def __call__(self, graph, inputs):
        index = len(self.varies)
        sizes = [size for one in inputs if isinstance(one, torch.Tensor) for size in one.shape]
        integers = [one for one in inputs if isinstance(one, (int, torch.SymInt))]
        self.varies.append(any(isinstance(one, torch.SymInt) for one in (*sizes, *integers)))

        def run(*arguments):
            self.calls.append(index)
            return graph(*arguments)

        return run

    def since(self, first: int) -> set[bool]:
        """Whether sizes vary in the graphs called from that call on."""
        return {self.varies[index] for index in self.calls[first:]}


def compiled_model(shape=SHAPE, mode=False, layers=3, **options):
    graphs = Graphs()
    model = with_trained_adapters(tiny_model(n_layer=layers), **options).train()
    checkpoint_blocks(model, mode)
    compile_blocks(model, shape, backend=graphs)
    return model, graphs


def train(model, *shape):
    ids = tokens(*shape)
    document_ids = (torch.arange(shape[1]) >= 5).int().expand(shape[0], -1).contiguous()
    model.zero_grad()
    model(ids, labels=ids, document_ids=document_ids).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", [False, True, "selective"])
@pytest.mark.parametrize("order", ["constant first", "constant last"])
def test_one_constant_and_one_varying_compilation_over_thirty_shapes(order, mode):
    model, graphs = compiled_model(mode=mode, dropout_p=0.1)
    # of each one for the first block, whose input needs no gradient unless it is recomputed
    each = 1 if mode is True else 2
    if order == "constant first":
        train(model, *SHAPE)
        assert graphs.varies == each * [False]
    for step in range(30):
        train(model, 2 + step % 3, 8 + step % 14)
    assert graphs.varies.count(True) == each
    first = len(graphs.calls)
    train(model, *SHAPE)
    assert graphs.since(first) == {False}
    assert sorted(graphs.varies) == each * [False] + each * [True]


def test_without_a_shape_everything_varies():
    model, graphs = compiled_model(None)
    for step in range(10):
        train(model, 2, 8 + step)
    assert graphs.varies == [True, True]


def test_evaluation_keeps_the_compilations_of_training():
    model, graphs = compiled_model()
    train(model, *SHAPE)
    with torch.no_grad():
        for rows in (2, 2, 3, 5):
            ids = tokens(rows, SHAPE[1])
            model.eval()(ids, document_ids=torch.zeros_like(ids), use_cache=False)
    first = len(graphs.calls)
    train(model.train(), *SHAPE)
    assert graphs.since(first) == {False}
    assert sorted(graphs.varies) == [False, False, False, True]


@pytest.mark.parametrize("shape", [SHAPE, (1, 24), (3, 9), (1, 7), (2, 2)])
@pytest.mark.parametrize("mode", [False, True, "selective"])
def test_gradients_are_those_of_a_model_that_is_not_compiled(shape, mode):
    plain = with_trained_adapters(tiny_model()).train()
    model = with_trained_adapters(tiny_model()).train()
    checkpoint_blocks(model, mode)
    compile_blocks(model, SHAPE, backend="aot_eager")
    for got, right in zip(train(model, *shape), train(plain, *shape), strict=True):
        close(got, right)


def test_a_cache_compiles_nothing():
    model, graphs = compiled_model()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    ids = tokens(2, 6)
    plain = with_trained_adapters(tiny_model(n_layer=3)).eval()
    assert torch.equal(model.eval().generate(ids, **options), plain.generate(ids, **options))
    assert graphs.varies == []


@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernels_of_attention_are_chosen_before_a_block_is_compiled(autocast, monkeypatch):
    """For all shapes, with the backward's where gradients are wanted; not for queries that follow a cache."""
    asked, graphs_then = [], []

    def choose(shape, dtype, device, *, trained):
        assert not torch.compiler.is_compiling()
        asked.append((shape, dtype, device.type, trained))
        graphs_then.append(len(graphs.varies))

    monkeypatch.setattr(compiled_blocks, "choose_attention_kernels", choose)
    model, graphs = compiled_model()
    attention = model.transformer.h[0].self_attention
    heads, width = attention.num_heads, attention.head_dim
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        train(model, *SHAPE)
        assert graphs_then[0] == 0
        assert set(asked) == {((2, heads, 24, width), dtype, "cpu", True)}
        asked.clear()
        with torch.no_grad():
            model(tokens(3, 7), use_cache=False)
        assert set(asked) == {((3, heads, 7, width), dtype, "cpu", False)}
        asked.clear()
        model.eval().generate(tokens(1, 3), max_new_tokens=2)
    assert not asked
