"""Values and gradients of alibi_attention against exact ALiBi in float64 and against transformers' BLOOM."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BloomConfig
from transformers.models.bloom import modeling_bloom

from benchmarks.baselines import attention as baselines
from lorakernels import alibi_attention, alibi_slopes, attention_mask
from lorakernels.ops.alibi_attention import aten, plain
from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.tolerance import largest_error, relative_error
from tests.lorakernels.largest_tensor import LargestTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 16, 200, 64), (2, 6, 65, 5), (3, 1, 1, 8), (1, 3, 300, 80), (2, 2, 64, 1)]
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def make_problem(shape, dtype, *, seed=0, documents=0.0, sharpness=1.0):
    """query, key, value as views of a fused projection, slopes, document ids and the result's gradient."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, length, heads, 3, width, generator=generator).to(dtype)
    fused[:, :, :, 0] *= sharpness
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    ids = (torch.rand(batch, length, generator=generator) < documents).cumsum(1) if documents else None
    incoming = torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
    return (query, key, value), alibi_slopes(heads), ids, incoming


def results_of(function, tensors, slopes, incoming, **options):
    """The result and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, slopes, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming.to(out.dtype))]


ROUNDINGS = {"out": 2, "dq": 3, "dk": 3, "dv": 3}


def failures(results, tensors, slopes, ids, incoming):
    """One line for each result that is further from exact ALiBi in float64 than the rule allows.

    Softmax adds what the rule for sums does not know: a relative error of eps in a score s is one of eps · s
    in its weight, and the gradients of query and key lose what cancels in P ∘ dP - P ∘ rowsum(P ∘ dP).
    """
    wide = [tensor.double() for tensor in tensors]
    exact = results_of(alibi_attention_reference, wide, slopes, incoming, document_ids=ids)
    largest_score, cancellation = conditions(wide, slopes, ids, incoming.double())
    dtype = tensors[0].dtype
    softmax_error = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest_score
    lines = []
    for (name, roundings), got, right in zip(ROUNDINGS.items(), results, exact, strict=True):
        terms = sum(tensors[1].shape[2:])
        bound = largest_error(right, dtype, operands=dtype, terms=terms, roundings=roundings)
        bound += softmax_error * (cancellation if name in ("dq", "dk") else 1)
        if got.dtype != dtype:
            lines.append(f"{name}: {got.dtype} in place of {dtype}")
        error = relative_error(got, right)
        if not error <= bound:
            lines.append(f"{name}: relative error {error:.3g} above the bound {bound:.3g}")
    return lines


def conditions(wide, slopes, ids, incoming):
    """The largest absolute score, and the norm of P ∘ dP over that of the scores' gradient."""
    query, key, value = wide
    scores = query @ key.mT * query.shape[-1] ** -0.5
    offset = key.shape[2] - query.shape[2]
    index = torch.arange(key.shape[2])
    distance = index - index[offset:, None]
    hidden = distance > 0
    if ids is not None:
        hidden = hidden | (ids[:, None, offset:, None] != ids[:, None, None, :])
    biased = (scores + slopes.double()[:, None, None] * distance).masked_fill(hidden, -torch.inf)
    weights = biased.softmax(-1)
    product = weights * (incoming @ value.mT)
    gradient = product - weights * product.sum(-1, keepdim=True)
    largest_score = max(1.0, float(scores.abs().max()))
    return largest_score, float(product.norm() / gradient.norm().clamp(min=1e-300))


def multiply_16_bits(monkeypatch, narrow):
    """Multiply 16-bit tensors in 16 bits or in float32, whichever is the faster on this machine."""
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    monkeypatch.setattr(aten, "product_dtype", lambda dtype: dtype if narrow else wide.get(dtype, dtype))


@pytest.mark.parametrize("documents", [0.0, 0.05])
@pytest.mark.parametrize(
    ("dtype", "narrow"), [*itertools.product(DTYPES, [False]), *itertools.product(DTYPES[1:3], [True])]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, narrow, documents, monkeypatch):
    multiply_16_bits(monkeypatch, narrow)
    tensors, slopes, ids, incoming = make_problem(shape, dtype, documents=documents)
    results = results_of(alibi_attention, tensors, slopes, incoming, document_ids=ids)
    assert failures(results, tensors, slopes, ids, incoming) == []


