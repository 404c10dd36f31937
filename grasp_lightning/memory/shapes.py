"""Shapes that the memory of a process depends on: model, forward pass and trained parameters.

Legend: a linear has N outputs and M inputs; B windows of T tokens per forward pass; D hidden size,
Q and G total widths of queries and keys, I inner width of the MLP, V vocabulary size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from grasp_lightning.models.size import LinearShape


class Layer(NamedTuple):
    """A decoder layer.

    Attributes:
        parameters: Number of all parameters, those of linears included.
        linears: Full name -> shape.
        attention: Names of the linears in the attention block.
        has_keys: Whether the layer caches keys and values during generation.
        sizes: Full name of a parameter -> number of values; those of replaced linears may be old.
        rewritten: Number of parameters that compression added or changed besides the factors and
            narrowed weights: biases of these linears, seams, experts, and weights that were set or
            merged.
    """

    parameters: int
    linears: Mapping[str, LinearShape]
    attention: tuple[str, ...] = ()
    has_keys: bool = True
    sizes: Mapping[str, int] = MappingProxyType({})
    rewritten: int = 0

    @property
    def blocks(self) -> tuple[tuple[LinearShape, ...], ...]:
        """The linears of the MLP, and those of the attention block."""
        in_mlp = [name for name in self.linears if name not in self.attention]
        groups = (in_mlp, self.attention)
        return tuple(tuple(self.linears[name] for name in group) for group in groups)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        parameters: Number of all parameters, tied ones counted once.
        element_size: Bytes per weight.
        hidden: D.
        queries: Q.
        keys: G; values are as wide.
        num_heads: Number of query heads; 0 without attention.
        inner: I.
        is_gated: Whether the MLP multiplies two projections.
        vocabulary: V.
        is_eager: Whether attention forms its score matrix.
        tied: Number of the parameters that several modules share, each counted once.
    """

    parameters: int
    element_size: int
    layers: tuple[Layer, ...]
    hidden: int
    queries: int
    keys: int
    num_heads: int
    inner: int
    is_gated: bool
    vocabulary: int
    is_eager: bool = False
    tied: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.element_size

    @property
    def largest_split(self) -> int:
        """Bytes of the largest matrix that is not tied: a linear, or the embedding."""
        sizes = [linear.parameters for layer in self.layers for linear in layer.linears.values()]
        words = 0 if self.tied else self.vocabulary * self.hidden
        return max(*sizes, words) * self.element_size

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer."""
        return max((layer.parameters for layer in self.layers), default=0) * self.element_size

    @property
    def outside(self) -> int:
        """Bytes of everything outside the decoder layers: embedding, head and last norm."""
        in_layers = sum(layer.parameters for layer in self.layers)
        return (self.parameters - in_layers) * self.element_size


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Input of one forward pass.

    Attributes:
        batch_size: B.
        seqlen: T.
        is_mixed: Whether products are computed in bfloat16 (bf16-mixed).
        is_padded: Whether rows may be padded: keys are then repeated for every query head.
        on_cpu: Whether a CPU computes: its dropout masks are float32, not one byte.
    """

    batch_size: int
    seqlen: int
    is_mixed: bool = False
    is_padded: bool = False
    on_cpu: bool = False

    @property
    def num_tokens(self) -> int:
        """B T."""
        return self.batch_size * self.seqlen


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one pass of a calibration scores.

    Attributes:
        linears: The linears whose decompositions are held at once.
        lowest: Lowest decoder layer that the backward pass reaches; None without a backward pass.
        num_layers: Number of layers scored in one pass.
        sums_gradients: Whether weight gradients are summed (signed and full).
        num_sums: Number of sums per weight gradient.
        is_full: Whether u and v of a component are scored, too.
        has_bases: Whether all decompositions are held, not only one at a time.
        moments: Bytes of the Gram matrices that are summed instead.
        has_logits: Whether a pass without gradients computes the loss.
        trained: Parameters of the largest layer, if one layer is trained; else 0.
        update: Bytes of the largest update of a weight, if weights are updated; else 0.
        rows: Groups of rows of embedding and head, ``(V_g, D)`` each, if they are priced in a pass
            of their own, which reaches the embedding.
    """

    linears: tuple[LinearShape, ...]
    lowest: int | None
    num_layers: int
    sums_gradients: bool = False
    num_sums: int = 1
    is_full: bool = True
    has_bases: bool = True
    moments: int = 0
    has_logits: bool = False
    trained: int = 0
    update: int = 0
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Parameters that a compensation trains.

    Attributes:
        rank: Rank of the adapters, at most half the smaller side of a matrix; None trains weights
            themselves.
        on_dense: Whether dense linears get adapters, too; without adapters, whether every parameter
            of the decoder layers is trained.
        has_rewritten: Whether ``Layer.rewritten`` is trained besides factors and narrowed weights.
        has_dropout: Whether adapters drop some of their inputs.
        targets: Suffixes of the names of trained linears; empty for all.
    """

    rank: int | None
    on_dense: bool = True
    has_rewritten: bool = False
    has_dropout: bool = True
    targets: tuple[str, ...] = ()

    @property
    def drops(self) -> bool:
        """Whether dropout takes place: trained factors have none."""
        return self.has_dropout and self.rank is not None

    def trains(self, name: str, linear: LinearShape) -> bool:
        """Return whether a linear's factors, weight or adapters are trained."""
        if linear.rank == 0 or not (linear.is_replaced or self.on_dense):
            return False
        return not self.targets or any(
            name == target or name.endswith(f".{target}") for target in self.targets
        )

    def rank_on(self, matrix: LinearShape) -> int:
        """Return the rank of the adapter on a matrix; 0 if the matrix itself is trained."""
        if self.rank is None:
            return 0
        return min(self.rank, max(min(matrix.rows, matrix.columns) // 2, 1))

    def parameters(self, matrix: LinearShape) -> int:
        """Return the number of trained parameters of a matrix, or of the adapter on it."""
        if self.rank is None:
            return matrix.parameters
        return self.rank_on(matrix) * (matrix.rows + matrix.columns)


def part_of(size: int, num_parts: int) -> int:
    """Return the size of the largest of equal parts, rounded up."""
    return -(-size // num_parts)
