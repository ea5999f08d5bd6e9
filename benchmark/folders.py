"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; where the system refuses to look, as at a name that is too long, there is none."""
    return os.path.isdir(path)  # Path.is_dir raises


def cache_folder() -> Path:
    """`SHIFTPROOF_CACHE`, or the user's cache folder on this system."""
    named = os.environ.get("SHIFTPROOF_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("shiftproof"))
