"""Gram matrices and leading eigenpairs in float64, for less than the whole of either costs.

A Gram matrix is symmetric: half of it is computed, out of a few rows at a time, so that no second copy of the data is made.
`torch.linalg.eigh` and NumPy compute every eigenvector. Divide and conquer finds those of the tridiagonal form cheaply; to turn
them back is what costs. Here only the leading ones are turned back, which saves a third of the time for a fifth of 768 vectors.
SciPy's own wrappers of these routines hold Python's lock, so that threads wait for each other; a call by pointer does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

Array = npt.NDArray[np.float64]

ROWS = 256  # of a float32 matrix that are taken to float64 at once: they stay in the cache
_BLOCK = 64  # columns that LAPACK treats at once; decides how much workspace it likes


def gram(matrix: Tensor) -> Array:
    """(n, n) X^T X of an (m, n) CPU matrix, summed in float64.

    Of NumPy's row-major result only the upper triangle with the diagonal is filled, which is the lower one to LAPACK.

    Args:
        matrix: (m, n) float32, row- or column-major.
    """
    n = matrix.shape[1]
    product = np.zeros((n, n))
    for rows in matrix.split(ROWS):
        is_row_major = matrix.stride(1) == 1
        part = (rows if is_row_major else rows.T).to(torch.float64, memory_format=torch.contiguous_format).numpy()
        # To BLAS a row-major matrix is the transposed one.
        order, leading = ("N", n) if is_row_major else ("T", len(rows))
        _call("dsyrk", "L", order, n, len(rows), 1.0, part, leading, 1.0, product, n)
    return product


def leading_eigenpairs(matrix: Array, count: int) -> tuple[Array, Array]:
    """The largest eigenvalues in descending order, with their vectors.

    Args:
        matrix: (n, n) float64, symmetric, contiguous; the upper triangle suffices. It is overwritten.
        count: How many, 1 ... n.

    Returns:
        (count,) eigenvalues and (n, count) orthonormal vectors in columns.

    Raises:
        numpy.linalg.LinAlgError: If LAPACK does not converge, or is handed what is not finite.
    """
    n = len(matrix)
    values, off, scales = np.empty(n), np.empty(max(1, n - 1)), np.empty(max(1, n - 1))
    work = np.empty(max(1, n * _BLOCK))
    _call("dsytrd", "L", n, matrix, n, values, off, scales, work, len(work))
    vectors = np.empty((n, n)).T  # of the tridiagonal form; column by column, as LAPACK stores them
    both, whole = np.empty(1 + 4 * n + n * n), np.empty(3 + 5 * n, dtype=np.intc)
    _call("dstedc", "I", n, values, off, vectors, n, both, len(both), whole, len(whole))
    leading = vectors[:, n - count :]
    _call("dormtr", "L", "L", "N", n, count, matrix, n, scales, leading, n, work, len(work))
    return values[: n - count - 1 if count < n else None : -1], leading[:, ::-1]


def _call(name: str, *arguments: Array | npt.NDArray[np.intc] | float | str) -> None:
    """Call a routine; everything goes by reference. LAPACK's last argument, what it says about the outcome, is added here."""
    routine, count = _routine(name)
    outcome = ctypes.c_int(0)
    # Kept in a list until the call is over: a pointer alone keeps nothing alive.
    kept = [_by_reference(argument) for argument in arguments]
    routine(*kept, *[ctypes.byref(outcome)] * (count - len(kept)))
    if outcome.value:
        raise np.linalg.LinAlgError(f"{name} failed with {outcome.value}")


def _by_reference(argument: Array | npt.NDArray[np.intc] | float | str) -> Any:
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    if isinstance(argument, int):
        return ctypes.byref(ctypes.c_int(argument))
    if isinstance(argument, float):
        return ctypes.byref(ctypes.c_double(argument))
    return argument.ctypes.data_as(ctypes.c_void_p)


@cache
def _routine(name: str) -> tuple[Callable[..., None], int]:
    """A routine of the BLAS and LAPACK that SciPy was built with, and how many arguments it takes."""
    capsule = (cython_lapack if name in cython_lapack.__pyx_capi__ else cython_blas).__pyx_capi__[name]
    describe, point = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.py_object]
    point.restype, point.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = describe(capsule)
    count = signature.count(b",") + 1
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(point(capsule, signature)), count
