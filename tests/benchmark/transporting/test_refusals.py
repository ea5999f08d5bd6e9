"""Networks that no specification can be derived for are refused in one line that says why."""

from __future__ import annotations

import pytest
import torchvision.models as tv
from torch import nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures import derive, derive_model
from shiftproof.benchmark.transporting.architectures.modules import shapes_of
from shiftproof.benchmark.transporting.specification import PermutationSpec, Shapes
from tests.benchmark.transporting.zoo import clip, hugging_face, timm_vit, torchvision_vit

slow = pytest.mark.xdist_group("slow-imports")


def vit_shapes(**facts: int) -> Shapes:
    return shapes_of(torchvision_vit(**facts))


def test_heads_that_nobody_gave_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"encoder_layer_0.*which shapes do not tell; give it with --heads"):
        derive(vit_shapes())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match="expected a number of heads that divides 16, got 3"):
        derive(vit_shapes(), heads=3)


def test_a_tensor_too_many_is_named() -> None:
    with pytest.raises(InputError, match=r"expected it to cover adapter\.down\.weight"):
        derive({**vit_shapes(), "adapter.down.weight": (4, 16)}, heads=4)


def test_a_tensor_that_is_missing_is_named() -> None:
    shapes = dict(vit_shapes())
    del shapes["encoder.layers.encoder_layer_1.self_attention.out_proj.weight"]
    with pytest.raises(InputError, match=r"encoder_layer_1\.self_attention\.out_proj\.weight.*got none"):
        derive(shapes, heads=4)


def test_a_gap_between_the_blocks_is_no_shorter_network() -> None:
    shapes = {name.replace("encoder_layer_1", "encoder_layer_2"): shape for name, shape in vit_shapes().items()}
    with pytest.raises(InputError, match=r"expected it to cover encoder\.layers\.encoder_layer_2\."):
        derive(shapes, heads=4)


def test_an_unknown_architecture_is_told_what_is_known() -> None:
    with pytest.raises(InputError, match=r"a ResNet.*got weight_ih_l0.*give a specification"):
        derive_model(nn.LSTM(3, 4))


def test_a_head_that_reads_two_vectors_in_one_is_not_taken_for_one_that_reads_maps() -> None:
    shapes = {**vit_shapes(headless=True), "head.weight": (5, 32), "head.bias": (5,)}
    with pytest.raises(InputError, match=r"expected 16 units of .* on axis 1 of 'head\.weight', got 32"):
        derive(shapes, heads=4)


def test_two_networks_that_nothing_joins_are_refused() -> None:
    both = nn.ModuleDict({"left": tv.resnet18(), "right": tv.resnet18()})
    for tower in both.values():
        tower.fc = nn.Identity()
    with pytest.raises(InputError, match="expected one network or two towers with a joint embedding, got 2 networks"):
        derive_model(both)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_of_a_module_are_named(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).to(device)
    assert len(derive_model(model).sizes) == 1
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match=r"no tied weights, got one tensor as 0\.weight and 2\.weight"):
        derive_model(model)


def _language_model() -> nn.Module:
    return hugging_face("BertForMaskedLM", "BertConfig")


@slow
def test_a_head_that_predicts_words_has_tied_weights() -> None:
    model = _language_model()
    with pytest.raises(InputError, match=r"bert\.embeddings\.word_embeddings\.weight and cls\.predictions\.decoder\.weight"):
        derive_model(model)
    # As safetensors stores it, without the tensor that has a second name.
    shapes = {name: shape for name, shape in shapes_of(model).items() if name != "cls.predictions.decoder.weight"}
    with pytest.raises(InputError, match=r"cls\.predictions\.\S+ expected a model without tied weights"):
        derive(shapes, heads=4)


@slow
def test_norms_of_queries_and_keys_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected it to cover blocks\.0\.attn\.k_norm"):
        derive_model(timm_vit(qk_norm=True))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.ChannelShuffle(2), "ChannelShuffle"),
    ],
)
def test_layers_that_do_not_treat_units_alike_are_refused(layer: nn.Module, kind: str) -> None:
    with pytest.raises(InputError, match=f"^1: .* got a {kind}"):
        derive_model(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 3)))


def test_a_resnet_with_norms_of_groups_is_refused_by_its_names() -> None:
    model = tv.resnet18(norm_layer=lambda width: nn.GroupNorm(2, width))
    with pytest.raises(InputError, match="bn1: expected running statistics of a batch norm"):
        derive(shapes_of(model))


def test_convolutions_of_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"on axis 1 of 'layer1\.0\.conv2\.weight'"):
        derive_model(tv.resnext50_32x4d())


def _tower(width: int, visual: bool, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tower of open_clip, one block deep."""
    block = f"{prefix}transformer.resblocks.0."
    vectors = dict.fromkeys((f"{block}{norm}.{part}" for norm in ("ln_1", "ln_2") for part in ("weight", "bias")), (width,))
    first = (
        {"class_embedding": (width,), "conv1.weight": (width, 3, 4, 4)} if visual else {"token_embedding.weight": (9, width)}
    )
    return {
        **{prefix + name: shape for name, shape in first.items()},
        **vectors,
        f"{block}attn.in_proj_weight": (3 * width, width),
        f"{block}attn.out_proj.weight": (width, width),
        f"{block}mlp.c_fc.weight": (width, width),
        f"{block}mlp.c_proj.weight": (width, width),
        f"{prefix}{'proj' if visual else 'text_projection'}": (width, 8),
    }


def test_towers_of_open_clip_have_heads_of_64_units_up_to_a_width() -> None:
    from shiftproof.benchmark.transporting.architectures.clip import NARROW

    def heads(spec: PermutationSpec) -> list[int]:
        return list(spec.heads.values())

    both = {**_tower(768, True, "visual."), **_tower(512, False)}
    assert heads(derive(both)) == [12, 8]
    assert heads(derive(both, heads=6)) == [6, 8]
    wide = _tower(NARROW + 256, True, "visual.")
    assert heads(derive({**wide, **_tower(1024, False)}, heads=16)) == [16, 16]
    with pytest.raises(InputError, match=r"visual\.transformer.*which shapes do not tell"):
        derive(wide)


@slow
def test_the_width_of_heads_is_that_of_every_configuration_of_open_clip() -> None:
    import open_clip

    from shiftproof.benchmark.transporting.architectures.clip import HEAD_WIDTH, NARROW

    towers = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if isinstance(vision.get("layers"), int) and "timm_model_name" not in vision:
            towers.append((vision["width"], vision.get("head_width", 64)))
        if "hf_model_name" not in text:
            towers.append((text["width"], text["width"] / text["heads"]))
    narrow = [head_width for width, head_width in towers if width <= NARROW]
    assert len(narrow) > 100
    assert set(narrow) == {HEAD_WIDTH}


@slow
def test_towers_with_different_heads_are_read_off_the_module() -> None:
    spec = derive_model(clip())
    assert {name.startswith("visual."): heads for name, heads in spec.heads.items()} == {True: 4, False: 6}
