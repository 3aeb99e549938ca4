"""A recorded step, replayed on other batches, has the bits of the step as it is; what is baked in shows."""

import contextlib
import dataclasses
import os

import pytest
import torch

from bloomft.batch import IGNORE_INDEX, PADDING_ID, Batch
from bloomft.config.keys import OptimConfig, OptimizerConfig, SchedulerConfig
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.model.patch import adapted_layers, patch_bloom
from bloomft.run import step_graph, step_inputs
from bloomft.run.state import RunState
from bloomft.run.step_graph import CudaGraphs, GraphChoice, choose_graph
from tests.bloomft.conftest import tiny_model
from tests.bloomft.run.recorded_replay import RecordedReplay
from tests.bloomft.run_folder import metrics, same_adapters

ROWS, LENGTH, ACCUMULATED, STEPS = 3, 21, 2, 4
OPTIM = OptimConfig(OptimizerConfig(lr=1e-2), SchedulerConfig(num_training_steps=STEPS))
SIZES = [8, 16, 24, 32, 40, 48, 56, 63]  # of the loss, for 3 x 21 tokens
REPLAYED, PLAIN = True, False


def make_run(
    replayed: bool, *, dropout_p: float = 0.0, checkpointing: bool | str = False, **options
) -> RunState:
    model = patch_bloom(tiny_model(n_layer=3), r=4, scale=2.0, dropout_p=dropout_p)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    checkpoint_blocks(model, checkpointing, preserve_rng_state=False)
    recorder = RecordedReplay() if replayed else None
    torch.manual_seed(3)
    run = RunState(model, OPTIM, **{"fp16": False, "fixed_shapes": True, "recorder": recorder, **options})
    run.prepare(ROWS * LENGTH)
    return run


def batch_of(number: int, labelled: float) -> Batch:
    """Packed rows of two or three documents and some padding, each number with other ones."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(4, 384, (ROWS, LENGTH), generator=generator)
    cuts = torch.randint(2, LENGTH - 3, (ROWS, 2), generator=generator).sort(1).values
    document_ids = (torch.arange(LENGTH)[None, None] >= cuts[..., None]).sum(1).int()
    document_ids[:, LENGTH - 2 :] = PADDING_ID
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > labelled, IGNORE_INDEX)
    labels[document_ids == PADDING_ID] = IGNORE_INDEX
    labels[:, 1], document_ids[:, :2] = ids[:, 1], 0  # at least one
    return {"input_ids": ids, "labels": labels, "document_ids": document_ids}


# the shares of tokens with a label: sizes that come again, and new ones in the middle of an accumulation
SHARES = [0.9, 0.85, 0.3, 0.9, 0.4, 0.1, 0.35, 0.95]


def train(run: RunState, first: int = 0, steps: int = STEPS) -> list[torch.Tensor]:
    """Adapters and gradient norm after each step, and the window's loss."""
    seen = []
    for step in range(first, first + steps):
        numbers = range(step * ACCUMULATED, (step + 1) * ACCUMULATED)
        batches = [batch_of(number, SHARES[number]) for number in numbers]
        labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        for batch in batches:
            run.forward_backward(batch, labels)
        run.reduce_gradients(1.0)
        run.optimizer_step(ACCUMULATED * ROWS)
        seen += [run.grad_norm, run.window.loss.clone()]
        seen += [value.detach().clone() for value in run.parameters]
    return seen


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_a_replayed_step_has_the_bits_of_the_step_as_it_is(checkpointing, dropout_p):
    options = {"checkpointing": checkpointing, "dropout_p": dropout_p}
    plain = train(make_run(PLAIN, **options))
    replayed = make_run(REPLAYED, **options)
    assert same_bits(train(replayed), plain)
    sizes = replayed._graph._recordings
    assert len(sizes) == replayed._graph._recorder.recorded >= 3
    assert sizes.keys() <= set(SIZES)


