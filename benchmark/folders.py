"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """`SHIFTPROOF_CACHE`, or the user's cache folder on this system."""
    named = os.environ.get("SHIFTPROOF_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("shiftproof"))
