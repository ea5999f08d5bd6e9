"""Strategies of the papers, each written as a stranger would write it."""

if __name__ != "shiftproof.plugins":
    raise ImportError("import this package as 'shiftproof.plugins'")
