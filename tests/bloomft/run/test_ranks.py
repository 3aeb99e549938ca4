"""Several processes train one run as one does."""

import functools
import itertools
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d

from bloomft import progress
from bloomft import train as train_module
from bloomft.data import token_cache
from bloomft.errors import UserError
from bloomft.model.fused_classes import FusedBloomModel
from bloomft.ranks import _store_of_this_start, join_ranks
from bloomft.run import setup
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.gradients import ALIGNMENT, ROW
from bloomft.run.state import RunState
from lorakernels import dispatch
from tests.bloomft.conftest import tiny_model
from tests.bloomft.launched import Launched
from tests.bloomft.python_process import finish, start_python
from tests.bloomft.run_folder import adapters, metrics, same_adapters

TOLERANCE = 1e-4
STRATEGIES = ["ddp", "fsdp"]
COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "isend",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send",
]  # fmt: skip
# what FSDP2 gathers with: torch up to 2.12, and since
GATHERS = {"all_gather_into_tensor", "all_gather_single"}


@pytest.fixture
def launch(settings, config_path, tmp_path):
    """Starts the run in several processes, with changes of its configuration as overrides."""

    def launch(size: int, *overrides: str, before=None, **environment: str) -> Launched:
        return Launched(size, config_path(settings), tmp_path / "errors", overrides, before, **environment)

    return launch


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=TOLERANCE)


def rank() -> int:
    return int(os.environ["RANK"])


def after_step(step: int, act, *, everywhere: bool = False) -> None:
    """Calls ``act`` in process 1, or in all of them, once this many steps are done."""
    take = RunState.optimizer_step

    def optimizer_step(run: RunState, rows: int) -> None:
        take(run, rows)
        if run.step == step and (everywhere or rank() == 1):
            act()

    RunState.optimizer_step = optimizer_step


def show_every_wait() -> None:
    progress.FIRST_LINE, progress.POLL = 0.0, 0.01


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "batch_size", "accumulate", "dropout"), [(2, 2, 2, 0.1), (4, 1, 2, 0.0)])
def test_the_same_rows_on_several_processes(
    run, launch, tmp_path, size, batch_size, accumulate, dropout, strategy
):
    alone = run(
        model__lora__lora_dropout=dropout,
        data__packing=False,  # rows differ in labels, which a mean of means would weigh wrongly
        train__batch_size=2,
        train__accumulate_grad_batches=4,
        optim__scheduler__num_training_steps=30,
        train__output_dir=str(tmp_path / "alone"),
    )
    together = tmp_path / "together"
    job = launch(
        size,
        f"train.output_dir={together}",
        f"train.batch_size={batch_size}",
        f"train.accumulate_grad_batches={accumulate}",
        f"train.strategy={strategy}",
        before=show_every_wait,
    )
    assert job.finish() == [0] * size, job.errors()
    for left, right in zip(metrics(alone.run_dir), metrics(together), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=TOLERANCE)
        assert right.get("eval_loss") == pytest.approx(left.get("eval_loss"), abs=TOLERANCE)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
    close(adapters(together), adapters(alone.run_dir))
    ours, theirs = (load_checkpoint(folder / "last.ckpt") for folder in (together, alone.run_dir))
    assert ours.position == theirs.position == 30 * 8
    assert torch.equal(ours.rng["cpu"], theirs.rng["cpu"])
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.run_dir.iterdir()}
    shown, *others = job.errors()
    assert "step 30" in shown
    assert others == [""] * (size - 1)


