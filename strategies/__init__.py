"""Base classes and shared parts for authors of strategies, and the baselines."""

if __name__ != "shiftproof.strategies":
    raise ImportError("import this package as 'shiftproof.strategies'")
