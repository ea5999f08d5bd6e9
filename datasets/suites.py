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
PRESETS = ("lws@released", "bpa@released", "bpa-replay@released", "gdro@released", "george@released", "bgs@paper")
AVALANCHE = ("avalanche-naive", "avalanche-replay", "avalanche-ewc", "avalanche-lwf", "avalanche-agem", "avalanche-gem")
REFERENCES = ("zero-shot", "experts", "ensemble")
MERGES = (
    "weight-average",
    "task-arithmetic",
    "magmax",
    "dare",
    "ties",
    "ties@thesis",
    "pcb",
    "pcb@standalone",
    "fisher",
    "regmean",
    "tsv",
    "iso-c",
    "iso-cts",
    "score@paper",
    "score@released",
    "score@diagonal",
    "score@off-diagonal",
    "score@full-matrix",
)
LEARNERS = tuple(name for name in DIGITS if name not in ("gdro", "bgs"))  # a domain has no groups to be told
TRANSPORTS = (
    "target-base",
    "source-expert",
    "retrained",
    "vanilla",
    "git-rebasin",
    "ot",
    "transfusion@paper",
    "transfusion@released",
    "transfusion@shared",
    "transfusion@brute-force",
    "transfusion@no-attention",
    "transfusion@no-residual",
    "transfusion@head-only",
    "transfusion-few-shot",
    "transfusion-few-shot@not-permuted",
)
STREAMS = ("b-digits", "split-digits", "split-digits-class", *(f"digits-offline-{name}" for name in NAMES))


@hookimpl
def shiftproof_suites() -> list[SuiteSpec]:
    """`quick`, `digits`, `digits-all`, `domains` and `releases`."""
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
        SuiteSpec(
            "domains",
            "every merge and every strategy that trains without groups, Avalanche's too, each domain held out, three seeds",
            ("digits-domains",),
            (*REFERENCES, *MERGES, *LEARNERS, *AVALANCHE),
        ),
        SuiteSpec(
            "releases",
            "fine-tunings carried to a new release of the backbone, with heads of their own and with shared ones, three seeds",
            ("digits-releases", "digits-releases-open"),
            TRANSPORTS,
        ),
    ]
