"""Options of FlexAttention's kernels: chosen, handed on, and in the code that inductor writes for CUDA."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import flex_attention

from lorakernels import alibi_slopes, attention_mask
from lorakernels.ops.alibi_attention import flex
from lorakernels.ops.alibi_attention.mask import BLOCK

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FORWARD, BACKWARD = list(flex.FORWARD.values()), list(flex.BACKWARD.values())
EVERY = [*FORWARD, *BACKWARD]


def inputs(width, trained):
    """What flex.attention takes: [2, 3, 150, width], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 150, 3, width, generator=generator).transpose(1, 2) for _ in range(3)]
    mask = attention_mask(None, 2, 150, "cpu")
    return *(part.requires_grad_(trained) for part in parts), alibi_slopes(3), mask


@pytest.fixture
def problems(monkeypatch):
    """The problems of the choices made; on CPU tensors, with the second candidate as the fastest."""
    problems, known = [], {}

    def choose(problem, candidates, make_trial):
        if problem not in known:
            trial = make_trial()
            for one in candidates:
                trial.run(one)
                assert trial.failures(one) == []
            problems.append(problem)
            known[problem] = candidates[1]
        return known[problem]

    trial = flex._Trial
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda constant: flex.masked_attention)
    monkeypatch.setattr(flex, "_Trial", lambda shape, dtype, device, *given: trial(shape, dtype, CPU, *given))
    monkeypatch.setattr(flex.dispatch, "choose", choose)
    monkeypatch.setattr(flex.dispatch, "known", lambda problem, candidates: known.get(problem))
    monkeypatch.setattr(flex.dispatch, "device_name", lambda device: "gpu")
    monkeypatch.setitem(flex.dispatch.LARGE, "cuda", 0)
    return problems


@pytest.fixture
def options_seen(monkeypatch):
    """The kernel_options that flex_attention is given, call by call."""
    seen, call = [], flex_attention.flex_attention

    def record(*arguments, kernel_options, **others):
        seen.append(kernel_options)
        return call(*arguments, **others)

    monkeypatch.setattr(flex, "flex_attention", record)
    return seen


def test_options_are_chosen_by_dtype_and_width_each_pass_apart(problems, options_seen, monkeypatch):
    of = functools.partial(flex.choose, dtype=torch.float32, device=GPU)
    assert of((2, 3, 150, 16), trained=False) == FORWARD[1]
    assert problems == ["alibi_attention forward on gpu, float32, D=16"]
    options_seen.clear()
    for shape in ((2, 3, 150, 16), (2, 3, 160, 16)):
        assert of(shape, trained=True) == FORWARD[1] | BACKWARD[1]
    assert problems[1:] == ["alibi_attention backward on gpu, float32, D=16"]
    # the backward pass is measured after the forward that was chosen
    assert [FORWARD[1] | options for options in BACKWARD] == list(
        {str(one): one for one in options_seen}.values()
    )
    of((2, 3, 150, 32), trained=True)
    assert problems[2:] == [one.replace("D=16", "D=32") for one in problems[:2]]
    # a call that is too small takes torch's own, and so does a CPU
    assert flex.choose((2, 3, 150, 16), torch.float32, CPU, trained=True) == {}
    monkeypatch.setitem(flex.dispatch.LARGE, "cuda", 2**40)
    assert of((2, 3, 150, 16), trained=True) == {}


@pytest.mark.parametrize("trained", [False, True])
def test_chosen_options_are_handed_on(trained, problems, options_seen, monkeypatch):
    choose = flex.choose
    monkeypatch.setattr(
        flex, "choose", lambda shape, dtype, device, trained: choose(shape, dtype, GPU, trained=trained)
    )
    flex.attention(*inputs(16, trained))
    assert options_seen[-1] == FORWARD[1] | (BACKWARD[1] if trained else {})


@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_caller_takes_what_was_chosen_before(trained, problems, options_seen):

    def given(width):
        torch._dynamo.reset()
        torch.compile(flex.attention, fullgraph=True, backend="eager")(*inputs(width, trained))
        return options_seen[-1]

    assert not given(16)
    flex.choose((2, 3, 150, 16), torch.float32, GPU, trained=trained)
    assert given(16) == FORWARD[1] | (BACKWARD[1] if trained else {})
    # nothing is known of another width
    assert not given(32)


def test_results_of_other_options_that_disagree_are_dropped(monkeypatch):
    plain = flex.masked_attention
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda constant: lambda *a: plain(*a[:5]) * (1.1 if a[5] else 1.0))
    for one in flex._PASSES:
        trial = flex._Trial((1, 2, 150, 16), torch.float32, CPU, one, {})
        results = 1 if one.name == "forward" else 3
        assert trial.failures(one.candidates[0]) == []
        assert trial.failures(one.candidates[1]) == results * ["relative error 0.1 above 0.00391"]


def test_tiles_divide_the_blocks_of_the_mask():
    """FlexAttention checks the forward's, and would silently miscompute with others in the backward."""
    for options in (*FORWARD, *BACKWARD):
        for name, size in options.items():
            assert "BLOCK" not in name or BLOCK % size == 0
    for options in BACKWARD[1:]:
        assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
        assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="inductor's insides differ by version")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
def test_inductors_kernels_read_each_rows_own_blocks():
    """4 rows of 16 blocks: a row further is 16 counts and 256 numbers further, not 0; and the options."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.lorakernels.ops.alibi_attention.inductor_cuda_code"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (eager, dynamic, traced, plain), generated = json.loads(run.stdout.splitlines()[-1])
    for options, (forward, backward) in zip(EVERY, generated, strict=True):
        for name, value in options.items():
            direction, _, name = name.partition("_")
            assert {"fwd": forward, "bwd": backward}[direction][name] == str(value), options
    # torch's own stand first in both
    assert len({str(both) for both in generated}) == len(EVERY) - 1
    right = {"stride_kv_num_blks_h": "16", "stride_kv_idx_h": "256"}
    right |= {name.replace("stride_", "stride_full_"): value for name, value in right.items()}
    assert eager == traced == right
    assert dynamic.keys() == right.keys()
    assert "0" not in dynamic.values()
    # why the mask has an operator of its own
    assert plain["stride_kv_idx_h"] == "0"
