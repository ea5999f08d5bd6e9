"""From a suite to finished cells."""

if __name__ != "shiftproof.benchmark.running":
    raise ImportError("import this package as 'shiftproof.benchmark.running'")
