"""How training is done: the same recipe for every strategy on a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Optimizer = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class Recipe:
    """Budget and optimization of one experience. It belongs to the stream, not to the strategy."""

    name: str = "standard"
    epochs: Annotated[int, Ge(1)] = 20  # per experience
    batch_size: Annotated[int, Ge(1)] = 32
    optimizer: Optimizer = "sgd"
    lr: Annotated[float, Gt(0)] = 0.05
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9  # of sgd
    weight_decay: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"  # per step, made anew for every experience
    warmup_steps: Annotated[int, Ge(0)] = 0  # linear, before the schedule
    clip_norm: Annotated[float, Ge(0)] = 0.0  # of the gradient; 0 = off
    augment: Literal["none", "shift", "crop-flip"] = "none"  # on training inputs; none of them touches colour
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16 = autocast


@dataclass(frozen=True)
class BaseRecipe:
    """The model that every strategy of a stream starts from, or a new release of it.

    Kinds: "random" weights; "barlow-twins" without labels; "supervised" with a head of its own for task 0; "class-embeddings",
    the same against a fixed head that all such bases share, as releases of CLIP share the embeddings of class names; a "file".
    """

    backbone: str  # a registered backbone
    kind: Literal["random", "barlow-twins", "supervised", "class-embeddings", "file"] = "random"
    seed: Annotated[int, Ge(0)] = 0  # one base for all seeds of a stream, as with published pre-trained weights
    epochs: Annotated[int, Ge(1)] = 20
    batch_size: Annotated[int, Ge(2)] = 256  # thesis 4.3.1
    lr: Annotated[float, Gt(0)] = 1e-3  # Adam
    dim: Annotated[int, Ge(1)] = 256  # output of the projector; thesis: 1024 on CelebA
    redundancy: Annotated[float, Ge(0), Le(1)] = 5e-3  # lambda of Zbontar et al., arXiv:2103.03230
    file: str = ""  # safetensors, for kind="file"

    @property
    def has_head(self) -> bool:
        """It learns from labels and brings the head of task 0, which answers before anything else was learned."""
        return self.kind in ("supervised", "class-embeddings")

    @property
    def is_learned(self) -> bool:
        """It is trained here, and kept in the cache."""
        return self.kind not in ("random", "file")