def test_a_replayed_step_under_the_scaler_of_fp16():
    def scaled(replayed):
        run = make_run(replayed, fp16=True)
        # grows after every step: the factor has to be read from its tensor
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1)
        return run

    plain, replayed = scaled(PLAIN), scaled(REPLAYED)
    assert same_bits(train(plain), train(replayed))
    assert replayed.scaler.get_scale() == 2.0 ** (4 + STEPS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replayed_run_resumed_in_the_middle_has_the_same_bits(checkpointing):
    options = {"checkpointing": checkpointing, "dropout_p": 0.3}
    whole = train(make_run(PLAIN, **options))
    first, second = make_run(REPLAYED, **options), make_run(REPLAYED, **options)
    before = train(first, steps=2)
    state = first.state_dict()
    torch.manual_seed(99)
    second.load_state_dict(state, OPTIM)
    assert same_bits(before + train(second, first=2, steps=2), whole)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on CPU tensors")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replayed_step_by_the_kernels_of_a_gpu(checkpointing):
    """The layer norm makes the shrink, and hands on the seed."""

    def by_triton(replayed):
        run = make_run(replayed, dropout_p=0.3, checkpointing=checkpointing)
        for layer in adapted_layers(run.model).values():
            layer.backend = "triton"
        return run

    plain = train(by_triton(PLAIN), steps=2)
    assert same_bits(train(by_triton(REPLAYED), steps=2), plain)


def test_what_a_first_warm_up_draws_moves_no_seed():
    """As a measurement or a compilation may."""

    class Measuring(RecordedReplay):
        warm_ups = 0

        def warm_up(self, calculate):
            if self.warm_ups < 3:
                torch.rand(7)
            self.warm_ups += 1
            super().warm_up(calculate)

    plain = train(make_run(PLAIN, dropout_p=0.3))
    assert same_bits(train(make_run(PLAIN, dropout_p=0.3, recorder=Measuring())), plain)


def test_a_checkpoint_tells_of_the_graph_where_there_was_a_choice(monkeypatch):
    runs = {replayed: make_run(replayed) for replayed in (REPLAYED, PLAIN)}
    assert {run.state_dict()["cuda_graph"] for run in runs.values()} == {None}
    monkeypatch.setattr(type(runs[PLAIN].model), "device", torch.device("cuda"))
    for replayed, run in runs.items():
        assert run.state_dict()["cuda_graph"] is replayed


def test_every_size_is_warmed_up_before_the_first_recording():
    """A step beside a recording would need its memory once more."""
    order = []

    class Ordered(RecordedReplay):
        def warm_up(self, calculate):
            order.append(len(calculate.args[0]["supervised_rows"]))
            super().warm_up(calculate)

        def record(self, calculate):
            order.append("recorded")
            return super().record(calculate)

    train(make_run(PLAIN, recorder=Ordered()))
    warm_ups = [*SIZES, SIZES[-1], SIZES[-1]]
    assert order[: len(warm_ups)] == warm_ups
    assert set(order[len(warm_ups) :]) == {"recorded"}


def test_a_failed_capture_says_what_to_do():
    run = make_run(REPLAYED)

    def fail(calculate):
        raise RuntimeError("an operation is not permitted")

    run._graph._recorder.record = fail
    message = r"cannot be captured .*\(train.cuda_graph=false\): an operation is not permitted"
    with pytest.raises(RuntimeError, match=message):
        run.forward_backward(batch_of(0, 0.9), 50)


def test_masks_differ_between_layers_and_micro_batches():
    run = make_run(REPLAYED, dropout_p=0.3)
    seen = []
    for number in range(4):
        run.forward_backward(batch_of(number, 0.9), 50)
        seen += [layer.dropout_seed.item() for layer in adapted_layers(run.model).values()]
    assert len(set(seen)) == 4 * 3


def test_a_label_count_that_is_a_number_is_baked_in(monkeypatch):
    """A mutation: the model is given a number in place of the tensor."""
    calculate = RunState._calculate

    def with_number(run, inputs):
        return calculate(run, {**inputs, "num_items_in_batch": int(inputs["num_items_in_batch"])})

    plain = train(make_run(PLAIN))
    monkeypatch.setattr(RunState, "_calculate", with_number)
    assert same_bits(train(make_run(PLAIN)), plain)
    assert not same_bits(train(make_run(REPLAYED)), plain)


def test_a_seed_that_is_drawn_inside_is_refused_and_has_other_masks(monkeypatch):
    """A mutation: the layers draw their own seeds, as without a trainer."""

    def own_seeds(replayed):
        run = make_run(replayed, dropout_p=0.3, checkpointing=True)
        checkpoint_blocks(run.model, True)
        for layer in adapted_layers(run.model).values():
            layer.dropout_seed = None
        return run

    with pytest.raises(RuntimeError, match=r"train.cuda_graph=false\): it draws random"):
        train(own_seeds(REPLAYED))
    # without the check
    monkeypatch.setattr(step_graph, "rng_states", lambda: {"cpu": torch.zeros(0)})
    monkeypatch.setattr(step_graph, "restore_rng_states", lambda _: None)
    # recomputation draws another mask in the replay, where no random state is set back
    assert not same_bits(train(own_seeds(REPLAYED)), train(own_seeds(PLAIN)))


def test_a_seed_that_is_a_number_is_baked_in(monkeypatch):
    """A mutation: the seed is read on the host."""
    calculate = RunState._calculate

    def with_number(run, inputs):
        return calculate(run, {**inputs, "seed": torch.tensor([inputs["seed"].item()])})

    plain = train(make_run(PLAIN, dropout_p=0.3))
    monkeypatch.setattr(RunState, "_calculate", with_number)
    assert same_bits(train(make_run(PLAIN, dropout_p=0.3)), plain)
    assert not same_bits(train(make_run(REPLAYED, dropout_p=0.3)), plain)


def test_a_whole_run_replayed_and_resumed_ends_in_the_same_bits(run, monkeypatch, tmp_path):
    """By the command's own loop, with evaluations between the steps."""
    changes = {
        "model__lora__lora_dropout": 0.2, "train__batch_size": 2, "train__accumulate_grad_batches": 2,
        "optim__scheduler__num_training_steps": 6,
    }  # fmt: skip
    recorders = []

    def recorder(*_):
        recorders.append(RecordedReplay())
        return recorders[-1]

    monkeypatch.setattr("bloomft.run.setup.choose_graph", lambda *_, **__: GraphChoice(True, "a test"))
    monkeypatch.setattr(GraphChoice, "recorder", lambda *_: None)
    plain = run(**changes, train__output_dir=str(tmp_path / "plain")).run_dir
    monkeypatch.setattr(GraphChoice, "recorder", recorder)
    whole = run(train__output_dir=str(tmp_path / "whole")).run_dir
    again = run(train__output_dir=str(tmp_path / "again"), train__resume=str(whole / "step-3.ckpt")).run_dir
    assert [one.recorded > 0 for one in recorders] == [True, True]
    assert same_adapters(whole, plain)
    assert same_adapters(again, plain)
    for left, right in zip(metrics(plain), metrics(whole), strict=True):
        assert (left["loss"], left["grad_norm"]) == (right["loss"], right["grad_norm"])


def test_another_shape_is_refused():
    run = make_run(REPLAYED)
    run.forward_backward(batch_of(0, 0.9), 50)
    smaller = {name: tensor[:1] for name, tensor in batch_of(0, 0.9).items()}
    with pytest.raises(RuntimeError, match=r"expected shape \[3, 21\] as before, got \[1, 21\]"):
        run.forward_backward(smaller, 50)


@pytest.mark.parametrize("label", [384, -1])
def test_a_label_out_of_range_is_refused_before_it_is_copied(label):
    batch = batch_of(0, 0.9)
    batch["labels"][0, 1] = label
    with pytest.raises(ValueError, match=r"labels: expected 0..383 or -100, got values from"):
        make_run(PLAIN).forward_backward(batch, 50)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_rows_are_filled_up_to_an_eighth_with_rows_that_have_no_label(share):
    batch = batch_of(1, share)
    exact = step_inputs.step_inputs(batch, 9, 384, fill_rows=False)
    filled = step_inputs.step_inputs(batch, 9, 384, fill_rows=True)["supervised_rows"]
    assert set(exact["supervised_rows"].tolist()) <= set(filled.tolist())
    assert len(filled.unique()) == len(filled)
    assert len(filled) == min(size for size in SIZES if size >= len(exact["supervised_rows"]))
    assert exact["num_items_in_batch"].dtype == torch.int64
    assert exact["num_items_in_batch"] == 9


class TestChoice:
    """Where a graph is used, and what the log says."""

    @pytest.fixture
    def model(self, monkeypatch):
        """A patched model that says that it is on a GPU."""
        model = patch_bloom(tiny_model(), r=2, scale=1.0)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        return model

    def choose(self, model, packing=True, remembered=None, cuda_graph="auto"):
        @dataclasses.dataclass
        class Settings:
            cuda_graph: bool | str

        choice = choose_graph(Settings(cuda_graph), model, packing=packing, remembered=remembered)
        return choice.used, choice.reason

    def test_wherever_it_can_be_captured(self, model):
        assert self.choose(model) == (True, "auto on CUDA")
        assert self.choose(model, cuda_graph=False, remembered=True) == (False, "as configured")
        assert self.choose(model, packing=False) == (False, "data.packing=false: rows differ in length")

    def test_a_resumed_run_keeps_its_own(self, model):
        for before in (True, False):
            assert self.choose(model, remembered=before) == (before, "as in the checkpoint")
        assert not self.choose(model, packing=False, remembered=True)[0]

    @pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
    def test_not_where_the_base_drops_anything(self, monkeypatch, key):
        model = patch_bloom(tiny_model(**{key: 0.1}), r=2, scale=1.0)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert self.choose(model) == (False, "the base has dropout")

    def test_not_where_transformers_own_loss_or_attention_is_taken(self, model):
        model.loss_function = lambda *_, **__: None
        assert self.choose(model) == (False, "the base takes transformers' own attention or loss")

    def test_not_on_a_cpu(self):
        model = patch_bloom(tiny_model(), r=2, scale=1.0)
        assert self.choose(model) == (False, "the device is cpu")


def test_cuda_s_recorder_captures_on_one_stream_with_one_pool(monkeypatch):
    """The order of calls alone: CUDA itself is not there."""
    calls = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            calls.append("wait")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def entered(name, *arguments, **options):
        calls.append((name, arguments[1:], options))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("stream", stream))
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: entered("graph", *args, **options))
    recorder = CudaGraphs(torch.device("cuda", 0))
    recorder.warm_up(lambda: calls.append("warm-up"))
    result, replay = recorder.record(lambda: calls.append("captured") or "loss")
    replay()
    assert result == "loss"
    stream = ("pool", recorder._stream)
    captured = ("graph", stream, {"capture_error_mode": "thread_local"})
    assert calls == ["wait", ("stream", (), {}), "warm-up", "wait", captured, "captured", "replay"]
