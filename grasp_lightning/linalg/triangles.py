"""Symmetric matrices stored as their lower triangle: half the bytes.

Packing does not read above the diagonal, and unpacking gives a matrix symmetric to the bit. Several
matrices of one size may be stacked in front.
"""

import math

from torch import Tensor


def triangle_size(size: int) -> int:
    """Return the number of entries on and below the diagonal, ``size (size + 1) / 2``."""
    return size * (size + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return lower triangles row by row, ``(..., M, M) -> (..., M (M + 1) / 2)``."""
    size = matrix.shape[-1]
    packed = matrix.new_empty((*matrix.shape[:-2], triangle_size(size)))
    # Row by row: an index of the whole triangle would take four times the bytes of the matrix.
    for row in range(size):
        start = triangle_size(row)
        packed[..., start : start + row + 1] = matrix[..., row, : row + 1]
    return packed


def unpack_triangle(packed: Tensor) -> Tensor:
    """Return the symmetric matrices of packed triangles, ``(..., M (M + 1) / 2) -> (..., M, M)``.

    Raises:
        ValueError: If no triangle has that many entries.
    """
    entries = packed.shape[-1] if packed.ndim else 0
    size = (math.isqrt(8 * entries + 1) - 1) // 2
    if packed.ndim == 0 or triangle_size(size) != entries:
        raise ValueError(f"{tuple(packed.shape)} is not the shape of a packed triangle")
    matrix = packed.new_empty((*packed.shape[:-1], size, size))
    for row in range(size):
        start = triangle_size(row)
        values = packed[..., start : start + row + 1]
        matrix[..., row, : row + 1] = values
        matrix[..., : row + 1, row] = values
    return matrix
