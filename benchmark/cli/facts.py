"""`shiftproof list`, `show` and `plugins`: read from the catalogue, so that no plugin is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from shiftproof.benchmark.cli.console import catalogue, print_table
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import KINDS, problems_hint, unknown
from shiftproof.benchmark.registry.catalogue import Catalogue, Item, Plugin, read_catalogue
from shiftproof.benchmark.suites import suite_toml

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# What `list` shows of a kind beside name, summary and plugin: header and fact.
_COLUMNS = {
    "strategy": (("consumes", "consumes"), ("presets", "presets")),
    "stream": (("tier", "tier"), ("licence", "licence")),
    "suite": (("streams", "streams"), ("strategies", "strategies"), ("seeds", "seeds")),
    "metric": (("higher is better", "higher_is_better"), ("over folds", "over_folds")),
    "backbone": (("reference", "reference"),),
    "executor": (),
}
_SHOWN_APART = ("summary", "config", "presets")


def list_names(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS.values())}.")], as_json: AsJson = False
) -> None:
    """List strategies, streams, suites, metrics, backbones or executors."""
    singular = {plural: one for one, plural in KINDS.items()}
    if kind not in singular:
        raise unknown("kind", kind, singular)
    items = catalogue().items(singular[kind])
    if as_json:
        rows = [{"name": name, "plugin": _plugin_facts(plugin), **item.facts} for name, (item, plugin) in items.items()]
        typer.echo(json.dumps(rows, indent=1))
        return
    columns = _COLUMNS[singular[kind]]
    header = ["name", "what it is", *(title for title, _ in columns), "from"]
    print_table(header, [_row(item, plugin, [fact for _, fact in columns]) for item, plugin in items.values()])


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A strategy, stream, suite, metric, backbone or executor.")],
    toml: Annotated[bool, typer.Option("--toml", help="Print a suite as a file that `run` accepts.")] = False,
) -> None:
    """Show the facts, knobs, presets and citation of whatever has that name."""
    known = catalogue()
    plain, _, preset = name.partition("@")
    if toml:
        typer.echo(suite_toml(suite_of(known.item("suite", name))), nl=False)
        return
    found = [items[plain] for kind in KINDS if plain in (items := known.items(kind))]
    if not found:
        names = {other for kind in KINDS for other in known.items(kind)}
        raise unknown("strategy, stream, suite, metric, backbone or executor", plain, names, problems_hint(known.broken))
    for item, plugin in found:
        if preset and preset not in item.facts.get("presets", {}):
            raise unknown(f"preset of {plain}", preset, item.facts.get("presets", {}))
        _print_item(item, plugin)


def plugins(
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if a plugin is broken.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Import every plugin again.")] = False,
) -> None:
    """List every installed plugin and what is wrong with the broken ones."""
    known = read_catalogue(refresh)
    if as_json:
        rows = [{**_plugin_facts(plugin), "items": _contents(plugin)} for plugin in known.plugins]
        typer.echo(json.dumps({"plugins": rows, "conflicts": known.conflicts()}, indent=1))
    else:
        _print_plugins(known)
    if strict and (known.broken or known.conflicts()):
        reasons = [*(f"plugin {name!r} did not load: {error}" for name, error in known.broken.items()), *known.conflicts()]
        raise InputError("; ".join(reasons))


def suite_of(item: Item) -> SuiteSpec:
    """The suite that an item of the catalogue describes."""
    facts = item.facts
    return SuiteSpec(
        item.name,
        facts["summary"],
        tuple(facts["streams"]),
        tuple(facts["strategies"]),
        tuple(facts["seeds"]),
        tuple(facts["overrides"]),
        facts["recipe"],
    )


def _print_plugins(known: Catalogue) -> None:
    rows = [
        [plugin.name, plugin.distribution, plugin.version, plugin.status, plugin.error or _contributes(plugin)]
        for plugin in known.plugins
    ]
    print_table(["plugin", "distribution", "version", "status", "contributes"], rows)
    for line in known.conflicts():
        typer.echo(f"conflict: {line}", err=True)


def _print_item(item: Item, plugin: Plugin) -> None:
    typer.secho(f"{item.kind} {item.name}: {item.facts['summary']}", bold=True)
    typer.echo(f"  plugin: {plugin.name} of {plugin.distribution} {plugin.version}")
    for fact, value in item.facts.items():
        if fact not in _SHOWN_APART and value not in ("", []):
            beside = " beside what it consumes" if fact == "needs_data" else ""
            typer.echo(f"  {fact.replace('_', ' ')}{beside}: {_brief(value)}")
    for preset, changes in item.facts.get("presets", {}).items():
        changed = ", ".join(f"{key}={value}" for key, value in changes.items())
        typer.echo(f"  preset {item.name}@{preset}: {changed or 'as the defaults'}")
    knobs = item.facts.get("config", [])
    if knobs:
        typer.echo("")
        rows = [[knob[fact] for fact in ("name", "default", "type", "comment")] for knob in knobs]
        print_table(["knob", "default", "type", "meaning"], rows)


def _row(item: Item, plugin: Plugin, facts: Iterable[str]) -> list[str]:
    return [item.name, _what(item), *(_brief(item.facts[fact]) for fact in facts), f"{plugin.distribution} {plugin.version}"]


def _what(item: Item) -> str:
    """The summary, and what a user must know before choosing it."""
    facts = item.facts
    marks = [
        mark.replace("_", " ")
        for mark in ("uses_group_labels", "uses_bias_knowledge", "needs_data", "uses_target")
        if facts.get(mark)
    ]
    marks += [f"unavailable: {facts['unavailable']}"] if facts.get("unavailable") else []
    return f"{facts['summary']} ({'; '.join(marks)})" if marks else str(facts["summary"])


def _brief(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | dict):
        return ", ".join(str(part) for part in value)
    return str(value)


def _contents(plugin: Plugin) -> dict[str, list[str]]:
    """Names by kind, in the plural."""
    found: dict[str, list[str]] = {}
    for item in plugin.items:
        found.setdefault(KINDS[item.kind], []).append(item.name)
    return found


def _contributes(plugin: Plugin) -> str:
    contents = [f"{kind}: {', '.join(names)}" for kind, names in _contents(plugin).items()]
    listens = [
        hook.removeprefix("shiftproof_") for hook in plugin.hooks if hook.removeprefix("shiftproof_") not in KINDS.values()
    ]
    return "; ".join(contents + ([f"listens to: {', '.join(listens)}"] if listens else []))


def _plugin_facts(plugin: Plugin) -> dict[str, Any]:
    facts = asdict(plugin)
    del facts["items"]
    return facts
