"""The files of a base model: where they are, whether they are complete, and a hash of their content."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM
from transformers.utils import cached_file

from bloomft.errors import UserError
from bloomft.files import make_folder, write_atomically
from bloomft.progress import waiting

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Hashing fewer bytes than this is too fast for caching the result to pay off.
REMEMBERED_FROM = 2**28

# By their names in a safetensors header.
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

# The head, which older files store beside the embedding that it is.
_TIED = "transformer.lm_head.weight"

# What changes the model's function in addition to its tensors.
_ARCHITECTURE = ("n_head", "layer_norm_epsilon", "apply_residual_connection_post_layernorm")


def weight_files(location: str, options: dict[str, Any]) -> list[Path]:
    """The ``*.safetensors`` files of a folder or hub model, downloaded if need be.

    ``options`` go to the hub. Raises `UserError` for a model that has no such files.
    """
    optional = {**options, "_raise_exceptions_for_missing_entries": False}
    if found := cached_file(location, WEIGHTS, **optional):
        return [Path(found)]
    if not (index := cached_file(location, INDEX, **optional)):
        raise UserError(
            f"{location}: has no {WEIGHTS}; weights in other files, such as pytorch_model.bin, are not read: "
            "convert them with BloomForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [base_file(location, name, options) for name in names]


def base_file(location: str, name: str, options: dict[str, Any]) -> Path:
    """One file of a folder or hub model, downloaded if need be; ``options`` go to the hub.

    Raises OSError where it is missing.
    """
    if (found := cached_file(location, name, **options)) is None:
        raise FileNotFoundError(f"{location}: has no {name}")
    return Path(found)


def check_tensors(files: Sequence[Path], config: BloomConfig) -> set[torch.dtype]:
    """The dtypes that a base's tensors are stored in, whatever ``config`` says; the shapes must match it.

    Reads headers only. Missing and unexpected tensors are found when the model is loaded. Raises `UserError`
    for a tensor of another shape or of a dtype that is not in `_DTYPES`.
    """
    stored = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                part = tensors.get_slice(name)
                stored[name.removeprefix("transformer.")] = part.get_shape(), part.get_dtype(), file
    layers = {int(match[1]) for name in stored if (match := re.match(r"h\.(\d+)\.", name))}
    if layers and len(layers) != config.n_layer:
        raise UserError(
            f"{files[0]}: {len(layers)} layers are stored, but config.json has n_layer {config.n_layer}"
        )
    with torch.device("meta"):
        expected = BloomForCausalLM(config).state_dict()
    dtypes = set()
    for name, value in expected.items():
        if (found := stored.get(name.removeprefix("transformer."))) is None:
            continue
        shape, dtype, file = found
        if shape != list(value.shape):
            raise UserError(f"{file}: {name} has shape {shape}, by config.json it is {list(value.shape)}")
        if dtype not in _DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}; only {', '.join(_DTYPES)} are read")
        dtypes.add(_DTYPES[dtype])
    return dtypes


def damaged_file(folder: Path) -> str | None:
    """The first ``*.json`` in ``folder`` that is not a JSON object, and why; None where all are."""
    for path in sorted(folder.glob("*.json")):
        try:
            kind = type(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path}: not readable as JSON: {error}"
        if kind is not dict:
            return f"{path}: a JSON {kind.__name__}, not an object"
    return None


class StoredTensors:
    """The tensors of a base, read from its ``files`` by the names that they have in the model.

    A file is opened for each of them: the pages of an open one would count as this process's memory. Raises
    `UserError` where that fails, or where the file is another one than at the start.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        self._states: dict[Path, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as tensors:
                self._states[file] = _state(file)
                for name in tensors.keys():  # noqa: SIM118, not a mapping
                    self._places[f"transformer.{name.removeprefix('transformer.')}"] = file, name

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows ``first`` to ``last``, or to the end, of one tensor on the CPU, mapped from its file."""
        file, stored_name = self._places[name]
        with _opened(file) as tensors:
            if _state(file) != self._states[file]:
                raise UserError(f"{file}: was changed while it was read")
            return tensors.get_slice(stored_name)[first:last]

    def check_complete(self, model: BloomForCausalLM, where: Path) -> None:
        """Raise `UserError`, naming ``where``, unless they are exactly the parameters of ``model``."""
        names = {name for name, _ in model.named_parameters()}
        check_complete(names - self._places.keys(), self._places.keys() - names - {_TIED}, where)


def check_complete(missing: Collection[str], unexpected: Collection[str], where: Path) -> None:
    """Raise `UserError`, naming ``where``, for tensors that a base lacks or that are not BLOOM's."""
    for verb, names in (("lacks", missing), ("has an unexpected", unexpected)):
        if names:
            raise UserError(f"{where}: {verb} {min(names)} ({len(names)} such tensors)")


def fingerprint(model: BloomForCausalLM, files: Sequence[Path] = ()) -> str:
    """40 hexadecimal digits: a hash of every byte of every parameter, and of `_ARCHITECTURE`.

    Take it in the stored dtype, before any cast; a parameter on the meta device is read from ``files``. It
    does not depend on how the tensors are spread over files.
    """
    names, parameters = zip(*sorted(model.named_parameters()), strict=True)
    stored = StoredTensors(files) if any(parameter.is_meta for parameter in parameters) else None

    def content(name: str, parameter: Tensor) -> bytes:
        if stored is not None and parameter.is_meta:
            parameter = stored.read(name).to(parameter.dtype)
        return _hash(parameter)

    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr([getattr(model.config, key) for key in _ARCHITECTURE]).encode())
    size = sum(parameter.nbytes for parameter in parameters)
    with ThreadPoolExecutor() as pool, waiting("identifying the base,", size, in_bytes=True) as wait:
        hashes = pool.map(content, names, parameters)
        for name, parameter, hashed in zip(names, parameters, hashes, strict=True):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode() + hashed)
            wait.advance(parameter.nbytes)
    return digest.hexdigest()


def remembered_fingerprint(model: BloomForCausalLM, files: Sequence[Path], cache_dir: Path) -> str:
    """`fingerprint`, computed once for ``files`` of the same paths, sizes and times, cached in ``cache_dir``.

    ``files`` are what ``model`` was loaded from. A cache that cannot be written is ignored.
    """
    states = [(str(path.resolve()), path.stat()) for path in files]
    if sum(state.st_size for _, state in states) < REMEMBERED_FROM:
        return fingerprint(model, files)
    architecture = [getattr(model.config, key) for key in _ARCHITECTURE]
    identity = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in states]
    key = hashlib.blake2b(
        repr((identity, architecture, str(model.dtype))).encode(), digest_size=16
    ).hexdigest()
    path = cache_dir / f"fingerprint-{key}"
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{40}", known := path.read_text()):
            return known
    made = fingerprint(model, files)
    # A file that was just written may be written again within the same tick of the file system's clock.
    if time.time() - max(state.st_mtime for _, state in states) > 2:
        with contextlib.suppress(UserError):
            make_folder(cache_dir)
            write_atomically(path, made.encode())
    return made


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file; `UserError` where it cannot be read."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _state(file: Path) -> tuple[int, ...]:
    """What differs once another file has taken this one's place, or its content has changed."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _hash(parameter: Tensor) -> bytes:
    content = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=20).digest()
