"""Merging named tensors: what a method is, and how it is carried out in memory and on disk."""

if __name__ != "shiftproof.benchmark.merging":
    raise ImportError("import this package as 'shiftproof.benchmark.merging'")
