"""What a wait shows: lines off a terminal, one row each on a terminal, and how much time is left."""

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console
from transformers import BloomForCausalLM

from bloomft import export, progress, train
from bloomft.progress import duration, muted, say, waiting
from tests.bloomft.python_process import ROOT


@pytest.fixture
def hurried(monkeypatch):
    """Lines after hundredths of a second."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "POLL", 0.005)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `Task` reads; tests move them."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_short_wait_shows_nothing(capsys):
    with waiting("held-out row", 9) as wait:
        wait.advance(9)
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_where_another_process_shows_it(hurried, capsys):
    with muted(), waiting("held-out row", 40):
        say("a message")
        time.sleep(0.2)
    with muted(False):
        say("another one")
    assert capsys.readouterr().err == "another one\n"


def test_a_long_wait_shows_a_line_now_and_then(hurried, capsys):
    with waiting("held-out row", 40) as wait:
        for _ in range(40):
            time.sleep(0.02)
            wait.advance(1)
    lines = capsys.readouterr().err.splitlines()
    # after 0.05, 0.15 and 0.35 seconds, and perhaps 0.75
    assert 2 <= len(lines) <= 4
    done = [int(re.fullmatch(r"held-out row (\d+) of 40, \d+ s (left|so far)", line)[1]) for line in lines]
    assert done == sorted(set(done))


def test_a_wait_without_a_total_shows_its_time(hurried, capsys):
    with waiting("loading bloom"):
        time.sleep(0.15)
    assert capsys.readouterr().err.splitlines()[0] == "loading bloom, 0 s so far"


def test_the_innermost_wait_is_the_one_that_shows(hurried, capsys):
    with waiting("step", 10):
        with waiting("held-out row", 3):
            time.sleep(0.12)
        inner = capsys.readouterr().err
        time.sleep(0.2)
    assert inner.startswith("held-out row 0 of 3")
    assert "step" not in inner
    assert capsys.readouterr().err.startswith("step 0 of 10")


def test_nothing_is_shown_after_the_end(hurried, capsys):
    with pytest.raises(ZeroDivisionError), waiting("step", 10):
        raise ZeroDivisionError
    time.sleep(0.15)
    say("the next line")
    assert capsys.readouterr().err == "the next line\n"


def test_the_time_left_is_that_at_the_average_rate(clock):
    with waiting("step", 110, done=10) as wait:
        assert wait.words() == "step 10 of 110, 0 s so far"
        clock[0] += 30
        assert wait.words() == "step 10 of 110, 30 s so far"
        wait.update(20)
        assert wait.words() == "step 20 of 110, 4 min left"
        wait.update(60)
        assert wait.words() == "step 60 of 110, 30 s left"


def test_what_comes_before_the_first_step_says_nothing_of_the_steps_rate(clock):
    with waiting("step", 10) as steps:
        with waiting("held-out row", 4):
            clock[0] += 1000
        clock[0] += 7
        steps.update(1)
        assert steps.words() == "step 1 of 10, 63 s left"
        with waiting("held-out row", 4):
            clock[0] += 7
        assert steps.seconds_left() == pytest.approx(14 * 9)


def test_bytes_are_shown_in_megabytes():
    with waiting("tokenizing", 340_000_000, in_bytes=True) as wait:
        wait.advance(12_000_000)
        assert wait.words().startswith("tokenizing 12 of 340 MB, ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (45.4, "45 s"),
        (99, "99 s"),
        (120, "2 min"),
        (5400, "90 min"),
        (9000, "2.5 h"),
        (40 * 3600, "40 h"),
        (3.1 * 86400, "3.1 days"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_every_part_of_the_commands_that_may_last_is_a_wait(
    monkeypatch, command, settings, config_path, base_copy
):
    """With ten times the text, or a larger base, each of them takes more than 5 seconds."""
    begun, showing = [], progress.Task.__init__

    def note(task, text, *arguments):
        begun.append((text, arguments[0]))
        showing(task, text, *arguments)

    monkeypatch.setattr(progress.Task, "__init__", note)
    model = BloomForCausalLM.from_pretrained(base_copy)
    model.bfloat16().save_pretrained(base_copy)
    settings["model"]["transformer"]["pretrained_model_name_or_path"] = str(base_copy)
    settings["train"]["precision"] = "bf16"
    path = config_path(settings)
    assert command(train, path)[0] == 0
    loading = [f"loading {base_copy}", "identifying the base,", "preparing the base,"]
    data = ["reading the text,", "tokenizing", "looking for equal documents", "cutting rows"]
    # the rate of products, the base's loss, the layers' kernels, the losses of step 6 and the last one
    kernels = "measuring kernels"
    loop = ["step", kernels, "held-out row", kernels, "held-out row", "held-out row"]
    assert [text for text, _ in begun] == [*loading, *data, *loop]
    known = {text for text, total in begun if total}
    assert known == {loading[1], loading[2], data[0], data[1], "step", "held-out row"}
    begun.clear()
    assert command(export, path, "last.ckpt")[0] == 0
    merging = ["held-out row", "merging", "held-out row", "row of plain transformers"]
    assert [text for text, _ in begun] == [
        *loading,
        data[0],
        *data[2:],
        *merging,
        f"writing {settings['train']['output_dir']}/merged",
    ]


TERMINAL = """
import time
from bloomft.progress import waiting, say
with waiting("step", 5000) as steps:
    steps.update(1234)
    steps.status = "loss 11.4866  212,345 tok/s  MFU 29%"
    say("a line above")
    with waiting("held-out row", 900) as rows:
        rows.update(120)
        time.sleep(0.4)
"""


def test_bars_on_a_terminal_of_80_columns():
    outer, inner = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], env=environment, stdout=inner, stderr=inner)
    os.close(inner)
    shown = b""
    try:
        while piece := os.read(outer, 4096):
            shown += piece
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    rows = [row.strip() for row in re.split(r"[\r\n]+", text)]
    assert "a line above" in rows
    assert any(
        re.fullmatch(r"\S+ step 1234 of 5000, \d+ s left  loss 11.4866  212,345 tok/s .*", row)
        for row in rows
    )
    assert any(re.fullmatch(r"\S+ held-out row 120 of 900, \d+ s left", row) for row in rows)
    assert max(map(len, rows)) <= 80


def test_a_line_of_any_length_is_one_line(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=output, width=40))
    say("[red] " + "x" * 200)
    assert output.getvalue() == "[red] " + "x" * 200 + "\n"
