"""Triton's interpreter where there is no GPU, with bfloat16 corrected; torch.empty poisoned with NaN."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.interpreter import correct_bfloat16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        correct_bfloat16()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several tests share the cores; more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def own_dispatch_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Choices neither read from the user's disk nor carried from one test to the next."""
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "lorakernels"))
    monkeypatch.delenv("LORAKERNELS_BACKEND", raising=False)
    from lorakernels import dispatch

    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def choose_gemm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A call that says, in place of the measurement, who multiplies float32 on a CPU and whether 16-bit
    products are made in it; for products of any size."""
    from lorakernels import cpu_gemm, dispatch

    monkeypatch.setattr(cpu_gemm, "LARGE", 0)

    def choose(widens: bool, gemm: cpu_gemm.Gemm = cpu_gemm.ONEDNN) -> None:
        narrow = cpu_gemm.in_float32(gemm) if widens else cpu_gemm.NARROW
        winners = {torch.float32: gemm, torch.bfloat16: narrow, torch.float16: narrow}
        dispatch.use_choices(
            {cpu_gemm.precision_problem(dtype): {"winner": one.name} for dtype, one in winners.items()}
        )

    return choose


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows up as NaN."""
    shipped = torch.empty

    def empty(*args, **kwargs):
        tensor = shipped(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)
