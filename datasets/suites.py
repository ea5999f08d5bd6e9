"""The standard suites over the streams that ship here."""

from __future__ import annotations

from shiftproof.benchmark import SuiteSpec, hookimpl
from shiftproof.datasets.digits import NAMES

QUICK = ("sgd", "joint", "er", "gdro", "bpa", "clusterfix", "lws")
DIGITS = (
    "sgd",
    "joint",
    "er",
    "er-ace",
    "der++",
    "gdro",
    "bgs",
    "bpa",
    "bpa-replay",
    "clusterfix",
    "clusterfix-replay",
    "george",
    "lff",
    "lws",
)
PRESETS = ("lws@released", "bpa@released", "gdro@released", "george@released")
AVALANCHE = ("avalanche-replay", "avalanche-ewc", "avalanche-lwf", "avalanche-agem", "avalanche-gem")
STREAMS = ("b-digits", "split-digits", "split-digits-class", *(f"digits-offline-{name}" for name in NAMES))


@hookimpl
def shiftproof_suites() -> list[SuiteSpec]:
    """`quick`, `digits` and `digits-all`."""
    return [
        SuiteSpec(
            "quick",
            "a first look in a minute: seven strategies on the biased digits, two seeds, a short recipe of its own",
            ("b-digits",),
            QUICK,
            seeds=(0, 1),
            overrides=("recipe.epochs=10",),
            recipe="quick",
        ),
        SuiteSpec("digits", "every strategy on the biased digits, three seeds", ("b-digits",), DIGITS),
        SuiteSpec(
            "digits-all",
            "every strategy, preset and Avalanche's strategies on every stream of digits, three seeds",
            STREAMS,
            (*DIGITS, *PRESETS, *AVALANCHE),
        ),
    ]
