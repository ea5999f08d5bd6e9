"""What of an export is refused, all of it and in one line, and what then lies in the cache: nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shiftproof.benchmark.cache import CONTENT, Cache
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.experiences import StateDict, state_sha256
from shiftproof.benchmark.experts.exporting import export_experts
from shiftproof.benchmark.experts.files import METADATA, Facts, new_export, read_export, read_facts, write_part
from shiftproof.benchmark.experts.importing import Taken, differences, import_experts
from shiftproof.benchmark.experts.making import expert_of, key_of, named_sources, onlooking, request_for, train
from shiftproof.benchmark.records import sha256
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running.bases import Bases
from shiftproof.benchmark.running.cells import build_stream
from shiftproof.benchmark.streams import Stream

TOYS = Path(__file__).parents[2] / "toys.py"
KNOBS = ("recipe.epochs=1", "stream.samples=24", "base.kind=barlow-twins", "base.epochs=1", "base.batch_size=16")
BIAS = "backbone.layers.0.bias"  # (8,)
FILES = ("base", "task-0", "task-1", "heads")


@pytest.fixture(scope="module")
def toys() -> Registry:
    return load_registry(("fine-tuning",), [TOYS])


@pytest.fixture(scope="module")
def stream(toys: Registry) -> Stream:
    return build_stream(toys, request_for(toys, "tiny", 0, "", KNOBS))


@pytest.fixture(scope="module")
def made(toys: Registry, stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in "out" and the cache that it comes from in "cache"."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIFTPROOF_CACHE", str(home / "cache"))
        request = request_for(toys, "tiny", 0, "", KNOBS)
        train(toys, request, stream, [0], "cpu", Cache())
        export_experts(toys, request, stream, "cpu", home / "out")
    return home


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may damage."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def take(toys: Registry, stream: Stream, out: Path, tmp_path: Path) -> Callable[..., list[Taken]]:
    """Import it into the empty cache "here"."""

    def taken(force: bool = False, of: Stream = stream) -> list[Taken]:
        export = read_export(out)
        request = request_for(toys, "tiny", export.base.seed, export.base.fold, export.base.set)
        return import_experts(export, toys, request, of, Cache(tmp_path / "here"), force)

    return taken


def change(out: Path, name: str, tensors: Mapping[str, Any] | None = None, **facts: Any) -> None:
    """Write a file anew as if it had been exported so: its hash is right, and the base knows it."""
    file = out / f"{name}.safetensors"
    state: StateDict = {**load_file(file), **(tensors or {})}
    kept = {key: tensor for key, tensor in state.items() if tensor is not None}
    told = replace(read_facts(file), **facts)
    if told.key:
        told = replace(told, cache_key=sha256(["base" if told.part in ("base", "release") else "expert", told.key]))
    write_part(file, replace(told, weights_sha256=state_sha256(kept)), kept)
    if name != "base":
        base = read_facts(out / "base.safetensors")
        change(out, "base", files={**base.files, file.name: read_facts(file).weights_sha256})


def stored(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def test_keys_computed_without_training_are_those_of_the_cache(toys: Registry, stream: Stream, made: Path) -> None:
    cache = Cache(made / "cache", makes=False)
    with onlooking(toys, request_for(toys, "tiny", 0, "", KNOBS), stream, "cpu", cache) as run:
        for name, source in named_sources(stream).items():
            expert = expert_of(run, source)
            entry = cache.stored("expert", key_of(run, source))
            assert entry is not None
            assert state_sha256(entry) == state_sha256(expert.expert.state_dict())
            assert read_facts(made / "out" / f"{name}.safetensors").key == json.loads(json.dumps(key_of(run, source)))
    assert cache.made == {}


def test_it_is_taken_as_it_was_made(take: Callable[..., list[Taken]], made: Path, tmp_path: Path) -> None:
    assert take() == [Taken(name, "imported") for name in ("base", "task-0", "task-1")]
    theirs, ours = (
        {path.name: state_sha256(load_file(path)) for path in stored(folder)} for folder in (made / "cache", tmp_path / "here")
    )
    assert theirs == ours
    assert take() == [Taken(name, "found") for name in ("base", "task-0", "task-1")]


def cut(out: Path) -> None:
    file = out / "task-1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip(out: Path) -> None:
    file = out / "task-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def strip(out: Path) -> None:
    save_file(load_file(out / "task-1.safetensors"), out / "task-1.safetensors")


def shorten(out: Path) -> None:
    facts = asdict(read_facts(out / "task-1.safetensors"))
    del facts["cache_key"]
    save_file(load_file(out / "task-1.safetensors"), out / "task-1.safetensors", {METADATA: json.dumps(facts)})


def nest(out: Path) -> None:
    save_file(load_file(out / "task-1.safetensors"), out / "task-1.safetensors", {METADATA: "[" * 100_000})


def lose(out: Path) -> None:
    (out / "heads.safetensors").unlink()


def mix(out: Path) -> None:
    base = (out / "base.safetensors").read_bytes()
    change(out, "task-0", {BIAS: torch.zeros(8)})
    (out / "base.safetensors").write_bytes(base)


def another_seed(out: Path) -> None:
    change(out, "task-0", seed=1)


def out_of_the_folder(out: Path) -> None:
    change(out, "base", files={"../task-0.safetensors": ""})


def no_experts(out: Path) -> None:
    base = read_facts(out / "base.safetensors")
    change(out, "base", files={"heads.safetensors": base.files["heads.safetensors"]})


def one_expert(out: Path) -> None:
    files = dict(read_facts(out / "base.safetensors").files)
    del files["task-1.safetensors"]
    change(out, "base", files=files)


def no_number(out: Path) -> None:
    change(out, "task-1", {BIAS: torch.full((8,), float("nan"))})


def other_shape(out: Path) -> None:
    change(out, "task-1", {BIAS: torch.zeros(9)})


def other_dtype(out: Path) -> None:
    change(out, "task-1", {BIAS: torch.zeros(8, dtype=torch.float64)})


def other_names(out: Path) -> None:
    change(out, "task-1", {BIAS: None, "head.bias": torch.zeros(8)})


def other_head(out: Path) -> None:
    change(out, "heads", {"heads.1.bias": torch.zeros(3)})


def keyed(name: str, **parts: Any) -> Callable[[Path], None]:
    """The file says that its key had other parts."""

    def alter(out: Path) -> None:
        change(out, name, key={**read_facts(out / f"{name}.safetensors").key, **parts})

    return alter


def other_recipe(out: Path) -> None:
    key = read_facts(out / "task-0.safetensors").key
    keyed("task-0", recipe={**key["recipe"], "epochs": 7})(out)


def other_hash(out: Path) -> None:
    file = out / "task-0.safetensors"
    write_part(file, replace(read_facts(file), cache_key="0" * 64), load_file(file))


def other_start(out: Path) -> None:
    change(out, "base", {BIAS: torch.zeros(8)})


def made_on(device: str) -> Callable[[Path], None]:
    return keyed("task-0", device=device)


def newer(out: Path) -> None:
    for name in reversed(FILES):
        change(out, name, version="2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "task-1.safetensors: expected a complete safetensors file"),
        (flip, "task-1.safetensors: expected the weights that were exported, got others, whose hash is wrong"),
        (strip, "task-1.safetensors: expected a file that `shiftproof experts export` wrote, got one without its metadata"),
        (shorten, "task-1.safetensors: expected the metadata of this version's `experts export`, got others"),
        (nest, "task-1.safetensors: expected the metadata of this version's `experts export`, got others"),
        (lose, "expected heads.safetensors in .*, got no such file"),
        (mix, "task-0.safetensors: expected a file of the same export as base.safetensors"),
        (another_seed, "task-0.safetensors: expected a file of the same export as base.safetensors"),
        (out_of_the_folder, "base.safetensors: expected the base of an export, which lists its files"),
        (no_experts, "base.safetensors: expected an export with experts, got one with heads.safetensors alone"),
        (one_expert, "base.safetensors: expected the experts of tiny, task-0, task-1, got task-0"),
        (no_number, "task-1.safetensors: expected finite weights, got NaN or infinity in 'backbone.layers.0.bias'"),
        (other_shape, "task-1.safetensors: expected the tensors of the model of tiny, got .*: backbone.layers.0.bias"),
        (other_dtype, "task-1.safetensors: expected the tensors of the model of tiny, got .*: backbone.layers.0.bias"),
        (other_names, "task-1.safetensors: expected the tensors .*: backbone.layers.0.bias, head.bias"),
        (other_head, "heads.safetensors: expected the tensors of the model of tiny, got .*: heads.1.bias"),
        (keyed("task-1", data="0" * 64), "task-1.safetensors: expected what tiny is here, got other training data"),
        (keyed("task-1", trainer="0" * 64), "task-1.safetensors: expected what tiny is here, got other code that fine-tunes"),
        (keyed("task-0", torch="1.0"), r"task-0.safetensors: .*, got torch 1.0 \(here .*\); a run here would not take it"),
        (keyed("base", sha256="0" * 64), "base.safetensors: .*, got other recipe, data or backbone of the base"),
        (other_recipe, r"task-0.safetensors: expected what tiny is here, got recipe.epochs 7 \(here 1\)"),
        (other_hash, "task-0.safetensors: expected the hash of its key, got another"),
        (other_start, "task-0.safetensors: expected what tiny is here, got other weights of the base"),
        (made_on("tpu"), "expected experts that a run on this machine can take, got some that were made on 'tpu'"),
        (newer, "base.safetensors: expected version 1 of tiny, as it is here, got version 2"),
    ],
)
def test_all_of_a_damaged_or_foreign_export_is_refused(
    damage: Callable[[Path], None], message: str, take: Callable[..., list[Taken]], out: Path, tmp_path: Path
) -> None:
    damage(out)
    with pytest.raises(InputError, match=message) as caught:
        take()
    assert "\n" not in str(caught.value)
    assert stored(tmp_path / "here") == []


def test_a_base_that_is_drawn_must_be_drawn_alike_here(toys: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "cache"))
    request = request_for(toys, "tiny", 0, "", KNOBS[:2])
    stream = build_stream(toys, request)
    train(toys, request, stream, [0], "cpu", Cache())
    export_experts(toys, request, stream, "cpu", tmp_path / "out")
    here = Cache(tmp_path / "here")
    untrained = Bases.untrained

    def drawn_otherwise(self: Bases) -> Any:
        model = untrained(self)
        torch.nn.init.ones_(model.head(1).weight)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Bases, "untrained", drawn_otherwise)
        with pytest.raises(InputError, match=r"task-0.* expected what tiny is here, got other weights of the base"):
            import_experts(read_export(tmp_path / "out"), toys, request, stream, here)
    assert stored(here.folder) == []
    taken = import_experts(read_export(tmp_path / "out"), toys, request, stream, here)
    assert taken == [Taken("task-0", "imported"), Taken("task-1", "imported")]


def test_other_data_here_is_another_stream(take: Callable[..., list[Taken]], toys: Registry, tmp_path: Path) -> None:
    other = build_stream(toys, request_for(toys, "tiny", 0, "", [*KNOBS, "stream.p_corr=0.6"]))
    with pytest.raises(InputError, match=r"base.* expected what tiny is here, got other recipe, data or backbone"):
        take(of=other)
    assert stored(tmp_path / "here") == []


@pytest.mark.parametrize("kind", ["base", "expert"])
def test_other_weights_in_the_cache_are_replaced_only_if_told(
    kind: str, take: Callable[..., list[Taken]], made: Path, tmp_path: Path
) -> None:
    entry = next((made / "cache" / kind).glob("*.safetensors"))
    here = tmp_path / "here" / kind / entry.name
    here.parent.mkdir(parents=True)
    others = {name: torch.zeros_like(tensor) for name, tensor in load_file(entry).items()}
    save_file(others, here, {CONTENT: state_sha256(others)})
    with pytest.raises(InputError, match=r"expected a cache without it or with the same weights, .*; give --force to replace"):
        take()
    assert stored(tmp_path / "here") == [here]
    assert sorted(one.state for one in take(force=True)) == ["imported", "imported", "replaced"]
    assert state_sha256(load_file(here)) == state_sha256(load_file(entry))


def test_a_cache_that_cannot_be_written_is_one_line(take: Callable[..., list[Taken]], tmp_path: Path) -> None:
    (tmp_path / "here").write_text("in the way")
    with pytest.raises(OutputError, match=r"expected to write .*; choose another folder"):
        take()


def test_what_an_import_that_was_killed_has_left_is_cleared(take: Callable[..., list[Taken]], tmp_path: Path) -> None:
    left = tmp_path / "here" / "import" / "expert" / "left.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert len(take()) == 3
    assert not left.parent.parent.exists()


def test_differences_of_keys_are_told_part_by_part() -> None:
    ours = {"torch": "2", "recipe": {"lr": 0.1, "epochs": 2}, "data": "a", "seed": 0}
    assert differences(ours, ours) == []
    theirs = {"torch": "2", "recipe": {"lr": 0.2, "epochs": 2}, "data": "b", "task": 1}
    assert differences(theirs, ours) == [
        "other training data",
        "recipe.lr 0.2 (here 0.1)",
        "seed None (here 0)",
        "task 1 (here None)",
    ]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (KeyboardInterrupt(), None),
        (OSError(28, "No space left on device"), "expected to write out into .*, got: No space left on device; free space"),
    ],
)
def test_an_export_that_stops_in_the_middle_leaves_nothing(failure: BaseException, told: str | None, tmp_path: Path) -> None:
    def stop() -> None:
        with new_export(tmp_path / "out", force=False) as folder:
            (folder / "task-0.safetensors").write_text("half")
            raise failure

    with pytest.raises(OutputError if told else KeyboardInterrupt, match=told):
        stop()
    assert list(tmp_path.iterdir()) == []


def test_facts_survive_the_file(tmp_path: Path) -> None:
    facts = Facts("expert", "tiny", "1", "", 3, ["recipe.epochs=1"], "a" * 64, "task-0", {"seed": 3}, "b" * 64)
    write_part(tmp_path / "a.safetensors", facts, {"x": torch.ones(2)})
    assert read_facts(tmp_path / "a.safetensors") == facts
