"""FLOPs counted by formula against FLOPs counted by torch while the step runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bloomft import accounting
from bloomft.accounting import BatchCounts, GemmLimit, StepCost, gemm_rate, peak_memory
from bloomft.model.patch import patch_bloom
from tests.bloomft.conftest import tiny_model


def test_linear_layers_and_head_match_torch_s_own_count():
    model = tiny_model(n_head=4)
    H, T, r = 48, 16, 4
    # The same mathematics in products that torch counts: frozen weights, adapters as two more linears.
    embedded = torch.randn(1, T, H)
    weights = [p.detach() for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    with FlopCounterMode(display=False) as counter:
        for number, weight in enumerate(weights):
            N, K = weight.shape
            x = torch.randn(T, K, requires_grad=number > 0)
            y = x @ weight.T
            if N == 3 * K:
                lora_a, lora_b = torch.randn(r, K, requires_grad=True), torch.randn(N, r, requires_grad=True)
                y = y + x @ lora_a.T @ lora_b.T
            if y.requires_grad:
                y.sum().backward()
        head = embedded.requires_grad_() @ model.lm_head.weight.detach().T
        head.sum().backward()
    patch_bloom(model, r=r)
    cost = StepCost.of(model)
    counts = BatchCounts(tokens=T, labels=T, pairs=0)
    assert cost.flops(counts) == counter.get_total_flops()
    assert cost.per_pair == 12 * H * 2


def test_a_frozen_base_costs_about_four_flops_a_parameter():
    model = patch_bloom(tiny_model(hidden_size=96, n_layer=6, vocab_size=384), r=1)
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".h." in n and p.ndim == 2)
    assert 3.8 < StepCost.of(model).per_token / parameters < 4.1


def test_counts_leave_padding_out_and_see_documents():
    batch = {
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 1, 2, 2, 2]], dtype=torch.int32),
        "labels": torch.tensor([[-100, 1, 1, -100, 1, -100], [-100, 1, -100, -100, 1, 1]]),
    }
    counts = BatchCounts.of(batch)
    assert counts == BatchCounts(tokens=11, labels=6, pairs=6 + 3 + 3 + 1 + 6)
    assert counts + counts == BatchCounts(22, 12, 38)


def test_measured_figures_are_figures():
    cpu = torch.device("cpu")
    assert gemm_rate(cpu, torch.bfloat16, size=64, rounds=2) > 1e6
    assert peak_memory(cpu) == pytest.approx(peak_memory(cpu), rel=0.1)
    assert peak_memory(cpu) > 100 * 2**20


def test_what_is_multiplied_is_random_and_a_run_s_random_numbers_are_not_used(monkeypatch):
    taken = []
    monkeypatch.setattr(accounting, "frozen_linear", lambda x, weight: taken.append((x, weight)))
    before = torch.get_rng_state()
    gemm_rate(torch.device("cpu"), torch.float32, size=256, rounds=1)
    assert torch.equal(torch.get_rng_state(), before)
    for tensor in taken[0]:
        assert abs(float(tensor.mean())) < 0.02
        assert float(tensor.std()) == pytest.approx(1, abs=0.02)
        assert len(tensor.unique()) > 60_000


def test_a_limit_that_a_step_exceeds_is_measured_again(monkeypatch):
    measured = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(accounting, "gemm_rate", lambda device, dtype: next(measured))
    limit = GemmLimit(torch.device("cpu"), torch.float32)
    assert limit.share(5e8) == 0.5
    assert limit.share(1.6e9) == 0.8
    # a measurement that is too small again: what was reached is possible
    assert limit.share(4e9) == 1
    assert limit.share(2e9) == 0.5
    assert limit.describe() == "MFU: the share of 4 GFLOP/s, measured here"
