"""Copies tensors of the checkpoint into the parameters of one layer. Pure torch."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from grasp_lightning_vllm.parts import Part

_SHARDS: Final = {"q": 0, "k": 1, "v": 2}


class PartLoader:
    """The weight loaders of a layer, and which of its tensors have come.

    The parameters of the layer are: ``weight``, the right factors and dense matrices of all parts
    stacked, (sum of heights, inputs); ``left.weight``, the left factors one after another, flat;
    ``bias``, (outputs).

    Args:
        parts: What this process holds.
        has_bias: Whether the linears of the checkpoint have biases.
    """

    def __init__(self, parts: Sequence[Part], *, has_bias: bool) -> None:
        self.parts = parts
        self._tops = _starts([part.height for part in parts])
        self._lefts = _starts([num_left(part) for part in parts])
        self._outputs = _starts([part.num_outputs for part in parts])
        keys = [f"{part.module}.weight" for part in parts]
        keys += [f"{part.module}.left.weight" for part in parts if part.rank is not None]
        if has_bias:
            keys += [_bias_key(part) for part in parts]
        self._awaited = dict.fromkeys(keys)

    def weight(self, parameter: Tensor, loaded: Tensor, shard: object = None) -> None:
        """Load ``<module>.weight``: a right factor, or a dense or narrowed matrix."""
        i, part = self._part(shard)
        rows, columns = part.shape
        key = f"{part.module}.weight"
        self._check(key, loaded, (rows if part.rank is None else part.rank, columns))
        if part.rank is None:
            loaded = _rows(loaded, part)
        self._copy(parameter, self._tops[i], loaded[:, slice(*part.columns)], key)

    def left(self, parameter: Tensor, loaded: Tensor, shard: object = None) -> None:
        """Load ``<module>.left.weight``, a left factor."""
        i, part = self._part(shard)
        key = f"{part.module}.left.weight"
        if part.rank is None:
            raise ValueError(f"{key} belongs to a low-rank linear, but the config names no rank")
        self._check(key, loaded, (part.shape[0], part.rank))
        self._copy(parameter, self._lefts[i], _rows(loaded, part).flatten(), key)

    def bias(self, parameter: Tensor, loaded: Tensor, shard: object = None) -> None:
        """Load a bias; vLLM adds that of a layer which is split by inputs in one process only."""
        i, part = self._part(shard)
        self._check(_bias_key(part), loaded, (part.shape[0],))
        self._copy(parameter, self._outputs[i], _rows(loaded, part), _bias_key(part))

    def check_complete(self) -> None:
        """Raise a ``ValueError`` that names the tensors that did not come."""
        if self._awaited:
            raise ValueError(f"the checkpoint lacks {', '.join(self._awaited)}")

    def _part(self, shard: object) -> tuple[int, Part]:
        index = _SHARDS.get(shard, shard) if isinstance(shard, str) else shard
        if index is None and len(self.parts) == 1:
            index = 0
        if not isinstance(index, int) or index >= len(self.parts):
            names = ", ".join(part.module for part in self.parts)
            raise ValueError(f"expected a tensor of one of {names}, got one of shard {shard!r}")
        return index, self.parts[index]

    @staticmethod
    def _check(key: str, loaded: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(loaded.shape) != shape:
            raise ValueError(f"{key} must have shape {shape}, got {tuple(loaded.shape)}")

    def _copy(self, parameter: Tensor, start: int, values: Tensor, key: str) -> None:
        parameter.data[start : start + len(values)].copy_(values)
        self._awaited.pop(key, None)


def num_left(part: Part) -> int:
    """Return the number of elements of a part's left factor."""
    return part.num_outputs * (part.rank or 0)


def left_factors(parts: Sequence[Part], flat: Tensor) -> list[Tensor | None]:
    """Return the left factor of each part, (outputs, rank); None for rank 0 and dense parts."""
    pieces = torch.split(flat, [num_left(part) for part in parts])
    return [
        # A copy of its own, for the alignment that fast kernels need.
        piece.view(part.num_outputs, part.rank).clone() if part.rank else None
        for part, piece in zip(parts, pieces, strict=True)
    ]


def _rows(values: Tensor, part: Part) -> Tensor:
    return torch.cat([values[slice(*span)] for span in part.rows])


def _bias_key(part: Part) -> str:
    return f"{part.module}.bias" if part.rank is None else f"{part.module}.left.bias"


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]
