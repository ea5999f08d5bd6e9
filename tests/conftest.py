"""What all tests share: no network, one thread, a cache of their own, plugins that exist for the length of a test."""

from __future__ import annotations

import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shiftproof.benchmark.registry.catalogue import read_catalogue

if TYPE_CHECKING:
    from shiftproof.benchmark.records import RunRecord
    from shiftproof.benchmark.registry.lookup import Registry
    from shiftproof.benchmark.running.matrix import Plan

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TOYS = Path(__file__).parent / "toys.py"


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, one thread here and in children, and a cache that no other session sees."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise RuntimeError(f"a test must not open a connection, got one to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        patch.setenv("SHIFTPROOF_CACHE", str(tmp_path_factory.mktemp("shiftproof-cache")))
        for name in THREADS:
            patch.setenv(name, "1")
        patch.delenv("SHIFTPROOF_TENSORBOARD", raising=False)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Built-in strategies, and the toys of `tests/toys.py`."""
    from shiftproof.benchmark.registry.lookup import load_registry

    return load_registry(("fine-tuning", "rehearsal", "group-labels"), [TOYS])


@pytest.fixture(scope="session")
def plan_of(registry: Registry) -> Callable[..., Plan]:
    """`plan_of("toy,plain", "k=v", ..., streams="tiny", seeds=(0,))`: the cells of a suite that is made for the test."""
    from shiftproof.benchmark.contracts import SuiteSpec
    from shiftproof.benchmark.running.matrix import plan

    def make(strategies: str, *overrides: str, streams: str = "tiny", seeds: Sequence[int] = (0,), **suite: Any) -> Plan:
        names = tuple(streams.split(",")), tuple(strategies.split(","))
        return plan(registry, SuiteSpec("test", "made for a test", *names, tuple(seeds), **suite), overrides)

    return make


@pytest.fixture
def run(registry: Registry, plan_of: Callable[..., Plan], tmp_path: Path) -> Callable[..., RunRecord]:
    """`run("toy", "k=v", ...)`: the record of the one cell that those arguments of `plan_of` give."""
    from shiftproof.benchmark.running.runner import run_cell

    def make(*arguments: str, out: Path | None = None, **facts: Any) -> RunRecord:
        (cell,) = plan_of(*arguments, **facts).cells
        return run_cell(cell, registry, out or tmp_path / "out")

    return make


# One line, and nothing in it imports torch.
PREAMBLE = "from shiftproof.benchmark import MetricSpec, StrategySpec, SuiteSpec, hookimpl\n"


class Site:
    """A folder on the path, in which plugins are installed as pip would do it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []
        folder.mkdir()

    def install(self, name: str, source: str, distribution: str = "", value: str = "", version: str = "1.0") -> Path:
        """Write the module, and the metadata that announces it; returns the module's file."""
        module = value.partition(":")[0] or f"toy_{name.replace('-', '_')}"
        distribution = distribution or f"shiftproof-{name}"
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[shiftproof]\n{name} = {value or module}\n")
        self.modules.append(module)
        file = self.folder / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PREAMBLE + textwrap.dedent(source))
        return file


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty site; the plugins installed in it are forgotten after the test."""
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(made.folder))
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "cache"))
    yield made
    for module in made.modules:
        for name in [known for known in sys.modules if known == module or module.startswith(f"{known}.")]:
            del sys.modules[name]


@pytest.fixture(scope="session")
def harness_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder whose catalogue knows the harness's own plugins, harvested once."""
    folder = tmp_path_factory.mktemp("harness") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIFTPROOF_CACHE", str(folder))
        patch.setenv("SHIFTPROOF_PLUGINS", "metrics")
        read_catalogue()
    return folder


@pytest.fixture
def warm_site(site: Site, harness_catalogue: Path, tmp_path: Path) -> Site:
    """A site whose catalogue lacks only what the test installs."""
    shutil.copytree(harness_catalogue, tmp_path / "cache")
    return site


TOY = '''
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge
from shiftproof.benchmark import DataExperience, Stream, StreamSpec
from shiftproof.benchmark.conformance import planted_stream
from shiftproof.strategies import TrainingStrategy
from torch.nn import functional as F


@dataclass(frozen=True)
class ToyConfig:
    gamma: Annotated[float, Ge(0)] = 1.0  # factor of the loss, in [0, inf)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class OtherConfig:
    gamma: float = 1.0


@dataclass(frozen=True)
class StreamConfig:
    p_corr: float = 0.9  # share of samples that follow the bias


class Toy(TrainingStrategy[ToyConfig]):
    """Cross-entropy times gamma."""

    def loss(self, batch):
        return self.config.gamma * F.cross_entropy(self.logits(batch), batch.y)


class Other(Toy):
    """The same under another name."""


class Nan(Toy):
    """Diverges."""

    def loss(self, batch):
        return super().loss(batch) * float("nan")


class Peeker(Toy):
    """Reads group labels without saying so."""

    def before_experience(self, experience):
        experience.groups


def plain(config, root):
    return replace(planted_stream(), name="toy-stream")


@hookimpl
def shiftproof_strategies():
    def spec(name, build, config, **facts):
        return StrategySpec(name, build, config, DataExperience, "Toy et al., Journal of Toys, 2024", **facts)

    return [
        spec("toy", Toy, ToyConfig, presets={"released": ToyConfig(gamma=2.0)}),
        spec("other", Other, OtherConfig),
        spec("nan", Nan, ToyConfig),
        spec("peeker", Peeker, ToyConfig),
        spec("absent", Toy, ToyConfig, unavailable="needs shiftproof[clip]"),
    ]


@hookimpl
def shiftproof_streams():
    files = ("img/list.csv", "img/data.npz")
    return [
        StreamSpec("toy-stream", plain, StreamConfig, "digits", "two planted tasks", "Toy et al.", "CC0"),
        StreamSpec("filed", plain, StreamConfig, "full", "needs files", "https://toys.example", "CC BY 4.0", files),
    ]


@hookimpl
def shiftproof_suites():
    return [
        SuiteSpec("toy", "strategy and suite of one name", ("toy-stream",), ("toy", "toy@released"), (0, 3)),
        SuiteSpec("short", 'an odd "suite"', ("toy-stream",), ("toy",), (0,), ("recipe.epochs=1",), "short"),
    ]
'''


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory: pytest.TempPathFactory, harness_catalogue: Path) -> Path:
    """A folder with the plugin `toy` installed below "site", and below "cache" a catalogue that knows it."""
    home = tmp_path_factory.mktemp("toy")
    shutil.copytree(harness_catalogue, home / "cache")
    Site(home / "site").install("toy", TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "site"))
        patch.setenv("SHIFTPROOF_CACHE", str(home / "cache"))
        patch.setenv("SHIFTPROOF_PLUGINS", "toy")
        read_catalogue()
    return home


@pytest.fixture
def toy(toy_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The plugin `toy` beside the harness alone, with a cache that the test may change; yields the site's folder."""
    shutil.copytree(toy_home / "cache", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(toy_home / "site"))
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "toy")
    # Child processes find the plugin as well.
    monkeypatch.setenv("PYTHONPATH", str(toy_home / "site"))
    yield toy_home / "site"
    # Another test's plugin of this name lies elsewhere.
    sys.modules.pop("toy_toy", None)
