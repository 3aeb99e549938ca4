"""After a resume every setting is the configuration's, and the counts are of what was done."""

import pytest
import torch
from transformers import get_scheduler

from bloomft.config.keys import METRIC_SCHEDULES, SCHEDULES
from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.model.patch import patch_bloom
from bloomft.run.state import RunState
from tests.bloomft.conftest import tiny_model
from tests.bloomft.run_folder import metrics

LOSSES = [3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.1, 0.9, 1.2, 1.3]
STEP_SCHEDULES = [name for name in SCHEDULES if name not in METRIC_SCHEDULES]
THEN_AND_NOW = {
    "cosine_with_restarts": ({"num_cycles": 2}, {"num_cycles": 3}),
    "cosine_with_min_lr": ({"min_lr": 1e-4}, {"min_lr": 1e-3}),
    "cosine_warmup_with_min_lr": ({"min_lr": 1e-4}, {"min_lr": 1e-3, "warmup_lr_rate": 0.3}),
    "warmup_stable_decay": ({"num_decay_steps": 3}, {"num_decay_steps": 5, "decay_type": "linear"}),
    "polynomial": ({"power": 2.0}, {"power": 1.0, "lr_end": 1e-4}),
    "inverse_sqrt": ({"timescale": 3}, {"timescale": 7}),
}


@pytest.fixture
def make(settings, config_path):
    """A run's state without a run."""

    def make(name, *, lr=1e-2, total=10, warmup=2, extra=None, precision="fp32", **optimizer) -> RunState:
        settings["optim"] = {
            "optimizer": {"lr": lr, **optimizer},
            "scheduler": {
                "name": name,
                "num_warmup_steps": warmup,
                "num_training_steps": total,
                "scheduler_specific_kwargs": extra or {},
            },
        }
        settings["train"]["precision"] = precision
        config = load_config(config_path(settings))
        model = patch_bloom(tiny_model(), r=config.model.lora.lora_dim, scale=config.model.lora.lora_scale)
        return RunState(model, config.optim, fp16=precision == "fp16")

    return make


def move(run: RunState, steps: int, gradient: float = 1.0) -> list[float]:
    """Take ``steps`` optimizer steps, a metric schedule after each; returns the rates after them."""
    rates = []
    for _ in range(steps):
        for parameter in run.parameters:
            parameter.grad.fill_(gradient)
        run.scaler.scale(torch.ones(()))
        run.scaler.unscale_(run.optimizer)
        run.optimizer_step(4)
        run.step_on_metric(LOSSES[run.step - 1])
        rates.append(run.optimizer.param_groups[0]["lr"])
    return rates


def resumed(run: RunState, then: RunState) -> RunState:
    run.load_state_dict(then.state_dict(), then.settings)
    return run


@pytest.mark.parametrize("name", STEP_SCHEDULES)
def test_rates_of_a_schedule_of_steps_are_the_configuration_s(make, name):
    before, now = THEN_AND_NOW.get(name, ({}, {}))
    then = make(name, extra=before)
    move(then, 4)
    run = resumed(make(name, lr=3e-3, total=20, warmup=5, extra=now), then)
    # Reference: the new schedule alone, moved by as many steps.
    alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = get_scheduler(name, alone, 5, 20, dict(now))
    for _ in range(4):
        alone.step()
        schedule.step()
    for step in range(5, 11):
        assert run.optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"], step
        assert run.scheduler.get_last_lr()[0] == alone.param_groups[0]["lr"], step
        alone.step()
        schedule.step()
        move(run, 1)


@pytest.mark.parametrize("name", METRIC_SCHEDULES)
def test_a_metric_schedule_that_has_not_moved_yet_takes_the_new_rate(make, name):
    then = make(name, extra={"patience": 50})
    move(then, 3)
    run = resumed(make(name, lr=2e-3, extra={"patience": 50}), then)
    assert move(run, 1) == [pytest.approx(2e-3, rel=1e-12)]


@pytest.mark.parametrize("name", METRIC_SCHEDULES)
def test_unchanged_settings_go_on_as_if_never_interrupted(make, name):
    settings = {"patience": 0, "factor": 0.7, "cooldown": 1}
    if name == "greedy":
        settings |= {"min_lr": 1e-5, "warmup": 1, "smooth": True, "window_size": 2}
    then, whole = make(name, extra=settings), make(name, extra=settings)
    expected = move(whole, 10)
    assert len(set(expected)) > 2
    assert move(then, 5) == expected[:5]
    run = resumed(make(name, extra=settings), then)
    assert move(run, 5) == expected[5:]
    assert run.scheduler.state_dict() == whole.scheduler.state_dict()