@settings(max_examples=60, **REPEATABLE)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 150), st.integers(2, 40)),
    dtype=st.sampled_from(DTYPES), documents=st.sampled_from([0.0, 0.02, 0.3]),
    queries=st.integers(1, 160), keys=st.integers(1, 40), kibibytes=st.integers(1, 300),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]), narrow=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_problem(shape, dtype, documents, queries, keys, kibibytes, sharpness, narrow, seed, monkeypatch):
    multiply_16_bits(monkeypatch, narrow)
    monkeypatch.setattr(aten, "QUERIES", queries)
    monkeypatch.setattr(aten, "KEYS", keys)
    monkeypatch.setattr(aten, "SCORE_BYTES", kibibytes * 1024)
    tensors, slopes, ids, incoming = make_problem(
        shape, dtype, seed=seed, documents=documents, sharpness=sharpness
    )
    results = results_of(alibi_attention, tensors, slopes, incoming, document_ids=ids)
    assert failures(results, tensors, slopes, ids, incoming) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_keep_their_digits(dtype):
    """At 1,000 tokens the steepest head's bias is 700; float32 keeps few digits of a score beside that."""
    tensors, slopes, ids, incoming = make_problem((1, 8, 1000, 16), dtype)
    results = results_of(alibi_attention, tensors, slopes, incoming)
    assert failures(results, tensors, slopes, ids, incoming) == []


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_packed_document_gets_what_it_gets_alone(dtype):
    """To the bit: results, gradients and the biases they come from."""
    tensors, slopes, _, incoming = make_problem((2, 4, 300, 16), dtype)
    ids = torch.zeros(2, 300, dtype=torch.int32)
    ids[0, 77:] = 5
    ids[1, 200:] = 1
    packed = results_of(alibi_attention, tensors, slopes, incoming, document_ids=ids)
    for row, start, stop in [(0, 0, 77), (0, 77, 300), (1, 0, 200), (1, 200, 300)]:
        alone = [tensor[row : row + 1, :, start:stop] for tensor in (*tensors, incoming)]
        for got, right in zip(packed, results_of(alibi_attention, alone[:3], slopes, alone[3]), strict=True):
            assert torch.equal(got[row : row + 1, :, start:stop], right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_gets_its_value(dtype):
    tensors, slopes, _, incoming = make_problem((2, 3, 1, 8), dtype)
    out, dq, dk, dv = results_of(alibi_attention, tensors, slopes, incoming)
    assert torch.equal(out, tensors[2])
    assert torch.equal(dv, incoming)
    assert not dq.any()
    assert not dk.any()


def test_a_returning_id_is_a_new_document():
    tensors, slopes, _, incoming = make_problem((1, 2, 9, 4), torch.float64)
    again = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]])
    for function in (alibi_attention, alibi_attention_reference):
        got = results_of(function, tensors, slopes, incoming, document_ids=again)
        right = results_of(function, tensors, slopes, incoming, document_ids=again.cumsum(1) + again * 99)
        split = results_of(function, tensors, slopes, incoming, document_ids=torch.arange(9)[None] // 3)
        assert all(torch.equal(a, b) for a, b in zip(got, split, strict=True))
        assert not torch.equal(got[0], right[0])


def test_the_future_and_other_documents_are_not_seen():
    tensors, slopes, _, _ = make_problem((1, 2, 40, 4), torch.float32)
    ids = torch.arange(40)[None] // 20
    before = alibi_attention(*tensors, slopes, document_ids=ids)
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, :, :20] += 100
        tensor[:, :, 31:] -= 100
    after = alibi_attention(*changed, slopes, document_ids=ids)
    assert torch.equal(before[:, :, 20:31], after[:, :, 20:31])


@pytest.mark.parametrize("heads", [*range(1, 34), 48, 64, 71, 112, 128])
def test_slopes_are_those_of_transformers(heads):
    assert torch.equal(alibi_slopes(heads), modeling_bloom._get_alibi_slopes(heads, torch.device("cpu")))


