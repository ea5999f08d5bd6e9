"""A stream's experts apart from the strategies that use them: made ahead, written to files, taken in from files."""

if __name__ != "shiftproof.benchmark.experts":
    raise ImportError("import this package as 'shiftproof.benchmark.experts'")
