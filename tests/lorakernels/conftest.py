"""Where kernels run, Triton's interpreter with correct bfloat16, and torch.empty filled with NaN."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._device import _device_constructors

from benchmarks.interpreter import correct_bfloat16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


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
def skip_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is neither a GPU nor the interpreter, a test is skipped at its first launch."""
    if INTERPRETED or torch.cuda.is_available():
        return
    from triton.runtime.jit import JITFunction

    from lorakernels.ops.lora_linear import implementations

    def launch(*args, **kwargs):
        pytest.skip("launches a Triton kernel: needs a CUDA device, or TRITON_INTERPRET=1")

    monkeypatch.setattr(JITFunction, "run", launch)
    # or backend="triton" would be refused for CPU tensors before a launch
    monkeypatch.setattr(implementations, "_interpreting", lambda: True)


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

    monkeypatch.setitem(dispatch.LARGE, "cpu", 0)

    def choose(widens: bool, gemm: cpu_gemm.Gemm = cpu_gemm.ONEDNN) -> None:
        narrow = cpu_gemm.in_float32(gemm) if widens else cpu_gemm.NARROW
        winners = {torch.float32: gemm, torch.bfloat16: narrow, torch.float16: narrow}
        dispatch.use_kernel_choices(
            {cpu_gemm.precision_problem(dtype): {"winner": one.name} for dtype, one in winners.items()}
        )

    return choose


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows up as NaN."""
    shipped = torch.empty

    def empty(*args, **kwargs):
        tensor = shipped(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    # torch keeps what a default device applies to when it is first asked, and would keep the patched function
    _device_constructors()
    monkeypatch.setattr(torch, "empty", empty)
