"""A board as text: CSV with every number, Markdown and LaTeX and terminal tables with what a reader needs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from shiftproof.benchmark.errors import InputError

ORDER = ("average", "worst", "forgetting")  # of the columns; other primary metrics follow by name
RANKED_BY = "worst"
MISSING = "–"
NAME_WIDTH = 28  # of 100 columns

Block = Mapping[str, Any]


def render(board: Block, format: str) -> str:
    """A board as text that ends in a line break.

    Args:
        board: As built or read.
        format: "csv" (all metrics, values as stored), "markdown" or "latex" (primary metrics, in percent).

    Raises:
        InputError: If the format is unknown.
    """
    if format not in _FORMATS:
        raise InputError(f"expected a format out of {', '.join(_FORMATS)}, got {format!r}")
    return _FORMATS[format](printable(board))


def table(board: Block) -> list[Table]:
    """One table a section for `rich` to print; each fits into 100 columns."""
    shown = printable(board)
    return [_rich(shown, section) for section in shown["sections"]]


def display_name(row: Block) -> str:
    """The label of a row, with what tells it from others of that label.

    >>> display_name({"label": "lws", "variant": "gamma=0.5"})
    'lws [gamma=0.5]'
    """
    return f"{row['label']} [{row['variant']}]" if row["variant"] else str(row["label"])


def printable(value: Any) -> Any:
    """A board with a space for each character that draws nothing: a terminal would obey some, and a line break ends a cell.

    >>> printable({"label": "er", "variant": "note=\\x1b[2J"})
    {'label': 'er', 'variant': 'note= [2J'}
    """
    if isinstance(value, Mapping):
        return {printable(name): printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [printable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return "".join(character if character.isprintable() else " " for character in value)


def _columns(board: Block) -> list[str]:
    primary = [name for name, metric in board["metrics"].items() if metric["primary"]]
    return sorted(primary, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _ranked_by(board: Block) -> str:
    columns = _columns(board)
    return RANKED_BY if RANKED_BY in columns else columns[0]


def _shown_columns(board: Block, section: Block) -> list[str]:
    """Columns in which a row has a value: forgetting, for example, means nothing without an order of tasks."""
    columns = _columns(board)
    means = {name: [row["metrics"][name]["mean"] for row in section["rows"]] for name in columns}
    return [name for name in columns if any(mean is not None for mean in means[name])] or columns


def _header(board: Block, section: Block) -> list[str]:
    arrows = {True: "↑", False: "↓"}
    shown = _shown_columns(board, section)
    metrics = [f"{name} {arrows[board['metrics'][name]['higher_is_better']]}" for name in shown]
    return ["strategy", *metrics, "rank", "flags"]


def _body(board: Block, section: Block) -> list[list[str]]:
    ranked_by, shown = _ranked_by(board), _shown_columns(board, section)
    return [
        [
            display_name(row),
            *(_percent(row["metrics"][name]) for name in shown),
            _rank(row["metrics"][ranked_by]),
            ", ".join(_shown_flags(row)),
        ]
        for row in section["rows"]
    ]


def _shown_flags(row: Block) -> list[str]:
    flags = row["flags"]
    return [flag for flag in flags if flag != "incomplete" or "failed cells" not in flags]  # the one says the other


def _percent(summary: Block) -> str:
    if summary["mean"] is None:
        return MISSING
    mean = f"{100 * summary['mean']:.1f}"
    return mean if summary["std"] is None else f"{mean} ± {100 * summary['std']:.1f}"


def _rank(summary: Block) -> str:
    if summary["rank"] is None:
        return MISSING
    if summary["rank_range"] is None:
        return str(summary["rank"])
    low, high = summary["rank_range"]
    return f"{summary['rank']} ({low}–{high})"


def _notes(board: Block, section: Block) -> Iterator[str]:
    """What a reader has to know beside the table, one sentence each."""
    seeds, ranked_by = len(section["seeds"]), _ranked_by(board)
    yield f"Percent, mean over {seeds} seed{'s' * (seeds != 1)}{' ± standard deviation' * (seeds > 1)}."
    if any(row["metrics"][ranked_by]["rank_range"] for row in section["rows"]):
        yield f"Rank on {ranked_by} with the ranks that the seeds do not rule out (Tukey's HSD, 95 % for all rows together)."
    if section["flags"]:
        yield f"All rows together: {', '.join(section['flags'])}."
    for failure in section["failed"]:
        fold = f", fold {failure['fold']}" if len(section["folds"]) > 1 else ""
        yield f"Failed: {display_name(failure)}, seed {failure['seed']}{fold}: {failure['message']}."


def _markdown(board: Block) -> str:
    def plain(text: str) -> str:
        return re.sub(r"[\\<\[|]", r"\\\g<0>", text)  # what starts a tag, a link, a picture or a cell

    def cells(row: Sequence[str]) -> str:
        return f"| {' | '.join(map(plain, row))} |"

    lines = [f"# {plain(board['name'])}", ""]
    for section in board["sections"]:
        header = _header(board, section)
        rule = ["---", *["---:"] * (len(header) - 2), "---"]
        lines += [f"## {plain(section['title'])}", "", *map(cells, [header, rule, *_body(board, section)]), ""]
        lines += [plain(" ".join(_notes(board, section))), ""]
    return "\n".join(lines[:-1]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
}


def _latex(board: Block) -> str:
    """One `table` environment a section; needs the package booktabs."""

    def plain(text: str) -> str:
        return "".join(_LATEX.get(character, character) for character in text)

    def cells(row: Sequence[str]) -> str:
        return f"{' & '.join(map(plain, row))} \\\\"

    parts = []
    for section in board["sections"]:
        header = _header(board, section)
        caption = " ".join([f"{section['title']}.", *_notes(board, section)])
        parts += [r"\begin{table}", r"\centering", rf"\caption{{{plain(caption)}}}"]
        parts += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 2)}l}}", r"\toprule", cells(header), r"\midrule"]
        parts += [*map(cells, _body(board, section)), r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(parts[:-1]) + "\n"


def _csv(board: Block) -> str:
    facts = ("title", "stream", "stream_version", "recipe_name", "custom", "tier")
    names = [*_columns(board), *sorted(name for name, metric in board["metrics"].items() if not metric["primary"])]
    fields = ("mean", "std", "low", "high", "pooled_low", "pooled_high", "rank", "rank_low", "rank_high")
    costs = sorted(board["sections"][0]["rows"][0]["cost"])
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    metric_names = [f"{name}_{field}" for name in names for field in fields]
    header = [*facts, "strategy", "variant", "seeds", "folds", *metric_names, *costs, "flags"]
    writer.writerow([_not_computed(cell) for cell in header])
    for section in board["sections"]:
        for row in section["rows"]:
            numbers = [number for name in names for number in _numbers(row["metrics"][name])]
            sizes = [len(row["seeds"]), len(row["folds"])]
            cost = [row["cost"][name] for name in costs]
            leading = [section[fact] for fact in facts]
            cells = [*leading, row["label"], row["variant"], *sizes, *numbers, *cost, "; ".join(row["flags"])]
            writer.writerow([_not_computed(cell) for cell in cells])
    return output.getvalue()


def _not_computed(cell: object) -> object:
    """A text that a spreadsheet would take for a formula, behind an apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def _numbers(summary: Block) -> list[float | None]:
    own, pooled, ranks = summary["interval"] or {}, summary["pooled_interval"] or {}, summary["rank_range"] or [None, None]
    bounds = [own.get("low"), own.get("high"), pooled.get("low"), pooled.get("high")]
    return [summary["mean"], summary["std"], *bounds, summary["rank"], *ranks]


_FORMATS: dict[str, Callable[[Block], str]] = {"csv": _csv, "markdown": _markdown, "latex": _latex}


def _rich(board: Block, section: Block) -> Table:
    # Labels hold brackets, which rich would take for markup.
    caption = escape("\n".join(_notes(board, section)))
    result = Table(title=escape(section["title"]), caption=caption, title_justify="left", caption_justify="left")
    header = _header(board, section)
    longest = max((len(display_name(row)) for row in section["rows"]), default=0)
    for place, name in enumerate(header):
        number = 0 < place < len(header) - 1
        # Flags give way to names, up to a length.
        least = None if place else min(longest, NAME_WIDTH)
        result.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold", min_width=least)
    for row in _body(board, section):
        result.add_row(*map(escape, row))
    return result
