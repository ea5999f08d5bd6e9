"""The command line."""

if __name__ != "shiftproof.benchmark.cli":
    raise ImportError("import this package as 'shiftproof.benchmark.cli'")
