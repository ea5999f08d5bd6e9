"""Looking at experts and at what lies between them: overlap, energy, sweeps and barriers."""

if __name__ != "shiftproof.benchmark.analysis":
    raise ImportError("import this package as 'shiftproof.benchmark.analysis'")
