"""Symmetric matrices stored as their lower triangle: half the bytes.

Packing does not read above the diagonal, and unpacking gives a matrix symmetric to the bit.
"""

import math

from torch import Tensor


def triangle_size(size: int) -> int:
    """Return the number of entries on and below the diagonal, ``size (size + 1) / 2``."""
    return size * (size + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return the lower triangle of a matrix ``(M, M)``, row by row, ``(M (M + 1) / 2,)``."""
    size = len(matrix)
    packed = matrix.new_empty(triangle_size(size))
    # Row by row: an index of the whole triangle would take four times the bytes of the matrix.
    for row in range(size):
        start = triangle_size(row)
        packed[start : start + row + 1] = matrix[row, : row + 1]
    return packed


def unpack_triangle(packed: Tensor) -> Tensor:
    """Return the symmetric matrix ``(M, M)`` of a packed triangle ``(M (M + 1) / 2,)``."""
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    if packed.ndim != 1 or triangle_size(size) != packed.numel():
        raise ValueError(f"{tuple(packed.shape)} is not the shape of a packed triangle")
    matrix = packed.new_empty(size, size)
    for row in range(size):
        start = triangle_size(row)
        values = packed[start : start + row + 1]
        matrix[row, : row + 1] = values
        matrix[: row + 1, row] = values
    return matrix
