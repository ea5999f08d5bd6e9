"""Plugins: found, loaded one by one, looked up; their facts kept without importing them."""

if __name__ != "shiftproof.benchmark.registry":
    raise ImportError("import this package as 'shiftproof.benchmark.registry'")
