"""Where a command may write: apart from what it reads, and where a folder is or can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.paths import check_apart, check_folder


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        ({"--a": "o", "--b": "o"}, {}, "expected --a and --b apart, got .*o for both"),
        ({"--a": "o", "--b": "./o"}, {}, "expected --a and --b apart"),
        ({"--a": "o", "--b": "o/picture"}, {}, "got .*o for the one and .*o/picture for the other"),
        ({"--a": "o/index", "--b": "o"}, {}, "expected --a and --b apart"),
        ({"--a": "o", "--b": "link"}, {"--c": "there"}, "expected --b and --c apart"),
        ({"--a": "o", "--b": "hard"}, {"--c": "there"}, "expected --b and --c apart"),
    ],
)
def test_one_file_is_not_written_for_two_options_or_over_what_is_read(
    tmp_path: Path, written: dict[str, str], read: dict[str, str], said: str
) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "hard").hardlink_to(tmp_path / "there")
    first, second = ({option: [tmp_path / name] for option, name in named.items()} for named in (written, read))
    with pytest.raises(InputError, match=said):
        check_apart(first, second)


def test_files_of_one_folder_and_one_file_that_is_read_twice_are_apart(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    both = [tmp_path / "there"]
    check_apart({"--a": [tmp_path / "o" / "1"], "--b": [tmp_path / "o" / "2"], "--none": []}, {"--c": both, "--d": both})


def test_a_folder_is_there_or_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("", "new", "new/deeper"):
        check_folder("--out", tmp_path / name)
    for name, where in (("file", "which is a file"), ("file/new", r"where .*file is a file"), ("dangling", "which is a file")):
        with pytest.raises(InputError, match=f"expected --out as a folder, got .*{name}, {where}"):
            check_folder("--out", tmp_path / name)


def test_a_folder_that_nobody_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write everywhere
    with pytest.raises(InputError, match="expected --out where files can be written"):
        check_folder("--out", tmp_path / "new")
