"""Embeddings and heads whose rows lie in groups, and most groups are products of two factors.

This file needs only torch: its text is copied into every saved model, like that of ``lowrank.py``.

Legend: V tokens, d hidden size, V_g rows of group g, r_g its rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

# Keys of ``rows_settings``.
SIZES, RANKS, SCALE, TIED_TO = "sizes", "ranks", "scale", "tied_to"
_SELF_MADE = {frozenset({SIZES, RANKS, SCALE}), frozenset({SIZES, RANKS}), frozenset({TIED_TO})}


class RowGroups(nn.Module):
    """A matrix with one row per token, ``(V, d)``, whose rows are stored group by group.

    Group 0 is dense and stored as ``weight``, ``(V_0, d)``: a program that does not know this
    format finds a tensor of the wrong shape and stops. Group g is ``left_g @ right_g``, of shapes
    ``(V_g, r_g)`` and ``(r_g, d)``. ``position`` says for each token which of the stored rows is
    its own, ``(V,)`` int32.

    Args:
        sizes: V_g of every group, the dense one first.
        ranks: r_g of every group but the dense one.
        features: d.
    """

    position: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int],
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.ranks = tuple(sizes), tuple(ranks)
        options: Any = {"device": device, "dtype": dtype}  # Any: keyword arguments
        self.weight = nn.Parameter(torch.empty(sizes[0], features, **options))
        for group, (size, rank) in enumerate(zip(sizes[1:], ranks, strict=True), start=1):
            left, right = torch.empty(size, rank, **options), torch.empty(rank, features, **options)
            self.register_parameter(f"left_{group}", nn.Parameter(left))
            self.register_parameter(f"right_{group}", nn.Parameter(right))
        position = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.register_buffer("position", position)

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield left and right factor of every group but the dense one."""
        for group in range(1, len(self.sizes)):
            yield self.get_parameter(f"left_{group}"), self.get_parameter(f"right_{group}")

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of some tokens, ``(...)`` -> ``(..., d)``.

        Every group computes all of them, and those of other groups are zero: their number does not
        depend on the text, so the call can be compiled, and nothing of size V x d is made.
        """
        places = self.position[ids]
        found = self._own_rows(self.weight, places, 0)
        start = self.sizes[0]
        for left, right in self.factors():
            found = found + self._own_rows(left, places, start) @ right
            start += len(left)
        return found

    @staticmethod
    def _own_rows(matrix: Tensor, places: Tensor, start: int) -> Tensor:
        """Return rows of one group; those of tokens of other groups are zero."""
        if len(matrix) == 0:
            return matrix.new_zeros((*places.shape, matrix.shape[1]))
        own = places - start
        is_inside = (own >= 0) & (own < len(matrix))
        return matrix[own.clamp(0, len(matrix) - 1)] * is_inside[..., None]

    def products(self, hidden: Tensor) -> Tensor:
        """Return the products of hidden states with all rows, ``(..., d)`` -> ``(..., V)``."""
        parts = [hidden @ self.weight.mT]
        parts += [(hidden @ right.mT) @ left.mT for left, right in self.factors()]
        return torch.cat(parts, dim=-1).index_select(-1, self.position)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the whole matrix, ``(V, d)``, computed in float32 or better."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        parts = [self.weight.to(wide)]
        parts += [left.to(wide) @ right.to(wide) for left, right in self.factors()]
        return torch.cat(parts)[self.position].to(self.weight.dtype)


class FactorizedEmbedding(RowGroups):
    """An embedding with factorized groups of rows; ``scale`` multiplies every row."""

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int],
        features: int,
        *,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(sizes, ranks, features, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = sum(sizes), features
        self.padding_idx = None
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in nn.Embedding
        """Return the scaled rows of some tokens, ``(B, T)`` -> ``(B, T, d)``."""
        found = self.rows(input)
        # In the dtype of the rows, as families that scale their embedding do.
        return found if self.scale == 1 else found * found.new_full((), self.scale)


class FactorizedHead(RowGroups):
    """A head with factorized groups of rows of its own."""

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int],
        features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(sizes, ranks, features, device=device, dtype=dtype)
        self.in_features, self.out_features = features, sum(sizes)
        options: Any = {"device": device, "dtype": dtype}  # Any: keyword arguments
        own = nn.Parameter(torch.empty(sum(sizes), **options)) if bias else None
        self.register_parameter("bias", own)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in nn.Linear
        """Return the logits of hidden states, ``(..., d)`` -> ``(..., V)``."""
        logits = self.products(input)
        bias: Tensor | None = self._parameters["bias"]
        return logits if bias is None else logits + bias


class TiedHead(nn.Module):
    """A head that multiplies with the rows of a factorized embedding.

    Its ``weight`` is the embedding's, which transformers ties; factors are read from the embedding.
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # In a tuple, so that it is not registered: its parameters have one name, the embedding's.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.weight = embedding.weight
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> FactorizedEmbedding:
        """The embedding whose rows it shares."""
        return self._embedding[0]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in nn.Linear
        """Return the logits of hidden states, ``(..., d)`` -> ``(..., V)``."""
        logits = self.embedding.products(input.to(self.embedding.weight.device))
        bias: Tensor | None = self._parameters["bias"]
        return logits if bias is None else logits + bias


