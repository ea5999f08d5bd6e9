"""Plugins that are installed for one test, in a folder of their own beside the real ones."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from shiftproof.benchmark.catalogue import read_catalogue

PREAMBLE = "from shiftproof.benchmark import *\nfrom shiftproof.benchmark import hookimpl\n"


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
