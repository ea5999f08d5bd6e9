"""Every plugin's contributions under their names. A broken plugin is a row, never the end of the tool."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftproof.benchmark.contracts import BackboneSpec, ExecutorSpec, MetricSpec, StrategySpec, StreamSpec, SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import KINDS, conflict, problems_hint, unknown
from shiftproof.benchmark.records import RunRecord, RunRequest
from shiftproof.benchmark.registry.discovery import installed_entries
from shiftproof.benchmark.registry.loading import Loaded, PluginError, load_entry, load_file, one_line

_LOG = logging.getLogger("shiftproof")


@dataclass(frozen=True)
class PluginProblem:
    """A plugin that did not load, and why in one line."""

    name: str
    distribution: str
    error: str


@dataclass(frozen=True)
class PluginOrigin:
    """Where a contribution comes from; for a loose file the distribution is the file's name."""

    distribution: str
    version: str
    entry_point: str
    module: str


class Registry:
    """What the loaded plugins contribute.

    Attributes:
        strategies, streams, suites, metrics, backbones, executors: Name to spec.
        observers: Tells every plugin that listens how a run goes.
        problems: Plugins that did not load.
        only, files: What `load_registry` takes in another process to get the same registry.
    """

    def __init__(self, only: Collection[str] | None = None, files: Sequence[Path] = ()) -> None:
        self.only = None if only is None else tuple(sorted(only))
        self.files = tuple(files)
        self.strategies: dict[str, StrategySpec[Any]] = {}
        self.streams: dict[str, StreamSpec[Any]] = {}
        self.suites: dict[str, SuiteSpec] = {}
        self.metrics: dict[str, MetricSpec] = {}
        self.backbones: dict[str, BackboneSpec] = {}
        self.executors: dict[str, ExecutorSpec] = {}
        self.problems: list[PluginProblem] = []
        self.observers = Observers()
        self._givers: dict[tuple[str, str], Loaded] = {}

    def add(self, loaded: Loaded) -> None:
        """Take in what a plugin contributes.

        Raises:
            InputError: If another plugin has contributed the same name of the same kind.
        """
        for kind, specs in loaded.specs.items():
            for spec in specs:
                giver = self._givers.setdefault((kind, spec.name), loaded)
                if spec.name in self._named(kind):
                    raise conflict(kind, spec.name, str(giver.entry), str(loaded.entry))
                self._named(kind)[spec.name] = spec
        self.observers.plugins.append(loaded)

    def strategy(self, label: str) -> tuple[StrategySpec[Any], str, Any]:
        """The spec, the preset's name and its config for "lws" or "lws@released".

        Raises:
            InputError: If there is no such strategy or preset.
        """
        name, at, preset = label.partition("@")
        spec: StrategySpec[Any] = self._look_up("strategy", name)
        if not at:
            return spec, "", spec.config()
        if preset not in spec.presets:
            raise unknown(f"preset of {name}", preset, spec.presets)
        return spec, preset, spec.presets[preset]

    def stream(self, name: str) -> StreamSpec[Any]:
        """The stream of that name. Raises InputError if there is none."""
        spec: StreamSpec[Any] = self._look_up("stream", name)
        return spec

    def suite(self, name: str) -> SuiteSpec:
        """The suite of that name. Raises InputError if there is none."""
        spec: SuiteSpec = self._look_up("suite", name)
        return spec

    def metric(self, name: str) -> MetricSpec:
        """The metric of that name. Raises InputError if there is none."""
        spec: MetricSpec = self._look_up("metric", name)
        return spec

    def backbone(self, name: str) -> BackboneSpec:
        """The backbone of that name. Raises InputError if there is none."""
        spec: BackboneSpec = self._look_up("backbone", name)
        return spec

    def executor(self, name: str) -> ExecutorSpec:
        """The executor of that name. Raises InputError if there is none."""
        spec: ExecutorSpec = self._look_up("executor", name)
        return spec

    def origin(self, kind: str, name: str) -> PluginOrigin:
        """Which plugin contributes `name`.

        Args:
            kind: "strategy", "stream", "suite", "metric", "backbone" or "executor".

        Raises:
            InputError: If nothing of that kind has that name.
        """
        self._look_up(kind, name)
        entry = self._givers[kind, name].entry
        return PluginOrigin(entry.distribution, entry.version, entry.name, entry.module)

    def _named(self, kind: str) -> dict[str, Any]:
        named: dict[str, Any] = getattr(self, KINDS[kind])
        return named

    def _look_up(self, kind: str, name: str) -> Any:
        named = self._named(kind)
        if name not in named:
            raise unknown(kind, name, named, problems_hint({p.name: p.error for p in self.problems}))
        return named[name]


class Observers:
    """Tells every plugin that listens how a run goes. One that raises is reported once and does not stop the run."""

    def __init__(self) -> None:
        self.plugins: list[Loaded] = []
        self._failed: set[tuple[int, str]] = set()

    def run_started(self, request: RunRequest) -> None:
        """Call `shiftproof_run_started`."""
        self._tell("shiftproof_run_started", {"request": request})

    def experience_learned(
        self, request: RunRequest, experience: str, logs: Mapping[str, float], row: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        """Call `shiftproof_experience_learned`."""
        facts = {"request": request, "experience": experience, "logs": logs, "row": row}
        self._tell("shiftproof_experience_learned", facts)

    def run_finished(self, record: RunRecord) -> None:
        """Call `shiftproof_run_finished`."""
        self._tell("shiftproof_run_finished", {"record": record})

    def _tell(self, hook: str, facts: Mapping[str, Any]) -> None:
        for position, loaded in enumerate(self.plugins):
            if hook not in loaded.hooks:
                continue
            try:
                getattr(loaded.calls, hook)(**facts)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a stranger's code that only looks on: the run goes on without it
                if (position, hook) not in self._failed:
                    self._failed.add((position, hook))
                    _LOG.warning("%s failed in %s, the run goes on: %s", loaded.entry, hook, one_line(error))


def load_registry(only: Collection[str] | None = None, files: Sequence[Path] = (), strict: bool = False) -> Registry:
    """Import plugins and register what they contribute.

    Args:
        only: Names of the entry points to import; None for all. The harness's own parts are always imported.
        files: Loose plugin files to load as well.
        strict: Raise for a broken plugin instead of noting it in `problems`.

    Raises:
        InputError: If two plugins contribute one name, a name in `only` or `SHIFTPROOF_PLUGINS` is not installed, or a loose
            file cannot be used: who names a file wants it.
    """
    if len({path.resolve() for path in files}) < len(files):
        raise InputError(f"expected every plugin file once, got one that is given twice: {', '.join(map(str, files))}")
    if len({path.stem for path in files}) < len(files):  # a module is looked up by its name, for the hash of its code, too
        raise InputError(f"expected plugin files of different names, got {', '.join(map(str, files))}; rename one")
    registry = Registry(only, files)
    for entry in installed_entries(only):
        try:
            loaded = load_entry(entry)
        except PluginError as error:
            if strict:
                raise
            registry.problems.append(PluginProblem(entry.name, entry.distribution, error.reason))
        else:
            registry.add(loaded)
    for path in files:
        registry.add(load_file(path))
    return registry
