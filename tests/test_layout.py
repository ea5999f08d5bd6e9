"""The packages, their layers, and what a wheel holds."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("benchmark", "strategies", "plugins", "datasets", "leaderboards")
# A room may import from itself and from these.
MAY_IMPORT = {
    "benchmark": set(),
    "datasets": {"benchmark"},
    "strategies": {"benchmark"},
    "plugins": {"benchmark", "strategies"},
    "leaderboards": set(),
}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def sources(room: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of shiftproof, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("shiftproof"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shiftproof"):
            assert node.level == 0
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_the_list_of_packages_is_what_lies_on_the_disk(setup: configparser.ConfigParser) -> None:
    listed = set(setup["options"]["packages"].split())
    found = {"shiftproof.datasets"}
    for room in ROOMS:
        found |= {".".join(("shiftproof", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / room).rglob("__init__.py")}
    assert listed == found
    pairs = [line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line]
    assert {name: folder.replace("/", ".") for name, folder in pairs} == {name: name[len("shiftproof.") :] for name in listed}


def test_datasets_is_no_regular_package() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    for path, tree in sources(room):
        for module, _ in imports(tree):
            other = module.split(".")[1]
            assert other == room or other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"


def test_built_in_plugins_use_the_public_names_alone() -> None:
    import shiftproof.benchmark
    import shiftproof.strategies.merging
    import shiftproof.strategies.transport

    families = (shiftproof.strategies.merging, shiftproof.strategies.transport)
    rooms = (shiftproof.benchmark, shiftproof.strategies, *families)
    public = {room.__name__: set(room.__all__) for room in rooms}
    for path, tree in sources("plugins"):
        for module, name in imports(tree):
            assert name in public.get(module, ()), f"{path.name} uses {module}.{name}"


def test_every_public_name_resolves() -> None:
    import shiftproof.benchmark
    import shiftproof.strategies.merging

    for room in (shiftproof.benchmark, shiftproof.strategies, shiftproof.strategies.merging):
        for name in room.__all__:
            assert getattr(room, name) is not None


@pytest.mark.parametrize("room", ["benchmark", "strategies", "plugins", "leaderboards"])
def test_the_bare_name_is_refused(room: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"import this package as 'shiftproof.{room}'" in done.stderr


def test_type_checkers_see_the_rooms_through_links() -> None:
    for room in ROOMS:
        link = ROOT / "tests" / "typing" / "shiftproof" / room
        assert link.is_symlink()
        assert not os.path.isabs(os.readlink(link))
        assert link.resolve() == ROOT / room


@pytest.mark.parametrize("name", ["lws", "clusterfix", "bpa", "score"])
def test_a_built_in_copied_out_of_the_repository_still_works(name: str, tmp_path: Path) -> None:
    from shiftproof.benchmark.conformance import check_strategy
    from shiftproof.benchmark.registry.lookup import load_registry

    copy = tmp_path / f"my_{name}.py"
    shutil.copy(ROOT / "plugins" / f"{name}.py", copy)
    registry = load_registry(only=["backbones", "metrics", "fine-tuning"], files=[copy])
    results = check_strategy(name, registry=registry)
    assert [result for result in results if not result.passed] == []
    assert len(results) >= 6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for item in (*ROOMS, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / item
        if path.is_dir():
            shutil.copytree(path, source / item, ignore=shutil.ignore_patterns("__pycache__", "runs"))
        else:
            shutil.copy(path, source / item)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_a_wheel_runs_without_the_checkout_and_leaves_other_packages_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shiftproof"}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from importlib.resources import files\n"
        "import shiftproof.datasets.digits as digits\n"
        "assert digits.__file__.startswith(sys.argv[1]), digits.__file__\n"
        "assert files('shiftproof.leaderboards').joinpath('schema.json').is_file()\n"
        "print(digits.split_digits(False, digits.DigitsConfig()).data_sha256)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from shiftproof.datasets.digits import DigitsConfig, split_digits

    assert done.stdout.strip() == split_digits(False, DigitsConfig()).data_sha256


def test_an_editable_install_ships_the_frozen_files_and_the_schema() -> None:
    from importlib.resources import files

    assert files("shiftproof.datasets.frozen").joinpath("digits.npz").is_file()
    assert files("shiftproof.leaderboards").joinpath("schema.json").is_file()


def test_make_refuses_a_python_that_is_too_old_before_it_installs(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "quick", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected Python 3.11 or newer, got 3.10.4; name another: make PYTHON=python3.12 quick" in done.stderr
    assert not (tmp_path / ".venv").exists()
