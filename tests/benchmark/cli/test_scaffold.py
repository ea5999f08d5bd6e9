"""The package that `shiftproof new-strategy` writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shiftproof.benchmark.cli.scaffold import package_files, write_package
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.registry.lookup import load_registry


def test_the_package_announces_its_module_under_the_strategys_name(tmp_path: Path) -> None:
    folder = write_package("my-method", tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["shiftproof"].values()
    assert folder.name == project["name"] == "shiftproof-my-method"
    assert list(project["entry-points"]["shiftproof"]) == ["my-method"]
    assert (folder / "src" / module / "__init__.py").is_file()


@pytest.mark.parametrize("name", ["mine", "my-method", "m2-x9"])
def test_nothing_is_left_to_fill_in_and_every_python_file_compiles(name: str) -> None:
    files = package_files(name)
    assert [path for path, text in files.items() if "$" in path + text] == []
    assert [compile(text, path, "exec") for path, text in files.items() if path.endswith(".py")]


def test_the_strategy_registers_as_it_is_written(tmp_path: Path) -> None:
    text = package_files("my-method")["src/shiftproof_my_method/__init__.py"]
    (tmp_path / "written.py").write_text(text)
    spec, _, config = load_registry([], [tmp_path / "written.py"]).strategy("my-method")
    assert (spec.config.__name__, config.beta) == ("MyMethodConfig", 0.1)


def test_the_strategy_fits_in_about_twenty_lines() -> None:
    text = package_files("my-method")["src/shiftproof_my_method/__init__.py"]
    code = [line for line in text.splitlines() if line and not line.lstrip().startswith(('"""', "#", "from ", "import "))]
    assert len(code) <= 20


def test_what_is_written_passes_the_linter(tmp_path: Path) -> None:
    folder = write_package("my-method", tmp_path)
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert ruff is not None
    command = [ruff, "check", "--isolated", "--no-cache", "--line-length=128", "--select=E,F,W,I,B,UP,SIM,RUF", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shiftproof-mine").mkdir()
    (tmp_path / "shiftproof-mine/notes").write_text("mine")
    with pytest.raises(InputError, match=r"expected a new folder, got .*shiftproof-mine, which exists"):
        write_package("mine", tmp_path)
    assert [path.name for path in (tmp_path / "shiftproof-mine").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["", "Mine", "my_method", "my method", "../mine", "1st", "a--b", "a-", "der++"])
def test_a_name_that_cannot_be_one_is_an_error_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="lower-case words joined by '-'"):
        write_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"), [("recipe", "no scope of --set, got 'recipe'"), ("a" * 300, "at most 80 characters")]
)
def test_a_name_that_is_a_scope_or_too_long_is_an_error_with_its_reason(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_is_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got: File name too long; name another folder with --into"):
        write_package("mine", tmp_path / ("a" * 300))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder with --into"):
        write_package("mine", tmp_path / "file")


def test_the_written_tests_pass_once_the_package_is_installed(tmp_path: Path) -> None:
    folder = write_package("my-method", tmp_path / "packages")
    info = folder / "src" / "shiftproof_my_method-0.1.0.dist-info"  # what pip would write
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiftproof-my-method\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[shiftproof]\nmy-method = shiftproof_my_method\n")
    limits = {"SHIFTPROOF_PLUGINS": "my-method", "SHIFTPROOF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **limits, "PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout
