"""Text to pre-train the embedded base on: documentation, READMEs and docstrings under permissive licences.

Three kinds of source: documentation packages of Debian (HTML to Markdown), READMEs of packages on PyPI, and
docstrings with their signatures of the standard library and of the distributions installed here. Whatever
shares eight words in a row with a README installed here is left out, paragraph by paragraph: those READMEs
are what the demo trains on and measures its loss on.
"""

import ast
import hashlib
import importlib.metadata
import io
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from bloomft.data.documents import installed_readmes
from bloomft.errors import UserError
from pretraining.markdown_pages import html_to_markdown
from pretraining.packages import DEBIAN_PACKAGES, README_PACKAGES

README_REPEATS = 4  # how often a README of PyPI is read in one pass; there are few
DISTRIBUTION_LIMIT = 500_000  # characters of docstrings of one distribution
SHARED_WORDS = 8  # a paragraph with so many words in a row of an installed README is left out
SAME_START = 6  # paragraphs of docstrings that begin with the same five words

# Debian's names, PyPI's classifiers and SPDX's; GAP (all-permissive) covers packaging files of one package.
_PERMISSIVE = re.compile(
    r"Expat|MIT(/X11| License)?|ISC( License)?( \(ISCL\))?|GAP"
    r"|(\w+-)?BSD([- ]?\d([- ][Cc]lause)?)?( License)?"
    r"|Apache([- ]?2(\.0)?)?( Software)?( License( 2\.0)?)?"
    r"|PSF(L|-2(\.0)?|-baseconv)?|Python-2\.0|Python Software Foundation License"
)
_LEFT_OUT_PAGES = re.compile(
    r"genindex|search\.html|py-modindex|/_modules/|/_static/|/releases?/|/c-api/|changelog|changes|history|news|"
    r"copyright|license|contents\.html|authors",
    re.IGNORECASE,
)
_LEFT_OUT_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "idle_test", "lib2to3"}
_LEFT_OUT_FOLDERS |= {"site-packages", "dist-packages", "__pycache__"}


@dataclass
class Corpus:
    """Texts, in an order that only the seed decides, and where they come from.

    ``sources``: for each a name, a version, a licence and the number of characters taken.
    """

    texts: list[str] = field(default_factory=list)
    sources: list[dict[str, str | int]] = field(default_factory=list)


def collect(downloads: Path, seed: int) -> Corpus:
    """Read every source; ``downloads`` holds or receives the packages of Debian and PyPI.

    Raises `UserError` when a package can be neither found there nor downloaded, or is not permissive.
    """
    corpus = Corpus()
    cleaner = _Cleaner(installed_readmes())
    for name in DEBIAN_PACKAGES:
        package = _downloaded(downloads, f"{name}_*.deb", ["apt-get", "download", "-qq", name])
        licence, pages = _debian_pages(package)
        _add(corpus, name, package.name.split("_")[1], licence, (cleaner.clean(page) for page in pages))
    own = {_normal_name(d.name) for d in importlib.metadata.distributions()}
    for name in README_PACKAGES:
        if name in own:
            continue
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        stem = re.sub("[-_.]", "[-_.]", name)
        wheel = _downloaded(downloads, f"{stem}-*.whl", [*command, "--dest", ".", name])
        with zipfile.ZipFile(wheel) as archive:
            path = next(path for path in archive.namelist() if path.endswith(".dist-info/METADATA"))
            message = HeaderParser().parsestr(archive.read(path).decode())
        licence = permissive_licence(message)
        if licence is None:
            raise UserError(f"{name}: its licence is not among the permissive ones")
        text = cleaner.clean(str(message.get_payload()))
        _add(corpus, f"README of {name}", message["Version"], licence, [text] * README_REPEATS)
    texts = map(cleaner.clean_docstrings, _docstrings(Path(sysconfig.get_path("stdlib"))))
    _add(corpus, "standard library", sys.version.split()[0], "PSF-2.0", texts)
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: _normal_name(d.name)):
        licence = permissive_licence(distribution.metadata)
        if licence is None or distribution.name in ("bloomft", "pip"):
            continue
        texts = map(cleaner.clean_docstrings, _distribution_docstrings(distribution))
        _add(corpus, distribution.name, distribution.version, licence, _limited(texts))
    random.Random(seed).shuffle(corpus.texts)
    return corpus


