"""Cosines and angles of hidden states by loops over tokens and coordinates, in Python floats."""

import math

from torch import Tensor


def naive_cosines(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> list[float]:
    """One cosine per real token, in reading order."""
    cosines = []
    for window in range(hidden_in.shape[0]):
        for token in range(hidden_in.shape[1]):
            if not mask[window, token]:
                continue
            dot = norm_in = norm_out = 0.0
            for coordinate in range(hidden_in.shape[2]):
                a = float(hidden_in[window, token, coordinate])
                b = float(hidden_out[window, token, coordinate])
                dot += a * b
                norm_in += a * a
                norm_out += b * b
            cosines.append(dot / (math.sqrt(norm_in) * math.sqrt(norm_out)))
    return cosines


def naive_cosine_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> float:
    """Sum of the cosines over real tokens."""
    return sum(naive_cosines(hidden_in, hidden_out, mask))


def naive_angular_distance_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> float:
    """Sum over real tokens of the angle, as a share of pi."""
    cosines = naive_cosines(hidden_in, hidden_out, mask)
    return sum(math.acos(max(-1.0, min(1.0, cosine))) / math.pi for cosine in cosines)


def naive_block_influence(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> float:
    """One minus the mean cosine over real tokens."""
    cosines = naive_cosines(hidden_in, hidden_out, mask)
    return 1 - sum(cosines) / len(cosines)
