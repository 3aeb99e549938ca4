"""Which base something was trained on: stored with it, and checked before the two are combined."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from bloomft.config.keys import TransformerConfig
from bloomft.errors import UserError

EXPORT_MARK = "bloomft_export.json"
_NAMES = ("name", "revision", "subfolder")


def base_identity(transformer: TransformerConfig, fingerprint: str) -> dict[str, str | None]:
    """What checkpoints and exports remember of their base: name, revision, subfolder and fingerprint."""
    names = (transformer.pretrained_model_name_or_path, transformer.revision, transformer.subfolder)
    return dict(zip(_NAMES, names, strict=True)) | {"fingerprint": fingerprint}


def check_base(known: Mapping[str, str | None], here: Mapping[str, str | None], path: Path) -> None:
    """Raise `UserError` unless the base ``known``, which ``path`` holds, is the one ``here``, by fingerprint.

    Names alone neither pass nor fail: a folder moves, and a branch of the hub gets other weights.
    """
    if len(known["fingerprint"] or "") != len(here["fingerprint"] or ""):
        raise UserError(
            f"{path}: identifies its base by a sample of the weights only, as earlier versions did; "
            "train.resume=never starts anew"
        )
    if known["fingerprint"] != here["fingerprint"]:
        raise UserError(
            f"{path}: trained on the base model {_describe(known)}, but {_describe(here)} is a different one"
        )


def check_adapter_base(folder: Path, here: Mapping[str, str | None]) -> str | None:
    """As `check_base` for a folder with an adapter; returns a line to print where the base is not known.

    It is not known for adapters written by other programs.
    """
    if (known := _exported_base(folder)) is not None:
        check_base(known, here, folder)
        return None
    said = _named_base(folder)
    same = f"not checked that {here['name']} has the same weights"
    return f"{folder}: made for {said}, without a fingerprint: {same}"


def refuse_adapter_alone(folder: Path) -> None:
    """Raise `UserError` for a folder that holds an adapter without its base.

    The base is not loaded by the name that the folder gives: that may be a path of another machine, or a
    model of the hub that nobody asked for.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        known = _exported_base(folder)
        said = _named_base(folder) if known is None else _describe(known)
        raise UserError(
            f"{folder}: an adapter without its base, {said}; give the configuration that names the base "
            f"before it: CONFIG {folder}"
        )


def check_merged_base(folder: Path, transformer: TransformerConfig) -> None:
    """Raise `UserError` if a folder that export wrote was merged into a base other than the configuration's.

    By name, revision and subfolder: the weights of the base are not available, only the merged ones.
    """
    known = _exported_base(folder)
    here = base_identity(transformer, "")
    if known is not None and any(_expanded(known.get(key)) != _expanded(here[key]) for key in _NAMES):
        raise UserError(
            f"{folder}: merged into the base model {_describe(known)}, the configuration names "
            f"{_describe(here)}; give the folder alone to use it as it is"
        )


def _exported_base(folder: Path) -> Mapping[str, str | None] | None:
    """The identity in the file that export leaves in ``folder``, None where there is no such file."""
    path = folder / EXPORT_MARK
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["base"]
        if not all(isinstance(known[key], str) for key in ("name", "fingerprint")):
            raise TypeError("name and fingerprint are not both strings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return known


def _named_base(folder: Path) -> str:
    """What ``adapter_config.json`` says of the base, in words."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return _describe({"name": config["base_model_name_or_path"], "revision": config.get("revision")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "an unnamed base"


def _expanded(name: str | None) -> str | None:
    folder = os.path.expanduser(name or "")
    return os.path.realpath(folder) if os.path.isdir(folder) else name


def _describe(identity: Mapping[str, str | None]) -> str:
    more = [f"{key} {identity[key]}" for key in ("revision", "subfolder") if identity.get(key)]
    if fingerprint := identity.get("fingerprint"):
        more.append(fingerprint[:8])
    return f"{identity['name']} ({', '.join(more)})" if more else f"{identity['name']}"
