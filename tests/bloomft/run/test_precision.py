"""What the frozen base is stored in: configured, measured, and kept by a run that goes on elsewhere."""

import pytest
import torch

from bloomft.run import precision
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.precision import choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ratio(monkeypatch):
    """Sets how fast 16-bit products are here, as a multiple of float32's."""

    def ratio(value: float) -> None:
        rates = {torch.bfloat16: value * 1e9, torch.float32: 1e9}
        monkeypatch.setattr(precision, "gemm_rate", lambda device, dtype: rates[dtype])
        precision._rate_of_16_bits.cache_clear()

    yield ratio
    precision._rate_of_16_bits.cache_clear()


@pytest.mark.parametrize(
    ("measured", "expected"), [(0.5, "fp32"), (1.0, "fp32"), (1.4, "fp32"), (1.6, "bf16"), (8.0, "bf16")]
)
def test_auto_on_a_cpu_is_what_multiplies_clearly_faster(ratio, measured, expected):
    ratio(measured)
    chosen = choose_precision("auto", CPU, None)
    assert chosen.name == expected
    assert chosen.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]
    assert f"bf16 run at {measured:.1f} x fp32's rate" in chosen.reason


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_nothing_is_measured_where_it_is_known(monkeypatch, device):
    monkeypatch.setattr(precision, "_rate_of_16_bits", lambda *_: pytest.fail("measured"))
    for name in ("fp32", "bf16", "fp16"):
        assert choose_precision(name, device, None).name == name
        assert choose_precision("auto", device, name).name == name
    assert choose_precision("auto", CUDA, None).name == "bf16"


def test_a_run_goes_on_in_what_auto_chose_and_changes_where_it_is_told_to(run, ratio, settings):
    ratio(3.0)
    folder = run(optim__scheduler__num_training_steps=2, train__precision="auto").run_dir

    def held() -> str:
        return load_checkpoint(folder / "last.ckpt").precision

    def said() -> str:
        return (folder / "log").read_text()

    assert held() == "bf16"
    assert "bf16 on cpu (auto; products in bf16 run at 3.0 x fp32's rate here)" in said()
    ratio(0.5)  # another machine
    run(optim__scheduler__num_training_steps=4)
    assert held() == "bf16"
    assert "bf16 on cpu (as in the checkpoint)" in said()
    run(optim__scheduler__num_training_steps=6, train__precision="fp32")
    assert held() == "fp32"
    assert "fp32 on cpu (as configured, bf16 in the checkpoint)" in said()


def test_the_measurement_itself_is_a_ratio():
    assert 0.01 < precision._rate_of_16_bits(CPU, torch.get_num_threads()) < 100
