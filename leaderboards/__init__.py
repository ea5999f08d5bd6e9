"""Boards, records and the schema of both."""

if __name__ != "shiftproof.leaderboards":
    raise ImportError("import this package as 'shiftproof.leaderboards'")
