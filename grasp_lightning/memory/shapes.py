"""What the memory of a process depends on: a model, what runs through it, and what is trained.

Legend: N output and M input features of a linear; B windows of T tokens per forward pass; D hidden
size, Q and G widths of all queries and of all keys, I inner width of the MLP, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from grasp_lightning.models.size import LinearShape


class Layer(NamedTuple):
    """A decoder layer.

    Attributes:
        parameters: Number of all its parameters.
        linears: Full name -> shape of its linears.
        attention: Names of those in the attention block.
        has_keys: Whether the layer caches keys and values when the model writes text.
    """

    parameters: int
    linears: Mapping[str, LinearShape]
    attention: tuple[str, ...] = ()
    has_keys: bool = True

    @property
    def blocks(self) -> tuple[tuple[LinearShape, ...], ...]:
        """Shapes of the linears of the MLP and of the attention block."""
        in_mlp = [name for name in self.linears if name not in self.attention]
        groups = (in_mlp, self.attention)
        return tuple(tuple(self.linears[name] for name in group) for group in groups)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory depends on, of a model.

    Attributes:
        parameters: Number of all parameters, tied ones counted once.
        element_size: Bytes per weight.
        layers: The decoder layers.
        hidden: D.
        queries: Q.
        keys: G; values are as wide.
        num_heads: Number of heads of queries.
        inner: I.
        is_gated: Whether the MLP multiplies two projections.
        vocabulary: V.
        is_eager: Whether attention forms its matrix of scores.
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
        """Bytes of the largest matrix that is not tied: a linear, or the one of words."""
        sizes = [linear.parameters for layer in self.layers for linear in layer.linears.values()]
        words = 0 if self.tied else self.vocabulary * self.hidden
        return max(*sizes, words) * self.element_size

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer."""
        return max((layer.parameters for layer in self.layers), default=0) * self.element_size

    @property
    def outside(self) -> int:
        """Bytes of all that is in no decoder layer: matrices of words, and the last norm."""
        in_layers = sum(layer.parameters for layer in self.layers)
        return (self.parameters - in_layers) * self.element_size


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What runs through a model at once.

    Attributes:
        batch_size: B.
        seqlen: T.
        is_mixed: Whether products are computed in bfloat16 (bf16-mixed).
        is_padded: Whether rows may have padding: then keys are repeated for every head of queries.
        on_cpu: Whether a CPU computes: its dropout keeps float32 numbers, not one byte.
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
    """What a pass of a calibration scores.

    Attributes:
        linears: The linears whose decompositions are held at once.
        lowest: Position of the lowest decoder layer that a backward pass reaches; None if there is
            no backward pass.
        num_layers: Number of layers that are scored in one pass.
        sums_gradients: Whether the gradient of each weight is summed (signed and full).
        is_full: Whether u and v of a component are scored, too.
        has_bases: Whether the decompositions are held, or one is made at a time.
        moments: Bytes of the Gram matrices that are summed up instead.
    """

    linears: tuple[LinearShape, ...]
    lowest: int | None
    num_layers: int
    sums_gradients: bool = False
    is_full: bool = True
    has_bases: bool = True
    moments: int = 0


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What a compensation trains.

    Attributes:
        rank: Rank of adapters, at most half the smaller side of a matrix; None trains the factors
            of low-rank linears, and narrowed weights, themselves.
        on_dense: Whether dense linears have adapters, too.
        has_dropout: Whether adapters drop a share of their inputs.
        targets: Ends of the names of linears that are trained; none name all.
    """

    rank: int | None
    on_dense: bool = True
    has_dropout: bool = True
    targets: tuple[str, ...] = ()

    @property
    def drops(self) -> bool:
        """Whether dropout takes place: trained factors have none."""
        return self.has_dropout and self.rank is not None

    def trains(self, name: str, linear: LinearShape) -> bool:
        """Return whether something of a linear is trained.

        Args:
            name: Its name.
            linear: Its shape.

        Returns:
            True if its factors, its narrowed weight, or adapters on it are.
        """
        if linear.rank == 0 or not (
            linear.is_replaced or (self.on_dense and self.rank is not None)
        ):
            return False
        return not self.targets or any(
            name == target or name.endswith(f".{target}") for target in self.targets
        )

    def rank_on(self, matrix: LinearShape) -> int:
        """Return the rank of the adapter on a matrix.

        Args:
            matrix: A dense linear, or a factor.

        Returns:
            The rank; 0 where the matrix itself is trained.
        """
        if self.rank is None:
            return 0
        return min(self.rank, max(min(matrix.rows, matrix.columns) // 2, 1))

    def parameters(self, matrix: LinearShape) -> int:
        """Return how many parameters are trained of a matrix, or of an adapter on it.

        Args:
            matrix: A dense linear, or a factor.

        Returns:
            The number.
        """
        if self.rank is None:
            return matrix.parameters
        return self.rank_on(matrix) * (matrix.rows + matrix.columns)


def part_of(size: int, num_parts: int) -> int:
    """Return the largest of equal parts of a size: rounded up."""
    return -(-size // num_parts)
