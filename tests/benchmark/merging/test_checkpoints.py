"""Reading from disk, and experts that do not belong to their base."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.checkpoints import LENT, check_alike, differs, opened
from shiftproof.benchmark.merging.inputs import locate
from shiftproof.benchmark.merging.sources import BLOCK, Blocks

State = dict[str, Tensor]
Saved = Callable[..., list[Path]]


def check(files: list[Path]) -> None:
    with opened([locate(file) for file in files]) as (base, *experts):
        check_alike(base, experts)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_whole_tensors_and_runs_are_what_was_saved(states: Any, saved: Saved, suffix: str) -> None:
    made = states(1, torch.bfloat16)
    made[0]["large"] = torch.rand(BLOCK + 11)
    with opened([locate(saved(made[:1], suffix)[0])]) as (base,):
        assert sorted(base.names()) == sorted(made[0])
        for name, tensor in made[0].items():
            assert torch.equal(base.read(name), tensor)
            assert base.nbytes(name) == tensor.nbytes
        blocks = Blocks([base])
        runs = [blocks.read("large", start, BLOCK + 11)[0].clone() for start in blocks.starts(BLOCK + 11)]
    assert torch.equal(torch.cat(runs), made[0]["large"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_tensor_that_is_lent_is_the_one_that_was_saved(states: Any, saved: Saved, suffix: str) -> None:
    made = states(1, torch.bfloat16)
    made[0] |= {"huge": torch.rand(LENT // 4 + 1), "none": torch.zeros(0, 3), "other": torch.rand(4, 2).T}
    with opened([locate(saved(made[:1], suffix)[0])]) as (base,):
        assert all(torch.equal(base.borrow(name), tensor) for name, tensor in made[0].items())


def test_what_a_thread_borrows_takes_the_place_of_what_it_borrowed(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, tmp_path / "base.safetensors")
    with opened([locate(tmp_path / "base.safetensors")]) as (base,), ThreadPoolExecutor(1) as other:
        first, elsewhere = base.borrow("a"), other.submit(base.borrow, "a").result()
        base.borrow("b")
    assert first.tolist() == [3.0, 4.0]
    assert elsewhere.tolist() == [1.0, 2.0]


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3), "b": torch.rand(2, 2), "c": torch.rand(1)}
    save_file({"a": tensors["a"], "c": tensors["c"]}, tmp_path / "1.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "2.safetensors")
    where = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    with opened([locate(tmp_path)]) as (shards,):
        assert {name: shards.homes[name].name for name in shards.names()} == where
        assert all(torch.equal(shards.read(name), tensor) for name, tensor in tensors.items())
    index.write_text(json.dumps({"weight_map": {**where, "b": "1.safetensors"}}))
    with (
        pytest.raises(InputError, match=r"m\.safetensors\.index\.json: expected it to tell what lies in 1\.safetensors"),
        opened([locate(tmp_path)]),
    ):
        pass


def test_experts_of_every_format_go_together(states: Any, saved: Saved) -> None:
    made = states(3)
    base, first, second, _ = saved(made)
    third = saved(made, ".pt")[3]
    check([base, first, second, third])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("fc.bias"), r"expected the tensors of .*base\.safetensors, got those without 'fc\.bias'$"),
        (lambda s: s.update(extra=torch.ones(1)), r"got those with 'extra'$"),
        (lambda s: (s.pop("scale"), s.update(x=torch.ones(1))), r"got those without 'scale' and with 'x'$"),
        (lambda s: s.update({f"x{i}": torch.ones(1) for i in range(5)}), r"with 'x0', 'x1', 'x2' and 2 more$"),
        (lambda s: s.update(scale=torch.ones(2)), r"expected every shape as in .*, got 'scale' \(2,\) for \(\)$"),
        (lambda s: s.update(scale=s["scale"].half()), r"expected every dtype as in .*, got 'scale' float16 for float32$"),
    ],
)
def test_an_expert_with_other_tensors_is_refused_with_the_first_few(
    states: Any, saved: Saved, edit: Callable[[State], Any], message: str
) -> None:
    made = states(3)
    edit(made[2])
    with pytest.raises(InputError, match=message) as caught:
        check(saved(made))
    assert "expert-2.safetensors: " in str(caught.value)


def test_an_expert_that_is_its_base_is_refused_by_name(states: Any, saved: Saved) -> None:
    made = states(3)
    counter = made[2]["bn.num_batches_tracked"]
    made[2] = {**made[0], "bn.num_batches_tracked": counter}
    with pytest.raises(InputError, match=r"expert-2\.safetensors: expected an expert that differs .* delta is zero everywhere"):
        check(saved(made))


def test_one_file_given_twice_is_refused_and_two_of_the_same_content_are_not(states: Any, saved: Saved) -> None:
    made = states(1)
    base, first, second = saved([*made, made[1]])
    check([base, first, second])
    with pytest.raises(InputError, match=r"expected every expert once, got .*expert-1\.safetensors twice; leave one out"):
        check([base, first, first])
    link = base.with_name("link.safetensors")
    link.symlink_to(first)
    with pytest.raises(InputError, match=r"got .*link\.safetensors and .*expert-1\.safetensors, which are one file"):
        check([base, first, link])


@pytest.mark.parametrize("tensors", [{}, {"n": torch.arange(3)}, {"w": torch.zeros(0, 3)}])
def test_checkpoints_without_floating_point_numbers_are_refused_as_such(saved: Saved, tensors: State) -> None:
    others = [{name: tensor + place for name, tensor in tensors.items()} for place in (1, 2)]
    with pytest.raises(InputError, match=r"base\.safetensors: expected floating-point tensors, got none"):
        check(saved([tensors, *others]))


def test_a_damaged_file_is_named_by_its_whole_path(states: Any, saved: Saved, tmp_path: Path) -> None:
    made = saved(states(1))
    for folder, content in (("a", made[0].read_bytes()), ("b", made[1].read_bytes()[:-1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/b/model.safetensors: expected a complete safetensors file"):
        check([tmp_path / folder / "model.safetensors" for folder in "aab"])


def test_one_expert_is_too_few(states: Any, saved: Saved) -> None:
    with pytest.raises(InputError, match="expected two experts or more, got 1"):
        check(saved(states(1)))


def test_a_difference_in_the_last_element_is_found(saved: Saved) -> None:
    base = {"a": torch.zeros(BLOCK + 9), "b": torch.ones(3)}
    other = {name: tensor.clone() for name, tensor in base.items()}
    with opened([locate(file) for file in saved([base, other])]) as (ours, theirs):
        assert not differs(ours, theirs)
    other["a"][-1] = 1.0
    with opened([locate(file) for file in saved([base, other])]) as (ours, theirs):
        assert differs(ours, theirs)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(states: Any, saved: Saved) -> None:
    (file, *_) = saved(states(1))
    with opened([locate(file)]) as (base,):
        file.write_bytes(file.read_bytes()[:-10])
        last = max(base.names(), key=lambda name: base.entries[name].offset)
        with pytest.raises(InputError, match="was the file changed"):
            base.read(last)


def test_files_are_closed_at_the_end(states: Any, saved: Saved) -> None:
    (file, *_) = saved(states(1))
    with opened([locate(file)]) as (base,):
        pass
    with pytest.raises(InputError, match="Bad file descriptor"):
        base.read("scale")
    assert load_file(file)  # the library agrees that it is sound
