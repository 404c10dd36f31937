"""The plan: a method's decisions, as data to store, compare byte by byte, and replay.

A plan has no floats computed from data, no timestamps and no paths, so equal inputs give equal
bytes. Layer indices and module names refer to the original model.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, dataclass_transform

from grasp_lightning.errors import PlanError
from grasp_lightning.plugins import load_method
from grasp_lightning.reading.text import one_line, parse_json
from grasp_lightning.reading.typed import as_type, to_plain

PLAN_VERSION = 1

SparsityPattern = Literal["unstructured", "2:4", "4:8"]
OptionValue = str | int | float | bool | None | tuple[int, ...]
Op = TypeVar("Op", bound="Operation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One change of a model, as data; see ``models.operations`` for its behaviour.

    ``operation`` makes subclasses frozen dataclasses of plain values.
    """

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all replaced linears, in the original model."""
        return ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of all replaced modules: the linears, or others."""
        return self.linears

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each linear that becomes two factors, by name."""
        return {}

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the deleted decoder layers."""
        return ()


class Replacement(Operation, ABC):
    """An operation that solves for one weight: it is measured alone and can be refitted."""

    __slots__ = ()

    @property
    @abstractmethod
    def solved_tensor(self) -> str:
        """Name of the solved weight, ``<module>.<part>``."""

    @property
    def solved(self) -> str:
        """Full name of the linear whose new weight, or left factor, is solved."""
        return self.solved_tensor.rpartition(".")[0]