def permissive_licence(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """The licence that the metadata states, or None unless all of it is MIT, BSD, Apache, PSF or ISC."""
    expression = re.sub(r"[()]", "", metadata.get("License-Expression") or "")
    stated = re.split(r"\s+(?:AND|OR|WITH)\s+", expression)
    if stated == [""]:
        stated = [
            line.split(" :: ")[-1]
            for line in metadata.get_all("Classifier") or []
            if line.startswith("License :: OSI Approved :: ")
        ]
    if not stated:
        stated = [metadata.get("License") or ""]
    return ", ".join(stated) if all(map(_PERMISSIVE.fullmatch, stated)) else None


def _normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class _Cleaner:
    """Leaves out paragraphs that were there before, or that the READMEs installed here have."""

    def __init__(self, readmes: Iterable[str]) -> None:
        self._held_out = {shingle for text in readmes for shingle in _shingles(text)}
        self._seen: set[bytes] = set()
        self._starts: Counter[tuple[str, ...]] = Counter()

    def clean(self, text: str) -> str:
        """``text`` without repeated and held-out paragraphs."""
        return "\n\n".join(part for part in _paragraphs(text) if self._is_new(part))

    def clean_docstrings(self, text: str) -> str:
        """As `clean`, and of paragraphs that begin alike only the first few."""
        kept = []
        for part in _paragraphs(text):
            start = tuple(_words(part)[:5])
            self._starts[start] += 1
            if self._starts[start] <= SAME_START and self._is_new(part):
                kept.append(part)
        return "\n\n".join(kept)

    def _is_new(self, paragraph: str) -> bool:
        words = _words(paragraph)
        if len(words) < 4:
            return True
        key = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
        if key in self._seen or not self._held_out.isdisjoint(_shingles(paragraph)):
            return False
        self._seen.add(key)
        return True


def _paragraphs(text: str) -> Iterator[str]:
    """Parts between blank lines; a fenced block is one part."""
    part: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.strip() or fenced:
            part.append(line.rstrip())
        elif part:
            yield "\n".join(part)
            part = []
    if part:
        yield "\n".join(part)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _shingles(text: str) -> Iterator[int]:
    words = _words(text)
    for index in range(len(words) - SHARED_WORDS + 1):
        yield zlib.crc32(" ".join(words[index : index + SHARED_WORDS]).encode())


def _add(corpus: Corpus, name: str, version: str, licence: str, texts: Iterable[str]) -> None:
    kept = [text for text in texts if len(text) > 200]
    corpus.texts += kept
    if kept:
        corpus.sources.append(
            {"name": name, "version": version, "licence": licence, "characters": sum(map(len, kept))}
        )


def _limited(texts: Iterable[str]) -> Iterator[str]:
    left = DISTRIBUTION_LIMIT
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def _downloaded(folder: Path, pattern: str, command: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(pattern))):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if not (found := sorted(folder.glob(pattern))):
            raise UserError(f"{' '.join(command)}: failed: {result.stderr.strip().splitlines()[-1:]}")
    return found[-1]


def _debian_pages(package: Path) -> tuple[str, Iterator[str]]:
    """Licence and pages of a documentation package: Markdown of its HTML; of one in four its reST source."""
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True)
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content.stdout)) as archive:
        for member in archive:
            is_page = member.name.endswith((".html", ".rst.txt")) and not _LEFT_OUT_PAGES.search(member.name)
            if member.isfile() and (is_page or member.name.endswith("/copyright")):
                files[member.name] = archive.extractfile(member).read().decode(errors="replace")
    rights = next(text for name, text in files.items() if name.endswith("/copyright"))
    licences = sorted(set(re.findall(r"^License: *(\S.*?) *$", rights, re.MULTILINE)))
    if package.name.startswith("python3.11-doc"):
        licences = ["PSF-2.0"]  # its copyright file has no short names
    names = [part for licence in licences for part in re.split(r" (?:or|and) ", licence)]
    if bad := [name for name in names if not _PERMISSIVE.fullmatch(name)]:
        raise UserError(f"{package.name}: its licence {bad[0]!r} is not among the permissive ones")
    return ", ".join(licences), _pages(files)


def _pages(files: dict[str, str]) -> Iterator[str]:
    for name in sorted(files):
        if not name.endswith(".html"):
            continue
        stem = name.removesuffix(".html").replace("/html/", "/html/_sources/")
        source = files.get(f"{stem}.rst.txt")
        if source is not None and zlib.crc32(name.encode()) % 4 == 0:
            yield source
        else:
            yield html_to_markdown(files[name])


def _distribution_docstrings(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    for path in sorted(distribution.files or [], key=lambda path: zlib.crc32(str(path).encode())):
        if path.suffix == ".py" and not _LEFT_OUT_FOLDERS.intersection(path.parts):
            yield from _module_docstrings(Path(str(distribution.locate_file(path))))


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if not _LEFT_OUT_FOLDERS.intersection(path.relative_to(folder).parts):
            yield from _module_docstrings(path)


def _module_docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one module as one text, each function's and class's under its signature."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    if parts := list(_documented(tree)):
        yield "\n\n".join(parts)


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and len(text) > 30 and text.isascii():
        if isinstance(node, ast.Module):
            yield text
        else:
            yield _signature(node) + '\n    """' + text.replace("\n", "\n    ") + '\n    """'
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    # Annotations and long lists of parameters tell a small model little.
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    shown = names[:6] + ["**kwargs"] * (len(names) > 6)
    return f"def {node.name}({', '.join(shown)}):"
