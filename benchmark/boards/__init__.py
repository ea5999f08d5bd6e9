"""From records to boards, tables and pictures."""

if __name__ != "shiftproof.benchmark.boards":
    raise ImportError("import this package as 'shiftproof.benchmark.boards'")
