"""Specifications written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from torch import Tensor, nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.architectures.modules import shapes_of
from shiftproof.benchmark.transporting.equivalence import check_equivalence
from shiftproof.benchmark.transporting.notation import from_text, read_specification, to_text
from shiftproof.benchmark.transporting.specification import Run
from tests.benchmark.transporting.zoo import NETS, filled, vectors


class Odd(nn.Module):
    """Attention on a residual stream between two linear maps, then all tokens flattened: no architecture that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)  # (B, 5, 8)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(x.transpose(1, 2).flatten(1))


BY_HAND: dict[str, Any] = {
    "axes": {
        "into.weight": ["stream", None],
        "into.bias": ["stream"],
        "attn.in_proj_weight": ["attn + attn + attn", "stream"],
        "attn.in_proj_bias": ["attn + attn + attn"],
        "attn.out_proj.weight": ["last", "attn"],
        "attn.out_proj.bias": ["last"],
        "head.weight": [None, "last * 5"],
        "head.bias": [None],
    },
    "heads": {"attn": 2},
    "chains": [["stream", "last"]],
}


def written(folder: Path, content: object) -> Path:
    path = folder / "spec.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_specification_by_hand_describes_a_network_that_nobody_knows(tmp_path: Path) -> None:
    model = filled(Odd())
    spec = read_specification(written(tmp_path, BY_HAND), shapes_of(model))
    assert spec.sizes == {"stream": 8, "attn": 8, "last": 8}
    assert spec.axes["head.weight"] == ((), (Run("last", 5),))
    assert (spec.heads, spec.chains, spec.output) == ({"attn": 2}, (("stream", "last"),), "")
    assert check_equivalence(model, spec, (vectors(4, 5, 6),), 1e-9) < 1e-9


@pytest.mark.parametrize("name", NETS)
def test_what_is_written_is_what_is_read(name: str) -> None:
    model = NETS[name].build()
    spec = derive_model(model)
    assert from_text(to_text(spec), shapes_of(model)) == spec


def test_a_tensor_is_a_line() -> None:
    text = to_text(derive_model(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    assert text.splitlines()[1:3] == [' "axes": {', '  "0.weight": ["0", null],']
    assert len(text.splitlines()) == 2 + 1 + 4 + 1 + 3


def _without(field: str) -> dict[str, Any]:
    return {name: value for name, value in BY_HAND.items() if name != field}


def _axis(entry: object) -> dict[str, Any]:
    return {**BY_HAND, "axes": {**BY_HAND["axes"], "into.bias": entry}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a complete JSON file"),
        ([], "expected a JSON object, got list"),
        (_without("axes"), "expected the fields axes, heads, chains, output, got no axes"),
        ({**BY_HAND, "head": {}}, "expected the fields axes, heads, chains, output, got 'head'"),
        ({**BY_HAND, "axes": []}, r"expected axes as an object, got \[\]"),
        ({**BY_HAND, "heads": 2}, "expected heads as an object, got 2"),
        ({**BY_HAND, "heads": {"attn": 2.0}}, "expected a number of heads for 'attn', got 2.0"),
        ({**BY_HAND, "heads": {"attn": True}}, "expected a number of heads for 'attn', got true"),
        ({**BY_HAND, "heads": {"attn": 3}}, "attn: expected a number of heads that divides 8, got 3"),
        ({**BY_HAND, "heads": {"attention": 2}}, "expected a permutation that acts on an axis, got 'attention'"),
        ({**BY_HAND, "chains": ["stream"]}, "expected chains as lists of names"),
        ({**BY_HAND, "chains": [["stream", 1]]}, "expected chains as lists of names"),
        ({**BY_HAND, "chains": [["stream", "tail"]]}, "expected a permutation that acts on an axis, got 'tail'"),
        ({**BY_HAND, "output": None}, "expected the name of a permutation as output, got null"),
        ({**BY_HAND, "output": "tail"}, "expected a permutation that acts on an axis, got 'tail'"),
        (_axis("stream"), "axes of 'into.bias': expected a list with an entry for each dimension"),
        (_axis([2]), r'"name \+ name" or null, got 2'),
        (_axis([""]), r'"name \+ name" or null, got ""'),
        (_axis(["stream *"]), '"name \\* 2".* or null, got "stream \\*"'),
        (_axis(["stream * 0"]), 'or null, got "stream \\* 0"'),
        (_axis(["stream +"]), 'or null, got "stream \\+"'),
        (_axis(["stream", None]), "expected 1 axes of 'into.bias', got 2"),
        (_axis(["stream * 2"]), "expected 8 units of 'stream' on axis 0 of 'into.bias', got 4"),
        ({**BY_HAND, "axes": {**BY_HAND["axes"], "tail.bias": [None]}}, "only tensors that are there, not tail.bias"),
        ({**BY_HAND, "axes": {"into.bias": ["stream"]}}, "expected it to cover attn.in_proj_bias, .* and 4 more"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(content: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_specification(path, shapes_of(Odd()))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: expected a specification in JSON, got No such file"):
        read_specification(tmp_path / "none.json", {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary: expected a specification in JSON, got no text"):
        read_specification(tmp_path / "binary", {})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


# A matrix has two axes, so that a third is wrong whatever it is.
@given(VALUES)
def test_any_other_json_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError, match=r"\A[^\n]*\Z"):
        from_text(json.dumps({"axes": {"weight": [None, None, value]}}), {"weight": (4, 4)})
