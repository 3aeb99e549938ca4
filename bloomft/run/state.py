"""What changes while a run trains, in one object: created, stepped, saved and restored."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import BloomForCausalLM

from bloomft.accounting import BatchCounts, GemmLimit, StepCost
from bloomft.batch import Batch, to_device
from bloomft.config.keys import OptimConfig
from bloomft.model.patch import adapted_layers, adapter_state, load_adapter_state
from bloomft.model.sharding import is_sharded, whole_stand_in
from bloomft.process import precision_of
from bloomft.ranks import Ranks
from bloomft.run.dropout_seeds import DropoutSeeds
from bloomft.run.gradients import FlatGradients
from bloomft.run.optimization import make_optimizer, make_scheduler, restore_scheduler
from bloomft.run.random_states import restore_rng_states, rng_states
from bloomft.run.state_dicts import check_like, public
from bloomft.run.step_graph import Recorder, StepGraph
from bloomft.run.step_inputs import Inputs, step_inputs
from lorakernels import kernel_choices, use_kernel_choices

_MOMENTS = ("exp_avg", "exp_avg_sq")


class LogWindow:
    """What the steps since the last line of metrics.jsonl add up to.

    Attributes:
        loss: float64 scalar on the device, loss times labels; labels: how many there were. Both go with the
            checkpoint, so that a line covers its steps whether the run was stopped between them or not.
        counts: what this process has learned from since ``start``, in seconds of `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.loss.zero_()
        self.labels = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Measure rates from here on."""
        self.counts, self.start = BatchCounts(), time.perf_counter()

    def add(self, counts: BatchCounts) -> None:
        """Count the batches of a step, whose losses are in ``loss`` already."""
        self.labels += counts.labels
        self.counts += counts

    def mean_loss(self) -> float:
        """Loss in nats a label; waits for the device."""
        return self.loss.item() / max(self.labels, 1)

    def rates(self, cost: StepCost, limit: GemmLimit, processes: int) -> dict[str, float]:
        """Speed of all ``processes`` and what it counts; ``limit``, of one, is what MFU refers to."""
        seconds, counts = time.perf_counter() - self.start, self.counts
        return {
            "tokens_per_second": counts.tokens / seconds,
            "mfu": limit.share(cost.flops(counts) / seconds / processes),
            "supervised_share": counts.labels / counts.tokens,
        }


class RunState:
    """Model, optimizer, scheduler, scaler, counters and kernel choices of a run.

    Args:
        model: the patched model, on its device.
        settings: of the optimizer and the schedule.
        fp16: whether gradients are scaled.
        fixed_shapes: whether every micro-batch has the same shape and the loss's rows are filled up, so that
            few sizes are met.
        recorder: what records forward and backward pass, to replay them; None runs them as they are. Needs
            fixed_shapes.
        ranks: the processes that train together.

    Attributes:
        step: optimizer steps done or, with fp16, skipped by the scaler, which ``skipped`` counts.
        position: rows consumed.
        gradients: of the adapters.
        grad_norm: of the last step, before clipping; a scalar on the device.
        window: since the last line of metrics.jsonl.
        base_eval_loss: held-out loss before the first step, None while it is not known.
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        settings: OptimConfig,
        *,
        fp16: bool,
        fixed_shapes: bool = False,
        recorder: Recorder | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.ranks = ranks or Ranks()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, settings)
        self.scheduler = make_scheduler(self.optimizer, settings.scheduler)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
        self.step = self.skipped = self.position = 0
        self.grad_norm = torch.zeros((), device=model.device)
        self.gradients = FlatGradients(self.parameters)
        self.fixed_shapes = fixed_shapes
        self._seeds = DropoutSeeds(adapted_layers(model).values(), model.device)
        self._graph: StepGraph | None = None
        if recorder is not None:
            self._graph = StepGraph(recorder, self._calculate, self.gradients.buffer, model.device)
        self.window = LogWindow(model.device)
        self.base_eval_loss: float | None = None

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return self.optimizer.param_groups[0]["lr"]

    def prepare(self, tokens: int) -> None:
        """Prepare for steps with micro-batches of ``tokens`` tokens: the layers choose their kernels.

        Process 0 chooses, the others take over what it chose.
        """
        self.model.train()
        chosen = self.ranks.from_first(lambda: self._choose_kernels(tokens))
        if not self.ranks.is_first:
            use_kernel_choices(chosen)
            self._choose_kernels(tokens)
        self.window.start_clock()

    def _choose_kernels(self, tokens: int) -> dict[str, dict]:
        # one of each shape, since a stand-in takes as long to make as its weight is large
        for layer in {layer.weight.shape: layer for layer in adapted_layers(self.model).values()}.values():
            (whole_stand_in(layer) if is_sharded(self.model) else layer).prepare(tokens)
        return kernel_choices()

    def agree_on_kernels(self) -> None:
        """Use on every process what any of them has chosen since, process 0's choice where several did."""
        if self.ranks.size > 1:
            for chosen in reversed(self.ranks.gather(kernel_choices())):
                use_kernel_choices(chosen)

    def collect_losses(self) -> None:
        """Move what the window of every process adds up to into that of process 0."""
        self.ranks.add(self.window.loss)
        if not self.ranks.is_first:
            self.window.loss.zero_()

    def forward_backward(self, batch: Batch, labels: int) -> None:
        """Forward and backward of one micro-batch, the one place for them.

        ``labels`` counts those of the whole step, on all processes: its loss and gradients do not depend on
        how it is cut.
        Raises RuntimeError where no gradient reaches an adapter.
        """
        vocabulary = self.model.config.vocab_size
        inputs = step_inputs(batch, labels, vocabulary, fill_rows=self.fixed_shapes)
        if self._seeds.used:
            inputs["seed"] = self._seeds.draw(self.ranks)
        if self._graph is None:
            with self.ranks.gathering():
                loss = self._calculate(to_device(inputs, self.model.device))
        else:
            loss = self._graph.run(inputs)
        self.window.loss += loss * labels

    def _calculate(self, inputs: Inputs) -> Tensor:
        """The loss of inputs on the device, whose gradients are added to ``gradients``.

        It neither waits for the device nor reads what changes between micro-batches but from tensors.
        """
        seed = inputs.get("seed")
        if seed is not None:
            self._seeds.set(seed)
        loss = self.model(**{name: tensor for name, tensor in inputs.items() if name != "seed"}).loss
        self.gradients.add(self.scaler.scale(loss))
        return loss.detach()

    def reduce_gradients(self, clip: float) -> None:
        """The one place that completes the gradients of a step, once all micro-batches are in them.

        They are summed over the processes, unscaled, and clipped to a norm of ``clip`` (0: not at all).
        """
        self.ranks.add(self.gradients.buffer)
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = self.gradients.clip(clip)

    def optimizer_step(self, rows: int) -> None:
        """Take the optimizer step of ``rows`` rows, count it, and advance a schedule of steps.

        A step that fp16's scaler skips, known only after waiting for the device, does not advance it.
        """
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.gradients.zero()
        self.step, self.position = self.step + 1, self.position + rows
        skipped = self.step - self._steps_done() if self.scaler.is_enabled() else self.skipped
        if skipped == self.skipped and isinstance(self.scheduler, LambdaLR):
            self.scheduler.step()
        self.skipped = skipped

    def step_on_metric(self, loss: float) -> None:
        """Advance a schedule that follows the held-out loss."""
        if not isinstance(self.scheduler, LambdaLR):
            self.scheduler.step(loss)

    def non_finite(self) -> list[str]:
        """What of loss, gradients, adapters and optimizer state is not finite, by name; waits for the device.

        With fp16 a gradient norm may be infinite or NaN: the scaler skips that step.
        """
        checked: dict[str, Sequence[Tensor]] = {
            "the loss": [self.window.loss],
            "the gradient norm": [] if self.scaler.is_enabled() else [self.grad_norm],
            "an adapter": self.parameters,
            "the optimizer's state": [
                value for moments in self.optimizer.state.values() for value in moments.values()
            ],
        }
        checked = {name: tensors for name, tensors in checked.items() if tensors}
        finite = [
            torch.stack([tensor.isfinite().all() for tensor in checked[name]]).all() for name in checked
        ]
        return [name for name, fine in zip(checked, torch.stack(finite).tolist(), strict=True) if not fine]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, under the names of `TrainingState`; tensors are not copied."""
        return {
            "step": self.step,
            "position": self.position,
            "adapters": adapter_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng_states(),
            "window": {"loss": self.window.loss.item(), "labels": self.window.labels},
            "kernels": kernel_choices(),
            "precision": precision_of(self.model.dtype),
            "cuda_graph": self._graph is not None if self._may_be_captured() else None,
            "base_eval_loss": self.base_eval_loss,
        }

    def _may_be_captured(self) -> bool:
        """Whether there was a choice between a CUDA graph and none, which a resumed run keeps."""
        return self.model.device.type == "cuda" and not is_sharded(self.model)

    def load_state_dict(self, state: dict[str, Any], then: OptimConfig) -> None:
        """Restore ``state``, saved under the settings ``then``; rates and the like follow those of now.

        Raises ValueError, RuntimeError, TypeError, KeyError or AttributeError where it does not fit.
        """
        self._check_fit(state)
        load_adapter_state(self.model, state["adapters"])
        self._restore_optimizer(state)
        rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
        restore_scheduler(self.scheduler, self.settings, state["scheduler"], rates, then)
        restore_rng_states(state["rng"])
        if state["kernels"] is not None:
            use_kernel_choices(state["kernels"])
        self.step, self.position = state["step"], state["position"]
        self.skipped = self.step - self._steps_done()
        self.base_eval_loss = state["base_eval_loss"]
        if self.ranks.is_first:
            self.window.loss += state["window"]["loss"]
        self.window.labels = state["window"]["labels"]

    def _steps_done(self) -> int:
        """What the optimizer counts: the steps that changed the adapters."""
        moments = self.optimizer.state.get(self.parameters[0])
        return int(moments["step"]) if moments else 0

    def _check_fit(self, state: dict[str, Any]) -> None:
        """Raise ValueError where torch would accept ``state`` and fail later, or read past its end."""
        check_like(public(state["scheduler"]), public(self.scheduler.state_dict()), "scheduler")
        if state["scaler"] and self.scaler.is_enabled():
            check_like(state["scaler"], self.scaler.state_dict(), "scaler")
        check_like(state["rng"]["cpu"], torch.get_rng_state(), "rng.cpu")
        groups, fresh = (
            [{key: group[key] for key in ("params", "lr")} for group in saved["param_groups"]]
            for saved in (state["optimizer"], self.optimizer.state_dict())
        )
        check_like(groups, fresh, "optimizer.param_groups")
        if [group["params"] for group in groups] != [group["params"] for group in fresh]:
            raise ValueError("optimizer.param_groups number other parameters")
        if not state["optimizer"]["state"]:
            return  # before the first step
        count = torch.zeros((), dtype=torch.float32)
        expected = {
            index: {"step": count, **dict.fromkeys(_MOMENTS, parameter)}
            for index, parameter in enumerate(self.parameters)
        }
        check_like(state["optimizer"]["state"], expected, "optimizer.state")

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Moments from ``state``, everything else but the learning rates from the configuration."""
        groups = self.optimizer.param_groups
        configured = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
