"""A strategy has its process to itself only for as long as its cell runs: what it sets does not reach the next one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Setting = tuple[Callable[[], Any], Callable[[Any], object]]
"""How a setting of the whole process is read, and how it is set."""


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # any device, named, costs every call a look


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


_SETTINGS: tuple[Setting, ...] = (
    (_folder, os.chdir),
    (lambda: dict(os.environ), _set_environment),
    (np.geterr, lambda handling: np.seterr(**handling)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.backends.mkldnn.enabled, lambda on: torch.backends.mkldnn.set_flags(on, _fp32_precision=None)),
    (lambda: torch.backends.cudnn.enabled, lambda on: torch.backends.cudnn.set_flags(on, _fp32_precision=None)),
    (
        lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        lambda both: torch.backends.cudnn.set_flags(_benchmark=both[0], _deterministic=both[1], _fp32_precision=None),
    ),
)


@contextmanager
def own_process() -> Iterator[None]:
    """Settings of the whole process are afterwards as they were before: threads, precision, gradients, folder, environment."""
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), was in zip(_SETTINGS, before, strict=True):
            if read() != was:
                write(was)