def test_slopes_of_no_head():
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_baseline_is_transformers_attention(dtype):
    """What the benchmarks time as transformers' is BloomAttention itself, to the bit."""
    config = BloomConfig(hidden_size=32, n_head=4)
    module = modeling_bloom.BloomAttention(config, layer_idx=0).to(dtype).eval()
    torch.nn.init.eye_(module.dense.weight)
    torch.nn.init.zeros_(module.dense.bias)
    hidden = torch.randn(2, 50, 32).to(dtype)
    alibi = modeling_bloom.build_alibi_tensor(torch.ones(2, 50, dtype=torch.int64), 4, dtype)
    mask = torch.full((50, 50), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    with torch.no_grad():
        theirs, _ = module(hidden, torch.zeros_like(hidden), alibi, mask)
        parts = module.query_key_value(hidden).view(2, 50, 4, 3, 8).unbind(3)
        ours = baselines.eager(*(part.transpose(1, 2) for part in parts), alibi_slopes(4))
    assert torch.equal(ours.transpose(1, 2).flatten(2), theirs)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.3), (torch.float16, 0.04)], ids=str)
def test_16_bits_are_exact_where_transformers_are_not(dtype, noise):
    """Every head of T = 2,048 tokens; transformers round score and bias to the model's dtype."""
    tensors, slopes, _, incoming = make_problem((1, 16, 2048, 32), dtype)
    results = results_of(alibi_attention, tensors, slopes, incoming)
    theirs = baselines.eager(*tensors, slopes)
    limits = [2.5e-3, 3.5e-3, 3.5e-3, 3.5e-3] if dtype == torch.bfloat16 else [3.2e-4] + 3 * [4.4e-4]
    errors = []
    for head in range(16):
        part = [tensor[:, head : head + 1] for tensor in (*tensors, incoming)]
        wide = [tensor.double() for tensor in part]
        exact = results_of(alibi_attention_reference, wide[:3], slopes[head : head + 1], wide[3])
        own = [result[:, head : head + 1] for result in results]
        assert failures(own, part[:3], slopes[head : head + 1], None, part[3]) == []
        for got, right, limit in zip(own, exact, limits, strict=True):
            assert relative_error(got, right) <= limit
        errors.append(relative_error(theirs[:, head : head + 1], exact[0]))
    assert max(errors) > noise


