"""The fingerprint of a base: of its every byte, and remembered until a file changes."""

import os
import shutil
import time

import torch
from transformers import BloomForCausalLM

from bloomft.model import base_files
from bloomft.model.base_files import fingerprint, remembered_fingerprint
from tests.bloomft.conftest import tiny_model


def test_every_byte_is_in_the_fingerprint():
    model = tiny_model()
    before = fingerprint(model, [])
    assert fingerprint(tiny_model(), []) == before
    for parameter in model.parameters():
        middle = (
            parameter.detach().view(-1).view(torch.int32)[parameter.numel() // 3 : parameter.numel() // 3 + 1]
        )
        middle ^= 1
        assert fingerprint(model, []) != before
        middle ^= 1
    assert fingerprint(model, []) == before
    model.config.layer_norm_epsilon *= 2
    assert fingerprint(model, []) != before


def test_every_dtype_has_a_fingerprint_of_its_own():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert len({fingerprint(tiny_model().to(dtype), []) for dtype in dtypes}) == len(dtypes)


def test_a_fingerprint_is_remembered_until_a_file_changes(base_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(base_files, "REMEMBERED_FROM", 0)
    made = []
    real = base_files.fingerprint
    monkeypatch.setattr(base_files, "fingerprint", lambda *given: made.append(1) or real(*given))
    file, cache = base_copy / "model.safetensors", tmp_path / "cache"
    model = BloomForCausalLM.from_pretrained(base_copy)

    def again() -> tuple[str, int]:
        made.clear()
        return remembered_fingerprint(model, [file], cache), len(made)

    long_ago, soon = (time.time_ns() + seconds * 10**9 for seconds in (-10, 1000))
    os.utime(file, ns=(soon, soon))
    assert again() == (real(model, []), 1)
    assert again() == (real(model, []), 1), "a file written this very moment may change unseen"
    os.utime(file, ns=(long_ago, long_ago))
    assert [again(), again(), again()] == [(real(model, []), 1), (real(model, []), 0), (real(model, []), 0)]
    next(cache.iterdir()).write_text("damaged")
    assert [again()[1], again()[1]] == [1, 0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(long_ago, long_ago))
    model = BloomForCausalLM.from_pretrained(base_copy)
    assert again() == (real(model, []), 1), "same path, size and modification time, other bytes"
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert again() == (real(model, []), 1)
