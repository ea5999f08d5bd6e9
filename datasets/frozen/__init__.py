"""Frozen splits: index files with their hashes."""

if __name__ != "shiftproof.datasets.frozen":
    raise ImportError("import this package as 'shiftproof.datasets.frozen'")
