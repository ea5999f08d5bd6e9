"""Specifications derived from the names and shapes of known architectures."""

from shiftproof.benchmark.transporting.architectures.deriving import derive as derive, derive_model as derive_model