BASELINES = [baselines.sdpa_with_bias, baselines.sdpa_with_extra_dimension, baselines.sdpa_by_block]


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_compute_the_same(baseline):
    tensors, slopes, _, incoming = make_problem((2, 4, 70, 16), torch.float32)
    for got, right in zip(
        results_of(baseline, tensors, slopes, incoming),
        results_of(alibi_attention, tensors, slopes, incoming),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_memory_is_linear_in_the_length():
    largest = []
    for length in (1000, 4000):
        tensors, slopes, _, incoming = make_problem((1, 2, length, 4), torch.float32)
        with LargestTensor() as seen:
            aten.forward(*tensors, slopes, None)
            aten.backward(incoming, *tensors, slopes, None)
        largest.append(seen.elements)
    assert largest[1] <= max(4 * largest[0], aten.SCORE_BYTES // 4)
    assert largest[1] < 2 * 4000 * 4000 // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_keys_beyond_a_heads_sight_are_skipped_and_missed_by_nobody(dtype, monkeypatch):
    seen = []
    softmax = aten._softmax

    def spy(queries, keys, slopes, first, start, stop, scratch):
        seen.append((len(queries), first, start))
        return softmax(queries, keys, slopes, first, start, stop, scratch)

    monkeypatch.setattr(aten, "_softmax", spy)
    tensors, slopes, _, incoming = make_problem((1, 8, 1000, 16), dtype, sharpness=0.3)
    results = results_of(alibi_attention, tensors, slopes, incoming)
    assert failures(results, tensors, slopes, None, incoming) == []
    firsts = [first for heads, first, start in seen if start == 896 for _ in range(heads)]
    assert firsts[0] == 768
    assert firsts[:8] == firsts[8:] == sorted(firsts[:8], reverse=True)
    assert firsts[7] == 0


def test_a_far_key_with_a_large_score_is_seen(monkeypatch):
    """At the steepest head, where 900 tokens cost 450 of score."""
    tensors, slopes, _, incoming = make_problem((1, 8, 1000, 16), torch.float32)
    query, key, _ = tensors
    query[0, 0, 990] = 10.0
    key[0, 0, 90] = 13.0
    results = results_of(alibi_attention, tensors, slopes, incoming)
    assert failures(results, tensors, slopes, None, incoming) == []
    torch.testing.assert_close(results[0][0, 0, 990], tensors[2][0, 0, 90])
    # the test can fail: a bound that takes all vectors for short ones
    first_keys = aten._first_keys
    monkeypatch.setattr(aten, "_first_keys", lambda queries, *rest: first_keys(queries * 1e-3, *rest))
    results = results_of(alibi_attention, tensors, slopes, incoming)
    assert failures(results, tensors, slopes, None, incoming) != []


@pytest.mark.parametrize("slope", [0.0, -0.02])
def test_a_bias_that_does_not_fall_hides_no_key(slope):
    tensors, slopes, _, incoming = make_problem((1, 8, 700, 16), torch.float32, sharpness=0.3)
    slopes[3] = slope
    results = results_of(alibi_attention, tensors, slopes, incoming)
    assert failures(results, tensors, slopes, None, incoming) == []


def test_a_nan_reaches_every_later_row():
    tensors, slopes, _, _ = make_problem((1, 8, 1000, 16), torch.float32, sharpness=0.1)
    tensors[1][0, 0, 5] = float("nan")
    out = alibi_attention(*tensors, slopes)
    assert out[0, 0, 5:].isnan().all()
    assert out[0, 1:].isfinite().all()


@pytest.mark.parametrize("queries", [1, 2, 130, 299])
@pytest.mark.parametrize("documents", [0.0, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_are_the_last_positions(dtype, documents, queries):
    tensors, slopes, ids, incoming = make_problem((2, 4, 300, 16), dtype, documents=documents)
    tensors, incoming = (tensors[0][:, :, -queries:], *tensors[1:]), incoming[:, :, -queries:]
    results = results_of(alibi_attention, tensors, slopes, incoming, document_ids=ids)
    assert failures(results, tensors, slopes, ids, incoming) == []
    assert results[0].transpose(1, 2).is_contiguous()
    with torch.no_grad():
        results[0] = alibi_attention(*tensors, slopes, document_ids=ids)
    assert failures(results, tensors, slopes, ids, incoming) == []
    mask = attention_mask(ids, 2, 300, "cpu")
    with torch.no_grad():
        assert torch.equal(results[0], alibi_attention(*tensors, slopes, mask=mask))


def test_few_queries_see_their_own_positions():
    """Each block of rows of a long problem, asked for alone, against the whole problem."""
    tensors, slopes, ids, _ = make_problem((1, 4, 300, 16), torch.float64, documents=0.01)
    whole = alibi_attention_reference(*tensors, slopes, ids)
    for stop, queries in [(1, 1), (150, 1), (150, 149), (300, 200)]:
        part = (tensors[0][:, :, stop - queries : stop], tensors[1][:, :, :stop], tensors[2][:, :, :stop])
        got = alibi_attention(*part, slopes, document_ids=ids[:, :stop])
        assert relative_error(got, whole[:, :, stop - queries : stop]) < 1e-13


def test_a_prompt_needs_no_square_memory():
    """20,000 tokens: no tensor of T × T, in one go or continued."""
    length, queries = 20_000, 300
    tensors, slopes, _, _ = make_problem((1, 1, length, 4), torch.bfloat16)
    with LargestTensor() as seen, torch.no_grad():
        alibi_attention(tensors[0][:, :, -queries:], *tensors[1:], slopes)
        alibi_attention(*tensors, slopes)
    assert seen.elements <= max(plain.QUERIES, aten.QUERIES) * length


def without_mask(queries, keys, slopes, first, start, stop, scratch):
    keys[:, first:stop, -1] = slopes[:, None] * torch.arange(first, stop)
    return torch.softmax(queries[:, start:stop] @ keys[:, first:stop].mT, dim=-1)


def with_slopes(change):
    softmax = aten._softmax
    return lambda queries, keys, slopes, *rest: softmax(queries, keys, change(slopes), *rest)


MUTATIONS = {
    "no mask": ("_softmax", without_mask),
    "no bias": ("_softmax", with_slopes(lambda slopes: slopes * 0)),
    "slopes a hundredth too steep": ("_softmax", with_slopes(lambda slopes: slopes * 1.01)),
    "bias from the end": ("_softmax", with_slopes(lambda slopes: -slopes)),
    "no documents": ("document_spans", lambda starts, batch, length: [[0, length]] * batch),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_attention_is_caught(mutation, monkeypatch):
    monkeypatch.setattr(aten, *MUTATIONS[mutation])
    tensors, slopes, ids, incoming = make_problem((1, 4, 700, 16), torch.bfloat16, documents=0.004)
    results = results_of(alibi_attention, tensors, slopes, incoming, document_ids=ids)
    assert failures(results, tensors, slopes, ids, incoming) != []
