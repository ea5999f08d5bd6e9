"""`shiftproof doctor`: everything that a run depends on, looked at one thing at a time."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.folders import cache_folder
from shiftproof.benchmark.registry.catalogue import read_catalogue
from shiftproof.benchmark.registry.loading import one_line

PACKAGES = ("shiftproof", "torch", "torchvision", "numpy", "scikit-learn", "avalanche-lib")
LEAST_PYTHON = (3, 11)
LEAST_FREE = 2 * 2**30  # bytes below which a cache of bases and features may fill the disk


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if it is not well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    detail: str


def examine() -> list[Finding]:
    """Every finding, in a fixed order."""
    return [python(), *packages(), torch_pair(), threads(), faiss(), gpu(), cache(), *plugins()]


def python() -> Finding:
    """The interpreter."""
    found = platform.python_version()
    if tuple(int(part) for part in platform.python_version_tuple()[:2]) < LEAST_PYTHON:
        return Finding("python", "fail", f"expected 3.11 or newer, got {found}")
    return Finding("python", "ok", found)


def packages() -> Iterator[Finding]:
    """Versions of the main packages."""
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "fail", f"not installed; pip install {name}")


def torch_pair() -> Finding:
    """Whether torch and torchvision were built for each other: a torchvision from the index fails beside a `+cpu` torch."""
    try:
        import torch
        import torchvision  # noqa: F401  # registers its operators, which is what fails
    except (ImportError, RuntimeError) as error:
        advice = "install both from one place, for example pip install --force-reinstall torch torchvision"
        return Finding("torch with torchvision", "fail", f"{one_line(error)}; {advice}")
    return Finding("torch with torchvision", "ok", f"operators of both load, torch built for {torch.version.cuda or 'cpu'}")


def threads() -> Finding:
    """Threads of this process and what the environment says; workers take one each."""
    import torch

    named = os.environ.get("OMP_NUM_THREADS", "not set")
    return Finding("threads", "ok", f"{os.cpu_count()} cores, torch {torch.get_num_threads()}, OMP_NUM_THREADS {named}")


def faiss() -> Finding:
    """k-means goes through faiss; without it scikit-learn does the work."""
    if find_spec("faiss") is None:
        return Finding("faiss", "warn", "not installed, clustering uses scikit-learn; pip install faiss-cpu")
    return Finding("faiss", "ok", "present")


def gpu() -> Finding:
    """The GPUs, if there are any."""
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "ok", "none; runs use the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", ", ".join(names))


def cache() -> Finding:
    """Where bases, features and the catalogue are kept, how much is there, and whether it can be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")
    except OSError as error:
        detail = f"expected a folder that can be written, got {folder}: {error.strerror}; name another one in SHIFTPROOF_CACHE"
        return Finding("cache folder", "fail", detail)
    free = shutil.disk_usage(folder).free
    detail = f"{folder}: {_size(_used(folder))} used, {_size(free)} free"
    return Finding("cache folder", "ok" if free >= LEAST_FREE else "warn", detail)


def plugins() -> list[Finding]:
    """Plugins that do not load, and names that two of them contribute."""
    try:
        known = read_catalogue()
    except InputError as error:  # no cache folder, or a name in SHIFTPROOF_PLUGINS that is not installed
        return [Finding("plugins", "fail", str(error))]
    findings = [Finding(f"plugin {name}", "warn", error) for name, error in known.broken.items()]
    findings += [Finding("plugins", "fail", line) for line in known.conflicts()]
    return findings or [Finding("plugins", "ok", f"{len(known.plugins)} load")]


def _used(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one.

    >>> _size(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
