"""Make the frozen split of the digits again: `python -m shiftproof.datasets.frozen.make`.

The result is the same arrays on every machine; version control shows no change unless the code that draws them changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shiftproof.datasets.splits import FILE, MANIFEST, draw


def freeze(folder: Path) -> None:
    """Write `digits.npz` and its manifest `digits.json` into `folder`."""
    split = draw(0)
    # Not compressed: what zlib makes of the same bytes differs between its versions, and nearly all of it is noise.
    arrays: dict[str, Any] = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in split.arrays().items()}
    np.savez(folder / FILE, **arrays)
    content = (folder / FILE).read_bytes()
    manifest = {
        "file": FILE,
        "sha256": hashlib.sha256(content).hexdigest(),
        "arrays_sha256": split.sha256(),
        "made_by": "python -m shiftproof.datasets.frozen.make",
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
