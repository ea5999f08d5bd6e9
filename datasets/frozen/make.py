"""Make the frozen split of the digits again: `python -m shiftproof.datasets.frozen.make`.

The result is the same arrays on every machine; version control shows no change unless the code that draws them changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from numpy.lib.format import write_array

from shiftproof.datasets.splits import FILE, MANIFEST, draw


def freeze(folder: Path) -> None:
    """Write `digits.npz` and its manifest `digits.json` into `folder`."""
    split = draw(0)
    # Member by member: the headers that `numpy.savez` writes differ between patch versions of Python. Not compressed: what zlib
    # makes of the same bytes differs between its versions, and nearly all of it is noise.
    with ZipFile(folder / FILE, "w") as archive:
        for name, array in split.arrays().items():
            content = BytesIO()
            write_array(content, array.astype(array.dtype.newbyteorder("<")), (1, 0), allow_pickle=False)
            member = ZipInfo(f"{name}.npy")  # dated 1980
            member.create_system = 3  # as on Unix, wherever it runs
            archive.writestr(member, content.getvalue())
    manifest = {
        "file": FILE,
        "sha256": hashlib.sha256((folder / FILE).read_bytes()).hexdigest(),
        "arrays_sha256": split.sha256(),
        "made_by": "python -m shiftproof.datasets.frozen.make",
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
