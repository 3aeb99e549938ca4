"""alibi_attention among torch's own operators, its FlexAttention form, and its errors."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from lorakernels import AttentionMask, alibi_attention, alibi_slopes, attention_mask
from lorakernels.ops.alibi_attention import flex, plain
from lorakernels.ops.alibi_attention.mask import document_starts
from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.tolerance import deviations


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_problem(length, batch=2, heads=3, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(batch, length, heads, 3, width, generator=generator).to(dtype).requires_grad_()
    ids = (torch.rand(batch, length, generator=generator) < 0.05).cumsum(1)
    return fused, alibi_slopes(heads), ids


def attend(fused, slopes, ids):
    """As a layer uses it: three views of a fused projection in, [B, T, hidden] out."""
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    return alibi_attention(query, key, value, slopes, document_ids=ids).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, documents):
    fused, slopes, ids = make_problem(9, dtype=dtype)
    tensors = [part.detach().transpose(1, 2).requires_grad_() for part in fused.unbind(3)]
    starts = document_starts(ids) if documents else None
    opcheck(torch.ops.lorakernels.alibi_attention.default, (*tensors, slopes, starts))
    tensors = [tensor.detach() for tensor in tensors]
    incoming = torch.randn_like(tensors[0])
    opcheck(torch.ops.lorakernels.alibi_attention_backward.default, (incoming, *tensors, slopes, starts))
    opcheck(
        torch.ops.lorakernels.attention_mask.default, (ids if documents else None, 9, torch.device("cpu"))
    )


def test_result_may_be_changed_in_place():
    fused, slopes, ids = make_problem(9)
    (expected,) = torch.autograd.grad((2 * attend(fused, slopes, ids)).square().sum(), fused)
    (got,) = torch.autograd.grad(attend(fused, slopes, ids).mul_(2).square().sum(), fused)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_once_for_every_length(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for step, length in enumerate((7, 12, 70, 5)):
        problem = make_problem(length)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got = compiled(*problem)
        expected = attend(*problem)
        torch.testing.assert_close(got, expected)
        incoming = torch.randn_like(got)
        (got,) = torch.autograd.grad(got, problem[0], incoming)
        torch.testing.assert_close(got, *torch.autograd.grad(expected, problem[0], incoming))
    assert counter.frame_count <= 2


def test_checkpoint_recomputes_the_same():
    fused, slopes, ids = make_problem(50)
    got = checkpoint(attend, fused, slopes, ids, use_reentrant=False)
    incoming = torch.randn_like(got)
    (got,) = torch.autograd.grad(got, fused, incoming)
    assert torch.equal(got, *torch.autograd.grad(attend(fused, slopes, ids), fused, incoming))


def test_nothing_is_saved_but_the_inputs():
    fused, slopes, ids = make_problem(50)
    mask = attention_mask(ids, *ids.shape, ids.device)
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alibi_attention(query, key, value, slopes, mask=mask)
    given = {tensor.untyped_storage().data_ptr() for tensor in (fused, slopes, mask.starts)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= given


def test_the_result_is_stored_for_the_next_layer():
    fused, slopes, ids = make_problem(20)
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    out = alibi_attention(query, key, value, slopes, document_ids=ids)
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_of_gradients_are_refused():
    fused, slopes, ids = make_problem(9)
    out = attend(fused, slopes, ids)
    (gradient,) = torch.autograd.grad(out.sum(), fused, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (0, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_empty(shape, documents):
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    ids = torch.zeros(shape[0], shape[2], dtype=torch.int64) if documents else None
    out = alibi_attention(*tensors, alibi_slopes(3), document_ids=ids)
    assert out.shape == shape
    out.sum().backward()
    assert tensors[0].grad.shape == shape


@pytest.mark.parametrize("length", [5, 128, 300, 700])
@pytest.mark.parametrize("documents", [None, 0.003, 0.02])
def test_blocks_are_those_of_torch(length, documents):
    """The partly and wholly visible blocks, both ways, against torch's own way over a [T, T] mask."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    if documents:
        ids = (torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < documents).cumsum(1)
    ours = flex.block_mask(attention_mask(ids if documents else None, 2, length, "cpu"))

    def allowed(b, h, q, k):
        return (k <= q) & (ids[b, q] == ids[b, k])

    theirs = flex_attention.create_block_mask(allowed, len(ours.kv_indices), 1, length, length, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        ours_count, theirs_count = (getattr(mask, f"{name}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(ours_count, theirs_count)
        for row in range(len(ours_count)):
            for block, count in enumerate(ours_count[row, 0].tolist()):
                listed = [
                    getattr(mask, f"{name}_indices")[row, 0, block, :count].sort().values
                    for mask in (ours, theirs)
                ]
                assert torch.equal(*listed)


def test_index_tensors_that_kernels_would_misread_are_refused():
    """What inductor makes of an unsqueezed dimension: the values, with a stride of 0 for the one head."""
    ids = torch.arange(300).div(100, rounding_mode="floor").repeat(2, 1)
    mask = attention_mask(ids, 2, 300, "cpu")
    assert all(tensor.is_contiguous() and tensor.dtype == torch.int32 for tensor in mask[1:])
    for field in AttentionMask._fields[1:]:
        tensor = getattr(mask, field)
        strides = [*tensor.stride()]
        strides[1] = 0
        misread = mask._replace(**{field: tensor.as_strided(tensor.shape, strides)})
        assert torch.equal(getattr(misread, field), tensor)
        with pytest.raises(ValueError, match="second stride of a contiguous tensor"):
            flex.block_mask(misread)


def on_a_gpu(*shape, index=0, dtype=torch.float32):
    """A fake tensor, for as long as nothing is computed."""
    return torch.empty(*shape, device=f"cuda:{index}", dtype=dtype)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "dtype", "way"),
    [
        (2, 5, 5, torch.bfloat16, "flex"),
        (2, 5, 5, torch.float64, "plain"),
        (2, 1, 5, torch.bfloat16, "plain"),  # a decode step compiles nothing
        (0, 5, 5, torch.bfloat16, "plain"),  # a grid cannot be empty
        (2, 0, 0, torch.bfloat16, "plain"),
    ],
)
def test_who_computes_on_a_gpu(batch, queries, keys, dtype, way, monkeypatch):
    for module, name in ((flex, "flex"), (plain, "plain")):
        monkeypatch.setattr(module, "attention", lambda *_, name=name: name)
    monkeypatch.setattr("lorakernels.ops.alibi_attention.attention_mask", lambda *_: None)
    with FakeTensorMode():
        query, key = (on_a_gpu(batch, 3, length, 8, dtype=dtype) for length in (queries, keys))
        assert alibi_attention(query, key, key, on_a_gpu(3)) == way


def test_document_ids_on_another_gpu_are_refused():
    with FakeTensorMode():
        query, ids = on_a_gpu(2, 3, 5, 8), on_a_gpu(2, 5, index=1, dtype=torch.int64)
        with pytest.raises(ValueError, match="document_ids: expected device cuda:0, got cuda:1"):
            alibi_attention(query, query, query, on_a_gpu(3), document_ids=ids)


def operators_of(function, *arguments):
    """Names of the operators in function's graph."""
    names = []

    def record(graph, _inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(function, fullgraph=True, backend=record)(*arguments)
    return names


def test_no_mask_is_built_while_a_compiler_traces():
    fused, slopes, ids = make_problem(300)
    names = operators_of(attend, fused, slopes, ids)
    assert sum("attention_mask" in name for name in names) == 1
    assert not any(word in name for name in names for word in ("cummax", "argsort", "sort", "where"))
    mask = attention_mask(ids, *ids.shape, ids.device)

    def with_mask(fused, slopes, mask):
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
        return alibi_attention(query, key, value, slopes, mask=mask)

    assert not any("attention_mask" in name for name in operators_of(with_mask, fused, slopes, mask))


@pytest.mark.parametrize("width", [5, 8, 16, 64, 80, 96, 128])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_computes_the_same(dtype, documents, width, monkeypatch):
    """Its bias, mask and widths, forward and backward; the kernels around them exist only on CUDA."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    fused, slopes, ids = make_problem(150, width=width, dtype=dtype)
    ids = ids if documents else None
    parts = [part.transpose(1, 2) for part in fused.unbind(3)]
    out = flex.masked_attention(*parts, slopes, attention_mask(ids, 2, 150, "cpu"))
    assert out.transpose(1, 2).is_contiguous()
    wide = [part.detach().double().requires_grad_() for part in parts]
    exact = alibi_attention_reference(*wide, slopes, ids)
    incoming = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, parts, incoming)]
    expected = [exact, *torch.autograd.grad(exact, wide, incoming.double())]
    # its eager form, which stands in for the kernels, rounds scores and weights as well
    roundings = 1 if dtype == torch.float32 else 100
    for name, got, right in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert not deviations(name, got, right, dtype, operands=dtype, terms=150, roundings=roundings)


def test_flex_is_one_graph_for_every_length():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.masked_attention, fullgraph=True, backend=counter)
    for length in (130, 300, 700, 1000):
        fused, slopes, ids = make_problem(length)
        parts = [part.detach().transpose(1, 2) for part in fused.unbind(3)]
        got = compiled(*parts, slopes, attention_mask(ids, *ids.shape, ids.device))
        torch.testing.assert_close(
            got, alibi_attention(*parts, slopes, document_ids=ids), rtol=1e-3, atol=1e-4
        )
    assert counter.frame_count <= 2


@pytest.fixture
def flex_graphs(monkeypatch):
    """flex.attention on CPU tensors: whether sizes vary in each of its graphs, and which one a call took."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_first_batch", {})
    monkeypatch.setattr(flex, "_constant", set())
    forget = flex._compiled.cache_clear
    forget()
    graphs, compile_one = SimpleNamespace(varies=[], calls=[]), torch.compile

    def keep(graph, inputs):
        index = len(graphs.varies)
        graphs.varies.append(any(isinstance(one, torch.SymInt) for one in inputs))

        def run(*arguments):
            graphs.calls.append(index)
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(compile_one, backend=keep))
    yield graphs
    forget()


