"""Baselines, one file a family."""

if __name__ != "shiftproof.strategies.baselines":
    raise ImportError("import this package as 'shiftproof.strategies.baselines'")