def is_factorized_rows(module: nn.Module) -> bool:
    """Return whether a module is one of these, of this file or of a copy of it."""
    classes = (FactorizedEmbedding, FactorizedHead, TiedHead)
    return type(module).__name__ in {one.__name__ for one in classes}


def factorized_rows(model: nn.Module) -> dict[str, nn.Module]:
    """Return the factorized embeddings and heads of a model by full name, sorted by name."""
    found = {name: module for name, module in model.named_modules() if is_factorized_rows(module)}
    return {name: found[name] for name in sorted(found)}


def rows_settings(model: nn.Module) -> dict[str, dict[str, Any]]:  # Any: values of JSON
    """Return what rebuilds the factorized embedding and head of a model, by full name.

    - ``sizes``, ``ranks``: as in ``RowGroups``.
    - ``scale``: of an embedding alone.
    - ``tied_to``: of a tied head alone, the embedding.
    """
    settings: dict[str, dict[str, Any]] = {}
    modules = factorized_rows(model)
    for name, module in modules.items():
        holder: Any = module  # Any: attributes of three classes
        if type(module).__name__ == TiedHead.__name__:
            owner = next(n for n, other in modules.items() if other is holder.embedding)
            settings[name] = {TIED_TO: owner}
            continue
        settings[name] = {SIZES: list(holder.sizes), RANKS: list(holder.ranks)}
        if type(module).__name__ == FactorizedEmbedding.__name__:
            settings[name][SCALE] = holder.scale
    return settings


def checked_rows(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of ``rows_settings``, with keys and types checked.

    Raises:
        ValueError: If one is missing, unknown or of another type.
    """
    for name, own in settings.items():
        if not isinstance(own, Mapping) or frozenset(own) not in _SELF_MADE:
            raise ValueError(f"rows of {name} have unknown settings: {own!r}")
        if TIED_TO in own:
            owner = own[TIED_TO]
            if not isinstance(owner, str) or SCALE not in settings.get(owner, {}):
                raise ValueError(f"{name} is tied to {own[TIED_TO]!r}, which has no factors")
            continue
        sizes, ranks = own[SIZES], own[RANKS]
        is_fitting = _is_sizes(sizes, 0) and _is_sizes(ranks, 1) and len(sizes) == len(ranks) + 1
        if not is_fitting or not ranks or not isinstance(own.get(SCALE, 1.0), float | int):
            raise ValueError(f"rows of {name} need sizes of groups and ranks, got {own!r}")
    return {name: dict(own) for name, own in settings.items()}


def _is_sizes(value: object, least: int) -> bool:
    is_list = isinstance(value, list | tuple)
    return is_list and all(type(n) is int and n >= least for n in cast(Sequence[int], value))


def replace_rows(
    model: nn.Module,
    settings: Mapping[str, Any],  # Any: values of JSON
    find: Callable[[str], str],
) -> list[str]:
    """Replace dense embedding and head in a model on the meta device.

    Args:
        model: The model, dense there.
        settings: Those of ``rows_settings``.
        find: Maps a name in the settings to the name in the model, or raises a ``ValueError``.

    Returns:
        Keys of the tensors that a dense model does not have, by their stored names.

    Raises:
        ValueError: If the dense modules have other sizes.
    """
    names, added = {name for name, _ in model.named_modules()}, list[str]()
    # A tied head needs the embedding; a model without its head is loaded without one.
    for name, own in sorted(settings.items(), key=lambda item: SCALE not in item[1]):
        if SCALE not in own and name not in names:
            continue
        module = find(name)
        old: Any = model.get_submodule(module)  # Any: an embedding or a linear
        if TIED_TO in own:
            embedding: Any = model.get_submodule(find(own[TIED_TO]))  # Any: of this file
            model.set_submodule(module, TiedHead(embedding, old.bias))
            continue
        size, features = old.weight.shape
        if sum(own[SIZES]) != size or max(own[RANKS]) > features:
            raise ValueError(f"the groups of {name} do not fit a matrix of {size} x {features}")
        options: Any = {"device": "meta", "dtype": old.weight.dtype}  # Any: keyword arguments
        sizes: Any = (own[SIZES], own[RANKS], features)  # Any: arguments
        new: RowGroups
        if SCALE in own:
            new = FactorizedEmbedding(*sizes, scale=own[SCALE], **options)
        else:
            new = FactorizedHead(*sizes, bias=old.bias is not None, **options)
        model.set_submodule(module, new)
        added += [f"{name}.position"]
        added += [f"{name}.{s}_{g}" for g in range(1, len(own[SIZES])) for s in ("left", "right")]
    return added


def guard_resizing(model: nn.Module) -> None:
    """Let a model with factorized rows refuse another number of tokens; undo it for others."""
    holder: Any = model  # Any: a method of one model alone
    if factorized_rows(model):
        holder.resize_token_embeddings = _refuse_resizing
    else:
        vars(holder).pop("resize_token_embeddings", None)


def _refuse_resizing(*_: object, **__: object) -> NoReturn:
    raise ValueError(
        "the embedding of this model consists of factors (method.embeddings=factors), which have "
        "no rows for other tokens: export it with format=dense, and resize that model"
    )