def count_traffic() -> None:
    """Writes what process 0 exchanges, and the steps between, to a file beside the run's folder."""
    if rank() != 0:
        return
    seen: list[str | tuple[str, str, int]] = []

    def counted(name, exchange):
        def call(*arguments, **options):
            given = [*arguments, *options.values()]
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            seen.extend((name, str(value.dtype), value.nbytes) for value in tensors)
            if not tensors:
                seen.append((name, "", 0))
            return exchange(*arguments, **options)

        return call

    # not every version of torch has them all
    for name in filter(functools.partial(hasattr, distributed_c10d), COLLECTIVES):
        call = counted(name, getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            setattr(module, name, call)
    take, run_whole = RunState.optimizer_step, train_module.train

    def optimizer_step(run, rows):
        take(run, rows)
        seen.append("step")

    def train(config):
        result = run_whole(config)
        config.train.run_dir.with_name("traffic").write_text(json.dumps(seen))
        return result

    RunState.optimizer_step, train_module.train = optimizer_step, train


def traffic_of_steps(launch, tmp_path, strategy) -> list[list[list]]:
    """What process 0 exchanges in each step but the first: name, dtype and bytes of each time."""
    job = launch(
        2,
        f"train.strategy={strategy}",
        "optim.scheduler.num_training_steps=6",
        "train.accumulate_grad_batches=3",
        "train.log_every_n_steps=100",
        "train.save_every_n_train_steps=100",
        "train.eval_every_n_steps=0",
        before=count_traffic,
    )
    assert job.finish() == [0, 0], job.errors()
    seen = json.loads((tmp_path / "traffic").read_text())
    steps = [index for index, entry in enumerate(seen) if entry == "step"]
    assert len(steps) == 6
    return [seen[first + 1 : last] for first, last in itertools.pairwise(steps)]


def of_the_adapters(folder) -> list[list]:
    """What ddp exchanges in a step."""
    sizes = [-(-value.numel() // ALIGNMENT) * ALIGNMENT for value in adapters(folder).values()]
    gradients = -(-sum(sizes) // ROW) * ROW * 4
    return [["all_reduce", "torch.int64", 4 * 8], ["all_reduce", "torch.float32", gradients]]


def test_a_step_exchanges_the_adapters_gradients_once_and_four_numbers(launch, tmp_path):
    steps = traffic_of_steps(launch, tmp_path, "ddp")
    assert steps == [of_the_adapters(tmp_path / "run")] * 5


def test_fsdp_gathers_each_block_twice_and_the_vocabulary_once_a_micro_batch(launch, tmp_path):
    steps = traffic_of_steps(launch, tmp_path, "fsdp")
    sizes = {name: parameter.nbytes for name, parameter in tiny_model().named_parameters()}
    block, norms = (
        sum(size for name, size in sizes.items() if part in name) for part in (".h.0.", "r.word_embeddings_l")
    )
    norms *= 2  # as many bytes are in the layer norm after the last block
    vocabulary = sizes["transformer.word_embeddings.weight"]
    for step in steps:
        assert [entry for entry in step if entry[0] == "all_reduce"] == of_the_adapters(tmp_path / "run")
        # noted with what is filled and what is sent
        gathered = [size for name, _, size in step if name in GATHERS]
        # in three micro-batches two blocks, forward and backward, and the norms outside of them once
        assert sum(gathered) == 3 * 1.5 * (4 * block + norms)
        assert sum(size for name, _, size in step if name == "broadcast") == 3 * vocabulary
        sent = {entry[0] for entry in step}
        assert sent - GATHERS == {"all_reduce", "all_to_all_single", "broadcast"}


def signal_process_1_twice() -> None:
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler and torchrun do, one after the other

    after_step(4, stop)


def test_a_signal_to_one_process_stops_all_and_one_or_four_go_on(run, launch, tmp_path):
    changes = {"train__batch_size": 2, "train__accumulate_grad_batches": 2}
    whole = run(train__output_dir=str(tmp_path / "whole"), **changes)
    together = f"train.output_dir={tmp_path / 'together'}"
    job = launch(2, together, "train.accumulate_grad_batches=1", before=signal_process_1_twice)
    assert job.finish() == [75, 75], job.errors()
    assert "last.ckpt holds step 4 of 12; the same command resumes from there" in job.errors()[0]
    assert load_checkpoint(tmp_path / "together" / "last.ckpt").position == 16
    shutil.copytree(tmp_path / "together", tmp_path / "four")
    run(train__output_dir=str(tmp_path / "together"))
    four = f"train.output_dir={tmp_path / 'four'}"
    assert launch(4, four, "train.batch_size=1", "train.accumulate_grad_batches=1").finish() == [0] * 4
    for folder in (tmp_path / "together", tmp_path / "four"):
        close(adapters(folder), adapters(whole.run_dir))
        for left, right in zip(metrics(folder), metrics(whole.run_dir), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], abs=TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_worker_is_replaced_and_the_run_ends_in_the_same_bits(
    launch, settings, config_path, tmp_path, monkeypatch, strategy
):
    settings["train"]["strategy"] = strategy
    settings["model"]["lora"]["lora_dropout"] = 0.1
    settings["train"]["log_every_n_steps"] = 4  # a line of steps before and after the checkpoint
    whole = tmp_path / "whole"
    assert launch(2, f"train.output_dir={whole}").finish() == [0, 0]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    process = start_python(*torchrun, "-m", "tests.bloomft.run.dying_worker", config_path(settings))
    status, _, errors = finish(process)
    assert status == 0, errors
    assert f"going on from {tmp_path / 'run' / 'last.ckpt'}, step 3" in errors
    assert same_adapters(tmp_path / "run", whole)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (tmp_path / "run", whole)]
    assert losses[0] == losses[1]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 6, 8, 12]


@pytest.mark.parametrize("left", [2, 3])
def test_a_restart_reads_nothing_that_an_earlier_start_has_left(left):
    kept = dist.HashStore()
    stale = {f"token {rank}": f"old{rank}" for rank in range(left)} | {"tokens": "old0 old1 old2"}
    stale |= {f"joined {rank}": "old0" for rank in range(left)}
    for name, value in stale.items():
        kept.set(name, value)
    for store in (kept, dist.PrefixStore("old0", kept)):
        store.set("address", "of a dead process")
    limit = timedelta(seconds=20)

    def join(rank: int) -> dist.Store:
        time.sleep(0.1 * rank)
        return _store_of_this_start(kept, rank, 3, limit)

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(join, range(3))
    assert not first.check(["address"])
    first.set("address", "of a living one")
    assert [other.get("address") for other in others] == [b"of a living one"] * 2


def make_a_mistake_in_process_1() -> None:
    def fail():
        raise UserError("a mistake that only process 1 makes")

    after_step(4, fail)


def test_a_process_that_fails_ends_the_others_with_a_line_each(launch, tmp_path):
    job = launch(2, before=make_a_mistake_in_process_1)
    assert job.finish() == [1, 2]
    first, second = job.errors()
    assert second == "error: a mistake that only process 1 makes\n"
    last = first.splitlines()[-1]
    assert last.startswith("process 0 of 2 stopped: another one has ended (")
    assert "Check the logs" not in last
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").step == 3


def report_a_kernel_of_process_1_late() -> None:
    """Process 1 hears of a mistake of its own GPU while it exchanges gradients."""

    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if rank() == 1:
        after_step(4, lambda: setattr(dist, "all_reduce", fail))


def test_an_error_of_the_device_is_not_taken_for_a_lost_process(launch):
    job = launch(2, before=report_a_kernel_of_process_1_late)
    assert job.finish() == [1, 1]
    first, second = job.errors()
    assert "Traceback" in second
    assert second.endswith("RuntimeError: CUDA error: an illegal memory access was encountered\n")
    assert first.splitlines()[-1].startswith("process 0 of 2 stopped: another one has ended (")


def hang_in_process_1() -> None:
    after_step(4, lambda: time.sleep(1000))


def fail_in_a_block_of_process_1() -> None:
    """Process 1 ends while process 0 waits for its part of a block."""

    def fail(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank() == 1:
        after_step(4, lambda: setattr(FusedBloomModel, "forward", fail))


def test_a_process_that_ends_within_a_pass_is_missed_with_a_line(launch, tmp_path):
    job = launch(2, "train.strategy=fsdp", before=fail_in_a_block_of_process_1)
    assert job.finish() == [1, -signal.SIGKILL], job.errors()
    last = job.errors()[0].splitlines()[-1]
    assert last.startswith("process 0 of 2 stopped: another one has ended (")
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").step == 3


def test_a_hang_ends_after_the_stated_time(launch):
    # process 1 gives up as early: it must not wait while process 0 alone writes a checkpoint
    job = launch(
        2, "train.timeout_minutes=0.05", "train.save_every_n_train_steps=100", before=hang_in_process_1
    )
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 1, job.errors()
    assert "did not answer within 0.05 minutes" in job.errors()[0].splitlines()[-1]
    assert job.processes[1].exitcode is None
    job.processes[1].kill()


def measure_slowly() -> None:
    measure = train_module.GemmLimit

    def slow(*arguments):
        time.sleep(4)
        return measure(*arguments)

    train_module.GemmLimit = slow


def test_a_measurement_of_process_0_may_take_longer_than_a_step(launch):
    steps = ("optim.scheduler.num_training_steps=3", "train.save_every_n_train_steps=100")
    job = launch(2, "train.timeout_minutes=0.05", *steps, before=measure_slowly)
    assert job.finish() == [0, 0], job.errors()


def leave_it_to_process_0() -> None:
    """Lets every other process fail where it reads text, looks for a checkpoint or measures a kernel."""
    dispatch.LARGE["cpu"] = 0  # every product is worth a choice
    os.environ["LORAKERNELS_CACHE_DIR"] = os.path.join(os.environ["LORAKERNELS_CACHE_DIR"], str(rank()))
    if rank() != 0:

        def refuse(*_, **__):
            raise AssertionError("left to process 0")

        dispatch._measure = token_cache._content_key = refuse
        token_cache.TokenCache.contents = setup.find_resumption = setup.choose_precision = refuse
        train_module.RunLog = train_module.exclusive_folder = train_module.check_early = refuse
        setup.save_checkpoint = train_module.GemmLimit = refuse


def test_process_0_reads_measures_and_writes_for_all(launch, tmp_path, settings):
    settings["train"] |= {"precision": "auto", "eval_every_n_steps": 0}
    settings["data"]["heldout_fraction"] = 0.0
    job = launch(
        2,
        "optim.scheduler.num_training_steps=3",
        before=leave_it_to_process_0,
        LORAKERNELS_CACHE_DIR=str(tmp_path / "choices"),
    )
    assert job.finish() == [0, 0], job.errors()
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").kernels


def differ_in_process_1() -> None:
    if rank() == 1:
        setup._digest = lambda model: "another"


def test_processes_with_other_adapters_do_not_train(launch, tmp_path):
    job = launch(2, before=differ_in_process_1)
    assert job.finish() == [2, 1]
    assert "process 1: adapters: not the same as on process 0" in job.errors()[0].splitlines()[-1]
    assert not (tmp_path / "run" / "last.ckpt").exists()


def configure_process_1_differently() -> None:
    if rank() == 1:
        train = train_module.train

        def train_differently(config):
            config.optim.optimizer.lr *= 2
            config.data.cache_dir += " of this machine"
            return train(config)

        train_module.train = train_differently


def test_processes_with_other_settings_do_not_train_but_each_may_have_its_own_cache(launch):
    job = launch(2, before=configure_process_1_differently)
    assert job.finish() == [2, 1]
    assert "error: process 1: optim.optimizer.lr: not the same as on process 0" in job.errors()[0]


def test_a_base_with_dropout_is_refused(launch, base_copy):
    described = json.loads((base_copy / "config.json").read_text()) | {"hidden_dropout": 0.1}
    (base_copy / "config.json").write_text(json.dumps(described))
    job = launch(2, f"model.transformer.pretrained_model_name_or_path={base_copy}")
    assert 2 in job.finish()
    assert any("error: the base has dropout" in text for text in job.errors())


def test_what_is_not_finite_is_said_once(launch, base_copy):
    tensors = load_file(base_copy / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = float("nan")
    save_file(tensors, base_copy / "model.safetensors", {"format": "pt"})
    job = launch(2, f"model.transformer.pretrained_model_name_or_path={base_copy}")
    assert job.finish() == [2, 1]
    first, second = job.errors()
    assert "error: step 1: not finite: the loss, the gradient norm" in first.splitlines()[-1]
    assert "(loss nan, gradient norm nan)" in first.splitlines()[-1]
    # the loss of all processes is known to process 0 alone
    assert second.startswith("process 1 of 2 stopped: ")
    assert second.count("\n") == 1


def test_half_an_environment_is_a_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(
            UserError, match=r"WORLD_SIZE=2 without RANK.*; start with torchrun, or unset WORLD_SIZE"
        ),
        join_ranks(torch.device("cpu"), 1),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "2"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "x")],
)
def test_a_wrong_number_in_the_environment_is_a_line(monkeypatch, name, value):
    right = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for variable, number in (right | {name: value}).items():
        monkeypatch.setenv(variable, number)
    with (
        pytest.raises(UserError, match=f"{name}={value}: not a number that a launcher sets; start with"),
        join_ranks(torch.device("cpu"), 0.01),
    ):
        pass
