"""SHA-256 of the inputs in a child process, which works while this one imports torch and then merges.

A thread would not do: it waits for the interpreter's lock after every chunk, and imports hold that for long. The child runs
this file as a script, so nothing but the standard library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

CHUNK = 1 << 20  # bytes; stays in the second-level cache between being read and being hashed


class Hashing:
    """Hashes files from its construction on. Leaving the context ends the child, be it done or not.

    Args:
        files: To be hashed, in this order.
        threads: Files at a time.
    """

    def __init__(self, files: Sequence[Path], threads: int = 1) -> None:
        self.files = tuple(files)
        command = [sys.executable, "-I", __file__, str(threads), *(str(file.resolve()) for file in files)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def result(self) -> dict[Path, str]:
        """Hexadecimal SHA-256 of every file, as `sha256sum` prints it; waits for the child.

        Raises:
            OSError: If a file could not be read.
        """
        printed, _ = self._child.communicate()
        if self._child.returncode != 0:
            raise OSError(f"the inputs could not be hashed, exit status {self._child.returncode}")
        digests: list[str] = json.loads(printed)
        return dict(zip(self.files, digests, strict=True))


def sha256_of(path: str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest, chunk = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(chunk)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(view[:count])
    return digest.hexdigest()


def main(threads: str, *paths: str) -> None:
    """Print the hashes as a JSON list."""
    with ThreadPoolExecutor(int(threads)) as pool:
        print(json.dumps(list(pool.map(sha256_of, paths))))


if __name__ == "__main__":
    main(*sys.argv[1:])