@pytest.mark.parametrize("name", METRIC_SCHEDULES)
def test_a_rate_that_the_metric_has_moved_keeps_its_share(make, name):
    settings = {"patience": 0, "factor": 0.5} | ({"min_lr": 1e-6} if name == "greedy" else {})
    then = make(name, extra=settings)
    before = move(then, 5)[-1]
    assert before != 1e-2
    run = resumed(make(name, lr=4e-3, extra=settings), then)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(before * 0.4, rel=1e-12)


CHANGES = {
    "factor": (0.5, 0.25),
    "patience": (1, 3),
    "threshold": (0.1, 0.9),
    "threshold_mode": ("rel", "abs"),
    "mode": ("min", "max"),
    "cooldown": (0, 2),
    "eps": (1e-8, 1e-6),
    "min_lr": (1e-6, 1e-5),
    "warmup": (0, 3),
    "max_lr": (1.0, 0.5),
    "reset_start": (500, 3),
    "smooth": (False, True),
    "window_size": (50, 2),
    "verbose": (False, True),
}


@pytest.mark.parametrize(
    ("name", "key"),
    [("greedy", key) for key in CHANGES] + [("reduce_lr_on_plateau", key) for key in list(CHANGES)[:8]],
)
def test_every_setting_of_a_metric_schedule_is_the_configuration_s(make, name, key):
    was, now = ({key: value} for value in CHANGES[key])
    then = make(name, extra=was)
    move(then, 4)
    run, fresh = make(name, extra=now), make(name, extra=now)
    resumed(run, then)
    other = make(name, extra=was).scheduler.state_dict()
    new, kept, got = fresh.scheduler.state_dict(), then.scheduler.state_dict(), run.scheduler.state_dict()
    assert new != other, "the setting changes nothing"
    for state in (new, other, kept, got):
        state.pop("_last_lr")
    for entry in new:
        assert got[entry] == (kept[entry] if new[entry] == other.get(entry) else new[entry]), entry


@pytest.mark.parametrize(
    ("steps", "factor", "bound", "expected"),
    [(1, 0.1, {"max_lr": 0.02}, 0.02), (4, 0.5, {"min_lr": 8e-3}, 8e-3), (4, 0.5, {"min_lr": 0.5}, 1e-2)],
)
def test_a_rate_beyond_the_new_bounds_is_taken_to_them(make, steps, factor, bound, expected):
    settings = {"patience": 0, "factor": factor, "mode": "max", "min_lr": 1e-5}
    then = make("greedy", extra=settings)
    assert move(then, steps)[-1] == pytest.approx({1: 0.1, 4: 2.5e-3}[steps])
    run = resumed(make("greedy", extra=settings | bound), then)
    assert run.optimizer.param_groups[0]["lr"] == expected


def test_settings_of_the_optimizer_are_the_configuration_s(make):
    then = make("linear", betas=[0.9, 0.999], eps=1e-6, weight_decay=0.1)
    move(then, 3)
    run = resumed(make("linear", lr=2e-3, betas=[0.8, 0.95], eps=1e-4, weight_decay=0.5), then)
    for group in run.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-4)
        assert group["weight_decay"] == 0.5
        assert group["initial_lr"] == 2e-3
    for ours, theirs in zip(run.optimizer.state.values(), then.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("was", "now"), [("linear", "cosine"), ("linear", "greedy"), ("greedy", "constant")])
def test_another_schedule_is_refused_by_name(run, was, now):
    run(optim__scheduler__name=was, optim__scheduler__num_training_steps=2)
    with pytest.raises(UserError, match=f"optim.scheduler.name is {was} there and {now}"):
        run(optim__scheduler__name=now)


def test_a_step_that_fp16_leaves_out_is_counted_and_moves_no_schedule(make):
    then = make("linear", precision="fp16")
    rates = move(then, 3)
    assert move(then, 1, torch.inf) == rates[-1:]
    assert (then.step, then.skipped, then.position) == (4, 1, 16)
    run = resumed(make("linear", precision="fp16"), then)
    assert (run.step, run.skipped, run.scheduler.last_epoch) == (4, 1, 3)
    move(run, 1)
    assert (run.step, run.skipped, run.scheduler.last_epoch) == (5, 1, 4)


def test_metrics_tell_the_skipped_steps(run, monkeypatch):
    grow = torch.amp.GradScaler.__init__
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "__init__",
        lambda self, device, enabled: grow(
            self, device, init_scale=2.0**60, backoff_factor=2.0**-20, enabled=enabled
        ),
    )
    folder = run(train__precision="fp16", optim__scheduler__num_training_steps=6).run_dir
    skipped = [line["skipped_steps"] for line in metrics(folder)]
    assert skipped[0] == 1
    assert skipped[-1] < 6
    assert skipped == sorted(skipped)
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["scheduler"]["last_epoch"] == 6 - skipped[-1]
    assert "steps skipped" in (folder / "log").read_text()
    whole = run(train__precision="fp32", train__output_dir=f"{folder}-whole").run_dir
    assert "skipped_steps" not in (whole / "metrics.jsonl").read_text()