def flex_call(length, batch=2, width=16, documents=True, trained=False):
    fused, slopes, ids = make_problem(length, batch=batch, width=width)
    ids = ids if documents else None
    parts = [part.detach().transpose(1, 2).requires_grad_(trained) for part in fused.unbind(3)]
    got = flex.attention(*parts, slopes, attention_mask(ids, batch, length, "cpu"))
    expected = alibi_attention(*parts, slopes, document_ids=ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_flex_compiles_for_more_shapes_than_a_compiler_does_by_default(flex_graphs):
    """Widths, one row or several, one block or several, with gradients or without."""
    for case in itertools.product((100, 200), (1, 2), (16, 32), (True, False), (True, False)):
        flex_call(*case)
    assert len(flex_graphs.varies) > 8


def test_flex_keeps_the_kernels_of_a_shape_that_comes_again(flex_graphs):
    flex_call(150)
    assert flex_graphs.varies == [False]
    for length in range(200, 230):
        flex_call(length)
    # of the others, the first is a constant too
    assert flex_graphs.varies == [False, False, True]
    for length in (150, 230, 150):
        flex_call(length)
    assert flex_graphs.calls[-3:] == [0, 2, 0]
    flex_call(220)
    # the second batch of that length
    assert flex_graphs.varies == [False, False, True, False]
    for length in range(200, 210):
        flex_call(length)
    assert flex_graphs.varies.count(False) == 1 + flex.MOST_CONSTANT
    assert flex_graphs.varies.count(True) == 1


def test_the_layers_of_one_batch_are_no_second_batch(flex_graphs):
    flex_call(150)
    fused, slopes, ids = make_problem(200, width=16)
    parts = [part.detach().transpose(1, 2) for part in fused.unbind(3)]
    mask = attention_mask(ids, 2, 200, "cpu")
    for _ in range(24):
        flex.attention(*parts, slopes, mask)
    assert len(flex._constant) == 1
    flex.attention(*parts, slopes, attention_mask(ids, 2, 200, "cpu"))
    assert len(flex._constant) == 2


ERRORS = {
    "query": (ValueError, r"query: .*D >= 1, got \[3, 9, 8\]", {"query": torch.zeros(3, 9, 8)}),
    "key": (ValueError, r"key: .*T >= 9, 8\] .*got \[2, 3, 8, 8\]", {"key": torch.zeros(2, 3, 8, 8)}),
    "value's shape": (ValueError, r"value: .*key's shape", {"value": torch.zeros(2, 3, 8, 8)}),
    "mask": (ValueError, "mask: expected one of 2 rows of 9", {"mask": attention_mask(None, 2, 8, "cpu")}),
    "both": (ValueError, "None beside a mask",
             {"mask": attention_mask(None, 2, 9, "cpu"), "document_ids": torch.zeros(2, 9).long()}),
    "value": (TypeError, "value: .*got torch.float16", {"value": torch.zeros(2, 3, 9, 8).half()}),
    "slopes": (ValueError, r"slopes: .*\[3\], got \[4\]", {"slopes": torch.zeros(4)}),
    "integer slopes": (TypeError, "slopes: expected a floating", {"slopes": torch.zeros(3).long()}),
    "trained slopes": (ValueError, "slopes: .*constant", {"slopes": torch.zeros(3, requires_grad=True)}),
    "ids": (ValueError, r"document_ids: .*\[2, 9\], got \[9\]", {"document_ids": torch.zeros(9).long()}),
    "float ids": (TypeError, "document_ids: expected integers", {"document_ids": torch.zeros(2, 9)}),
    "device": (ValueError, "slopes: expected query's device cpu", {"slopes": torch.zeros(3, device="meta")}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, changed = ERRORS[name]
    query, key, value = (torch.zeros(2, 3, 9, 8) for _ in range(3))
    arguments = {"query": query, "key": key, "value": value, "slopes": alibi_slopes(3)} | changed
    with pytest.raises(error, match=message):
        alibi_attention(**arguments)