OPERATIONS: Final[dict[str, type[Operation]]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def operation(kind: str) -> Callable[[type[Op]], type[Op]]:
    """Return a decorator for operations, with an unused kind that names them in plan.json."""

    def register(fields: type[Op]) -> type[Op]:
        if kind in OPERATIONS:
            raise ValueError(f"{kind} is the kind of {OPERATIONS[kind]} already")
        OPERATIONS[kind] = made = dataclass(frozen=True, kw_only=True, slots=True)(fields)
        return made

    return register


@operation("select_layers")
class SelectLayers(Operation):
    """Mark decoder layers as redundant, ascending; changes nothing in the model."""

    layers: tuple[int, ...]


@operation("factorize_linear")
class FactorizeLinear(Replacement):
    """Replace one linear with two of lower rank.

    Attributes:
        components: Kept singular components, ascending, in the order of the singular values; None
            if the factors were solved instead, so that a replay needs the stored factors.
    """

    module: str
    rank: int
    components: tuple[int, ...] | None

    @property
    def linears(self) -> tuple[str, ...]:
        """Full name of the linear."""
        return (self.module,)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Its rank."""
        return {self.module: self.rank}

    @property
    def solved_tensor(self) -> str:
        """Name of the left factor."""
        return f"{self.module}.left"


@operation("narrow_mlp")
class NarrowMlp(Replacement):
    """Remove hidden channels of an MLP; a replay needs the stored, refitted weight of the reader.

    Attributes:
        reader: Full name of the linear whose inputs are the channels, in the original model.
        writers: Full names of the linears whose outputs are the channels, in module order.
        channels: Indices of the kept channels, ascending.
    """

    reader: str
    writers: tuple[str, ...]
    channels: tuple[int, ...]

    @property
    def mlp(self) -> str:
        """Full name of the module that holds the linears."""
        return self.reader.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the reader and the writers."""
        return (self.reader, *self.writers)

    @property
    def solved_tensor(self) -> str:
        """Name of the reader's weight."""
        return f"{self.reader}.weight"


@operation("narrow_experts")
class NarrowExperts(Operation):
    """Remove inner channels of all experts of a module; a replay needs the stored, refitted weight.

    Attributes:
        experts: Full name of the module in the original model.
        width: Number of channels that each expert keeps.
        channels: For each expert that is left by then, the kept channels as a hexadecimal number:
            bit j is set if channel j is kept. A list of numbers would take several times the space.
    """

    experts: str
    width: int
    channels: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Full name of the module."""
        return (self.experts,)


@operation("remove_experts")
class RemoveExperts(Operation):
    """Remove experts of one mixture, with what its router holds for them.

    transformers has one number of experts for all layers, so a plan that removes any leaves equally
    many in each mixture.

    Attributes:
        mixture: Full name of the module that holds router and experts, in the original model.
        experts: Full name of the module with the weights of the experts.
        kept: Numbers of the kept experts, ascending.
        num_experts: Number of experts in the original model.
    """

    mixture: str
    experts: str
    kept: tuple[int, ...]
    num_experts: int

    @property
    def modules(self) -> tuple[str, ...]:
        """Full name of the mixture."""
        return (self.mixture,)


@operation("remove_heads")
class RemoveHeads(Operation):
    """Remove key/value groups of an attention, each with the query heads that read it.

    Attributes:
        output: Full name of the linear that reads the heads, in the original model.
        inputs: Full names of the linears that compute queries, keys and values, in this order; or
            of one that computes all three.
        groups: Indices of the kept key/value groups, ascending.
        num_groups: Number of key/value groups in the original model.
    """

    output: str
    inputs: tuple[str, ...]
    groups: tuple[int, ...]
    num_groups: int

    @property
    def attention(self) -> str:
        """Full name of the module that holds the linears."""
        return self.output.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all its linears."""
        return (self.output, *self.inputs)


@operation("add_bias")
class AddBias(Operation):
    """Give a linear that has lost inputs a bias, or another one; a replay needs the stored values.

    Attributes:
        module: Full name of the linear in the original model.
    """

    module: str


@operation("remove_block")
class RemoveBlock(Operation):
    """Remove an attention or MLP block: its linears get rank 0 and return only their biases.

    Attributes:
        block: Name under which the block was priced, see ``methods.removal``.
        modules: Full names of its linears in the original model, in module order.
    """

    block: str
    modules: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of its linears."""
        return self.modules


@operation("set_weights")
class SetWeights(Operation):
    """Replace values of parameters by stored tensors ``<module>.<parameter>`` of equal shapes.

    Attributes:
        module: Full name of a module in the original model: a linear, or a whole decoder layer.
        parameters: Names of parameters in it, such as ``mlp.down_proj.weight``, each once.
    """

    module: str
    parameters: tuple[str, ...]


@operation("sparsify_linear")
class SparsifyLinear(Operation):
    """Replace a weight by one of equal shape with zeros; a replay needs the stored weight.

    Attributes:
        module: Full name of the linear.
        pattern: ``unstructured``, or ``n:m``: n of each m consecutive weights of a row are zero.
        zeros: How many weights are set to zero.
    """

    module: str
    pattern: SparsityPattern
    zeros: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Full name of the linear."""
        return (self.module,)

    @property
    def groups(self) -> tuple[int, int] | None:
        """``(n, m)``; None if unstructured."""
        return groups_of(self.pattern)


def groups_of(pattern: SparsityPattern) -> tuple[int, int] | None:
    """Return ``(n, m)`` of a pattern; None if it is unstructured."""
    if pattern == "unstructured":
        return None
    count, _, size = pattern.partition(":")
    return int(count), int(size)


@operation("factorize_rows")
class FactorizeRows(Operation):
    """Replace rows of an embedding or head by factors, group by group; a replay needs the factors.

    Attributes:
        modules: Full name of the embedding or head; for tied weights of both, the embedding first.
        groups: One digit per token, the number of its group. Rows of group 0 stay dense.
        group_ranks: Rank of each group from 1 on; 0 if its rows stay dense, too.
    """

    modules: tuple[str, ...]
    groups: str
    group_ranks: tuple[int, ...]

    @property
    def row_ranks(self) -> Mapping[str, int]:
        """Rank of each factorised group, by ``row_group`` of its number."""
        named = ((row_group(self.modules[0], g), k) for g, k in enumerate(self.group_ranks, 1))
        return {name: rank for name, rank in named if rank}

    @property
    def cuts(self) -> "tuple[FactorizeRows, ...]":
        """One operation per factorised group, which cuts this group alone."""
        ranks = self.group_ranks
        alone = [
            tuple(k * (i == place) for i, k in enumerate(ranks)) for place in range(len(ranks))
        ]
        return tuple(replace(self, group_ranks=ranks) for ranks in alone if any(ranks))

    @property
    def solved(self) -> str:
        """Name of its first factorised group."""
        return next(iter(self.row_ranks))


def row_group(module: str, group: int) -> str:
    """Return the name of a group of rows of an embedding or head, for scores and reports."""
    return f"{module}[{group}]"


@operation("drop_layers")
class DropLayers(Operation):
    """Delete whole decoder layers, given in ascending order."""

    layers: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the deleted layers."""
        return self.layers


@operation("try_merge")
class TryMerge(Operation):
    """Note the outcome of a merge that was tried and undone; changes nothing in the model.

    Attributes:
        base: The layer that would remain.
        absorbed: The layers that would be deleted, ascending.
        sweep: The first sweep, counted from 0, whose threshold the merge passes.
    """

    base: int
    absorbed: tuple[int, ...]
    sweep: int


@operation("merge_layers")
class MergeLayers(Operation):
    """Merge the decoder layers that follow a layer into it, and delete them.

    Attributes:
        base: The layer that remains, with new weights.
        absorbed: The layers that follow it in the model and are deleted, ascending; none leave the
            base unchanged.
        rule: How the new weights are computed, see ``models.merging``.
    """

    base: int
    absorbed: tuple[int, ...]
    rule: Literal["paper", "released"]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the deleted layers."""
        return self.absorbed


@operation("add_seam")
class AddSeam(Operation):
    """Let a decoder layer add a linear map of the hidden states to them; a replay needs its weight.

    Attributes:
        layers: Numbers of the deleted layers that it makes up for, ascending.
        holder: Number of the remaining layer that holds it.
        is_after: Whether it reads what leaves that layer, since no layer remains after it, instead
            of what enters it.
    """

    layers: tuple[int, ...]
    holder: int
    is_after: bool


class StreamRead(NamedTuple):
    """One block of a model: what it reads from the hidden states, and what it adds to them.

    Attributes:
        norms: Full names of the norms that read the hidden states here, in the order of calls.
        readers: Full names of the linears that read the normed states.
        writers: Full names of the linears whose outputs are added to the hidden states before the
            next read; none for the last one, that of the head.
    """

    norms: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@operation("slice_stream")
class SliceStream(Operation):
    """Rotate the hidden states, and keep the first directions; a replay needs the stored bases.

    Attributes:
        width: Number of kept directions, the same everywhere.
        embeddings: Full names of the embeddings whose sum the hidden states start with.
        reads: All blocks in order, and the head.
    """

    width: int
    embeddings: tuple[str, ...]
    reads: tuple[StreamRead, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all linears that read or write the hidden states, in order."""
        names = (name for read in self.reads for name in (*read.readers, *read.writers))
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The decisions of one compression run, in order.

    Attributes:
        options: The options that the decisions depend on.
        inputs: Hashes of the model and the calibration windows.
        complete: Whether the method has nothing left to do.
    """

    method: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    complete: bool = False

    @property
    def selected_layers(self) -> tuple[int, ...] | None:
        """Layers of the last ``SelectLayers``; None if there is none."""
        chosen = [op.layers for op in self.operations if isinstance(op, SelectLayers)]
        return chosen[-1] if chosen else None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every factorised linear, by module name."""
        return {module: rank for op in self.operations for module, rank in op.ranks.items()}

    @property
    def row_ranks(self) -> dict[str, int]:
        """Rank of every factorised group of rows of embedding and head, by its name."""
        found = (op.row_ranks for op in self.operations if isinstance(op, FactorizeRows))
        return {name: rank for ranks in found for name, rank in ranks.items()}

    @property
    def channels(self) -> dict[str, int]:
        """Number of kept channels of every narrowed MLP, by its reader, and of all experts."""
        found: dict[str, int] = {}
        for op in self.operations:
            if isinstance(op, NarrowMlp):
                found[op.reader] = len(op.channels)
            elif isinstance(op, NarrowExperts):
                found[op.experts] = op.width
        return found

    @property
    def experts(self) -> dict[str, tuple[int, int]]:
        """Kept and original number of experts of every mixture that loses some, by its name."""
        removals = [op for op in self.operations if isinstance(op, RemoveExperts)]
        return {op.mixture: (len(op.kept), op.num_experts) for op in removals}

    @property
    def zeros(self) -> int:
        """Number of weights that are set to zero."""
        return sum(op.zeros for op in self.operations if isinstance(op, SparsifyLinear))

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Kept and original number of key/value groups of every attention, by its full name."""
        narrowed = [op for op in self.operations if isinstance(op, RemoveHeads)]
        return {op.attention: (len(op.groups), op.num_groups) for op in narrowed}

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """Names of all removed blocks, in the order of the plan."""
        return tuple(op.block for op in self.operations if isinstance(op, RemoveBlock))

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Indices of all deleted layers, ascending."""
        return tuple(sorted(index for op in self.operations for index in op.dropped))

    @property
    def merged_layers(self) -> dict[int, tuple[int, ...]]:
        """Every remaining merged layer with all layers merged into it, both ascending."""
        merged: dict[int, tuple[int, ...]] = {}
        for op in self.operations:
            if isinstance(op, MergeLayers) and op.absorbed:
                inside = [merged.pop(index, ()) for index in (op.base, *op.absorbed)]
                merged[op.base] = tuple(sorted(chain(op.absorbed, *inside)))
        return dict(sorted(merged.items()))

    def extended(self, operations: tuple[Operation, ...]) -> Self:
        """Return a plan with more operations at its end."""
        return replace(self, operations=(*self.operations, *operations))

    def completed(self) -> Self:
        """Return this plan, marked as having nothing left to do."""
        return replace(self, complete=True)

    def to_json(self) -> str:
        """Return the canonical text of the plan: sorted keys and a final line feed."""
        kinds = {operation_type: kind for kind, operation_type in OPERATIONS.items()}
        operations = [{"kind": kinds[type(op)], **to_plain(op)} for op in self.operations]
        content = {"version": PLAN_VERSION, **to_plain(self), "operations": operations}
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that ``to_json`` wrote.

        Raises:
            PlanError: If the text is not a plan of this version, or its method is not installed.
        """
        stored = as_type(_Stored, parse_json(text, *_TOLD), *_TOLD)
        if stored.version != PLAN_VERSION:
            raise PlanError(f"plan has version {stored.version}, this program reads {PLAN_VERSION}")
        return cls(
            method=stored.method,
            options=stored.options,
            inputs=stored.inputs,
            operations=tuple(_operation(entry, stored.method) for entry in stored.operations),
            complete=stored.complete,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """The content of a plan.json; see ``Plan``."""

    version: int
    method: str
    options: Mapping[str, OptionValue]
    inputs: Mapping[str, str]
    operations: tuple[Mapping[str, Any], ...]  # Any: fields of an operation
    complete: bool


_TOLD = ("the plan", PlanError, "expected the content of a plan.json")


def _operation(entry: Mapping[str, Any], method: str) -> Operation:  # Any: parsed JSON
    name, error, advice = _TOLD
    kind = entry.get("kind")
    if isinstance(kind, str) and kind not in OPERATIONS:
        load_method(method)
    if not isinstance(kind, str) or kind not in OPERATIONS:
        raise error(
            f"{name}: unknown kind of operation {one_line(repr(kind))}; {advice}, and the package "
            f"of method {one_line(method)} to be installed"
        )
    fields = {key: value for key, value in entry.items() if key != "kind"}
    return as_type(OPERATIONS[kind], fields, *_TOLD)
