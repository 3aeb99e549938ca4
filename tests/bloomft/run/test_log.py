"""metrics.jsonl and the trackers: a crash or a full disk costs no line but its own."""

import logging

import pytest

from bloomft.errors import UserError
from tests.bloomft.run_folder import metrics


def test_a_damaged_line_costs_itself_alone(log_at):
    damaged = [b'{"step": 2, "lo', b"\0" * 40, b"", b"[2]", b"7", b'{"step": "2"}', b"\xff\xfe", b"[" * 10**5]
    with log_at(0) as log:
        for step in range(1, 7):
            log.record(step, loss=1.0 / step)
    path = log.folder / "metrics.jsonl"
    good = path.read_bytes().splitlines()
    lines = [line for pair in zip(good, [*damaged[:5], b""], strict=True) for line in pair] + damaged[5:]
    path.write_bytes(b"\n".join(lines))  # without a line's end, as after a crash
    with log_at(5):
        pass
    assert path.read_bytes() == b"".join(line + b"\n" for line in good[:5])
    assert f"{path}: unreadable lines removed: {len(damaged) + 1}\n" in (log.folder / "log").read_text()
    before = path.stat().st_ino
    with log_at(5):
        pass
    assert path.stat().st_ino == before, "a file without a fault is not written again"


def test_a_good_last_line_without_its_end_is_kept_and_ended(log_at):
    with log_at(0) as log:
        log.record(1, loss=1.0)
    path = log.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with log_at(1) as log:
        log.record(2, loss=0.5)
    assert [line["step"] for line in metrics(log.folder)] == [1, 2]


def test_a_folder_in_the_place_of_a_file(log_at, tmp_path):
    for name in ("metrics.jsonl", "log"):
        (tmp_path / "run" / name).mkdir()
        with pytest.raises(UserError, match=rf"{name}: cannot be (read|written): Is a directory"):
            log_at(0)
        (tmp_path / "run" / name).rmdir()


def test_a_full_disk_leaves_no_half_line(log_at, monkeypatch):
    class Full:
        """The open file, on a disk with space for twenty more bytes."""

        def __init__(self, file):
            self.file, self.left = file, 20

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.left])
            self.left -= written
            return written

    with log_at(0) as log:
        log.record(1, loss=1.0)
        whole = log._metrics._file
        log._metrics._file = Full(whole)
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
            log.record(2, loss=0.5)
        assert [line["step"] for line in metrics(log.folder)] == [1]
        log._metrics._file = whole
        log.record(2, loss=0.25)
    assert [line["step"] for line in metrics(log.folder)] == [1, 2]


def test_a_line_fits_80_columns_and_the_log_file_has_all_of_it(log_at, capsys):
    values = {"loss": 11.4866, "lr": 2.12e-6, "grad_norm": 0.703, "tokens_per_second": 212345.0, "mfu": 0.29}
    with log_at(0) as log:
        log.record(3, **values)
        log.advance(3)
        log.record(4, **values, eval_loss=10.5, peak_memory_gib=3.0)
    short, long = (line for line in capsys.readouterr().err.splitlines() if line.startswith("step "))
    assert short == "step 3  loss 11.4866  lr 2.1e-06  |grad| 0.70  212,345 tok/s  MFU 29%"
    assert long.startswith("step 4  loss 11.4866  held-out 10.5000  212,345 tok/s  MFU 29%  0 s left")
    assert len(long) <= 80
    whole = (log.folder / "log").read_text().splitlines()[-1]
    assert whole.split(" ", 1)[1] == (
        "step 4  loss 11.4866  held-out 10.5000  lr 2.1e-06  |grad| 0.70  212,345 tok/s  MFU 29%"
    )


def test_the_longest_line_fits(log_at, capsys):
    with log_at(0) as log:
        log.record(10**6, loss=11.4866, eval_loss=11.4866, lr=1e-4, grad_norm=1e4, tokens_per_second=1.5e6)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("step "))
    assert len(line) <= 80
    assert line.startswith("step 1000000  loss 11.4866  held-out 11.4866")


def test_the_kernels_progress_is_shown_while_a_run_lasts(log_at, capsys):
    logger = logging.getLogger("lorakernels")
    before = logger.level, list(logger.handlers)
    with log_at(0) as log:
        logger.info("compiling %d kernels for %s", 6, "a layer")
        logger.debug("nobody's business")
    logger.warning("after the run")
    assert (logger.level, list(logger.handlers)) == before
    assert [line for line in capsys.readouterr().err.splitlines() if "layer" in line] == [
        "compiling 6 kernels for a layer"
    ]
    text = (log.folder / "log").read_text()
    assert text.endswith(" compiling 6 kernels for a layer\n")
