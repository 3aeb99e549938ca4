"""Forward and backward of a micro-batch as one CUDA graph: recorded once for a size, then replayed.

The host then launches one graph in place of a few thousand kernels. A replay runs the recorded kernels on the
recorded addresses, so everything that changes between micro-batches is a tensor at a fixed place: the inputs
(`StaticInputs`), the adapters, their gradients (`FlatGradients`), the dropout seeds (`DropoutSeeds`) and the
loss. What must stay outside: what waits for the device, and what draws random numbers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import BloomForCausalLM

from bloomft.config.keys import TrainConfig
from bloomft.model.fused_block import takes_fused_inputs
from bloomft.model.fused_classes import FusedBloomForCausalLM
from bloomft.model.sharding import is_sharded
from bloomft.run.random_states import restore_rng_states, rng_states
from bloomft.run.step_inputs import Inputs, StaticInputs, row_sizes

# Before the first capture, as torch.cuda.graph asks for, so that nothing is made for the first time in it.
WARM_UPS = 3

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what a function does on the device, to repeat it."""

    def warm_up(self, calculate: Callable[[], object]) -> None:
        """Run ``calculate`` as it will be recorded."""

    def record(self, calculate: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """What ``calculate`` returns, which every replay writes anew, and the replay.

        Whether ``calculate`` has an effect while it is recorded is left open.
        """


class CudaGraphs:
    """CUDA's recorder; its graphs share their memory, so only one replay's results exist at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, calculate: Callable[[], object]) -> None:
        """On the stream of the capture, since autograd's nodes keep the stream that they are made on."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            calculate()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def record(self, calculate: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """Captured without effect; other threads, such as a logger's, may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = calculate()
        return result, graph.replay


class StepGraph:
    """``calculate``, which adds a micro-batch's gradients to ``gradients`` and returns its loss, recorded.

    One recording for each length of supervised_rows. ``calculate`` takes tensors on ``device``.
    """

    def __init__(
        self,
        recorder: Recorder,
        calculate: Callable[[Inputs], Tensor],
        gradients: Tensor,
        device: torch.device,
    ) -> None:
        self._recorder, self._calculate = recorder, calculate
        self._gradients, self._device = gradients, device
        self._static: StaticInputs | None = None
        self._recordings: dict[int, tuple[Tensor, Replay]] = {}

    def run(self, inputs: Inputs) -> Tensor:
        """The loss of ``inputs``, on the CPU; the next call overwrites it."""
        if self._static is None:
            self._static = StaticInputs(inputs, self._device)
            with self._unchanged():
                self._warm_up(self._static, inputs)
        loaded = self._static.load(inputs)
        size = len(loaded["supervised_rows"])
        if size not in self._recordings:
            with self._unchanged():
                self._recordings[size] = self._record(loaded)
        loss, replay = self._recordings[size]
        replay()
        return loss

    def _warm_up(self, static: StaticInputs, inputs: Inputs) -> None:
        """Measure and compile what is new in a step of any size.

        All sizes come before the first recording: what this holds leaves no memory for a step beside it.
        Raises RuntimeError where a step draws random numbers.
        """
        sizes = row_sizes(inputs["labels"].numel())
        for size in [*sizes, *sizes[-1:] * (WARM_UPS - 1)]:
            loaded = static.load({**inputs, "supervised_rows": torch.arange(size)})
            states = rng_states()
            self._recorder.warm_up(functools.partial(self._calculate, loaded))
        if any(not torch.equal(state, states[name]) for name, state in rng_states().items()):
            raise _cannot_record("it draws random numbers")

    def _record(self, loaded: Inputs) -> tuple[Tensor, Replay]:
        try:
            return self._recorder.record(functools.partial(self._calculate, loaded))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _cannot_record(str(error)) from error

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Afterwards gradients and random states are as they were before."""
        gradients, states = self._gradients.clone(), rng_states()
        yield
        self._gradients.copy_(gradients)
        restore_rng_states(states)


def _cannot_record(reason: str) -> RuntimeError:
    return RuntimeError(f"the step cannot be captured in a CUDA graph (train.cuda_graph=false): {reason}")


@dataclass(frozen=True)
class GraphChoice:
    """Whether a run's steps are replayed from a CUDA graph, and why, in words for the log."""

    used: bool
    reason: str

    def recorder(self, device: torch.device) -> Recorder | None:
        """What records the steps, None where they run as they are."""
        return CudaGraphs(device) if self.used else None


def choose_graph(
    configured: TrainConfig, model: BloomForCausalLM, *, packing: bool, remembered: bool | None
) -> GraphChoice:
    """What ``train.cuda_graph`` says; for "auto" that of the checkpoint, ``remembered``, where there is one.

    Otherwise "auto" is a graph wherever a step of ``model`` can be captured.
    """
    if configured.cuda_graph is False:
        return GraphChoice(False, "as configured")
    if reason := obstacle(model, packing=packing):
        return GraphChoice(False, reason)
    if remembered is not None:
        return GraphChoice(remembered, "as in the checkpoint")
    return GraphChoice(True, "auto on CUDA")


def obstacle(model: BloomForCausalLM, *, packing: bool) -> str | None:
    """Why a training step of ``model`` cannot be captured, None where it can."""
    if model.device.type != "cuda":
        return f"the device is {model.device.type}"
    if not packing:
        return "data.packing=false: rows differ in length"
    if is_sharded(model):
        return "fsdp: blocks are gathered between the processes"
    if draws_random_numbers(model):
        return "the base has dropout"
    fuses_loss = isinstance(model, FusedBloomForCausalLM) and model.fuses_loss({})
    if not fuses_loss or not all(map(takes_fused_inputs, model.transformer.h)):
        return "the base takes transformers' own attention or loss"
    return None


def draws_random_numbers(model: BloomForCausalLM) -> bool:
    """Whether a training step of ``model`` draws some beside the seeds of its adapters' dropout."""
    return model.config.hidden_dropout > 0 or model.config.attention_dropout > 0
