"""Where a number came from: code, packages, machine. Never a path, a user or a host."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("shiftproof", "torch", "torchvision", "numpy", "scikit-learn", "scipy", "faiss-cpu", "faiss-gpu", "avalanche-lib")


class Provenance:
    """Taken when a cell starts, completed when it ends.

    Args:
        module: Of the strategy; its checkout is the commit that counts.
        command: What the user typed.
    """

    def __init__(self, module: str, command: str) -> None:
        self.module = module
        self.command = command
        self.started = _now()

    def block(self, attempts: int, resumed_from: list[int]) -> dict[str, Any]:
        """The `provenance` block of a record."""
        commit, dirty = _git(self.module)
        return {
            "command": self.command,
            "git_commit": commit,
            "git_dirty": dirty,
            "packages": _packages(),
            "python": platform.python_version(),
            "hardware": _hardware(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled() or not torch.cuda.is_initialized(),
            "started": self.started,
            "finished": _now(),
            "attempts": attempts,
            "resumed_from": resumed_from,
        }


def command_line(arguments: list[str]) -> str:
    """What was typed, with every path reduced to its last part.

    >>> command_line(["/somewhere/bin/shiftproof", "run", "quick", "--out=/data/my name/runs/"])
    'shiftproof run quick --out=runs'
    """
    return " ".join("=".join(map(_last_part, argument.split("="))) for argument in arguments)


def without_paths(text: str) -> str:
    """A message in which every absolute path is reduced to its last part.

    >>> without_paths("No such file: '/data/my name/x.npz', see /data/me/log.txt:3")
    "No such file: 'x.npz', see log.txt:3"
    """
    text = re.sub(rf"(['\"`])({_ROOT}[^'\"`\n]*)\1", lambda found: found[1] + _last_part(found[2]) + found[1], text)
    return re.sub(rf"(?<![^\s='\"`(\[{{,;<:]){_ROOT}[^\s'\"`()\[\]{{}},;<>:]*", lambda found: _last_part(found[0]), text)


_ROOT = r"(?:~[\w.-]*/|(?:///|/)(?=[\w.~])|[A-Za-z]:[\\/]|\\\\(?=\w))"  # what an absolute path begins with


def _last_part(path: str) -> str:
    if os.path.expanduser(path).rstrip("/\\") == os.path.expanduser("~"):
        return "~"  # its last part is the user's name
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def peak_memory_mb(device: torch.device) -> float:
    """Largest resident set of this process so far, or largest allocation on the GPU, in MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu(), "cores": torch.multiprocessing.cpu_count(), "gpu": gpu}


def _cpu() -> str:
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return str(models[0]) if models else platform.processor() or platform.machine()


@cache
def _git(module: str) -> tuple[str | None, bool | None]:
    """Commit of the checkout that holds the module, and whether tracked files differ from it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file:
        return None, None
    path = Path(file).resolve()
    folder = path.parent
    commit = _output(folder, "rev-parse", "HEAD")
    if commit is None or _output(folder, "ls-files", "--error-unmatch", path.name) is None:
        return None, None
    return commit, bool(_output(folder, "status", "--porcelain", "--untracked-files=no"))


def _output(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
