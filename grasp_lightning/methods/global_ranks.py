"""One budget for all matrices and MLPs, spent where it reduces the predicted loss most."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grasp_lightning.config import EmbeddingsChoice, MlpChoice, RemovableChoice, TargetChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.allocation import Allocation, allocate, smallest_size
from grasp_lightning.linalg.choices import ChannelChoice, Choice, GroupChoice, MatrixChoice
from grasp_lightning.linalg.shared_width import allocate_shared, smallest_shared_size
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.embedding_rows import row_shapes
from grasp_lightning.methods.expert_removal import ExpertsLeft, choices_of_experts
from grasp_lightning.methods.narrowing import Narrowable, narrowable_mlps
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.methods.removal import removable_parts
from grasp_lightning.methods.targets import MULTIPLES, TARGETS, mlps_for
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import NumberedExperts, numbered_experts
from grasp_lightning.plan import OptionValue, Plan
from grasp_lightning.stats.base import Removable


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgeted:
    """Everything that shares a budget.

    Attributes:
        shapes: ``(N, M)`` of every matrix that may be cut, by module.
        mlps: Every MLP that may lose channels, by the name of its reader, and all experts. Their
            linears are not in ``shapes``.
        removables: Layers, each followed by its blocks, that may be removed as a whole.
        rows: ``(V_g, d)`` of each group of rows of embedding and head that may be factorized.
        mixtures: The mixtures of which experts may be removed; None if there are none.
    """

    shapes: Shapes
    mlps: Mapping[str, Narrowable] = field(default_factory=dict)
    removables: tuple[Removable, ...] = ()
    rows: Shapes = field(default_factory=dict)
    mixtures: NumberedExperts | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the linears and experts that must be measured."""
        return (*self.shapes, *self.mlps)

    @property
    def linear_size(self) -> int:
        """Number of parameters of all linears, and of all rows that may be factorized."""
        return sum(map(self._size_of, (*self.modules, *self.rows)))

    @property
    def size(self) -> int:
        """Number of parameters, including those of layers outside the linears."""
        return self.linear_size + sum(map(self.own_size, self.removables))

    def own_size(self, removable: Removable) -> int:
        """Return the size of norms, biases and routers that a layer removes; 0 for a block."""
        return max(removable.parameters - self._inside(removable), 0)

    def left_size(self, removable: Removable) -> int:
        """Return the size of channel biases that a removed block keeps; 0 for a layer."""
        return max(self._inside(removable) - removable.parameters, 0)

    def inside(self, removable: Removable) -> set[str]:
        """Return the names of what is in a layer or block."""
        experts = {name for name, mlp in self.mlps.items() if mlp.num_experts}
        in_layer = {name for name in experts if self.mlps[name].layer == removable.layer}
        found = {*removable.linears} | (set() if removable.is_block else in_layer)
        return found & {*self.modules}

    @property
    def keeps_widths(self) -> bool:
        """Whether only experts as a whole can be removed, and no channels."""
        return bool(self.mlps) and all(mlp.has_width for mlp in self.mlps.values())

    def freed(self, left: ExpertsLeft) -> float:
        """Return what routers and biases of mixtures lose that are in no removable layer."""
        in_layers = {name for part in self.removables for name in self.inside(part)}
        return math.fsum(size for name, size in left.sizes.items() if name not in in_layers)

    def _inside(self, removable: Removable) -> int:
        return sum(map(self._size_of, self.inside(removable)))

    def _size_of(self, module: str) -> int:
        if module in self.mlps:
            return self.mlps[module].num_channels * self.mlps[module].channel_size
        return math.prod(self.rows.get(module) or self.shapes[module])


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalRanks:
    """Ranks and channels with the smallest predicted loss under one budget; some stay dense.

    All losses need one unit, as with ``kfac``. Given one Lagrange multiplier, each matrix takes
    the rank, and each MLP the number of channels, that minimises its loss plus the multiplier
    times its size.

    Attributes:
        removed_ratio: Share of the whole model to remove; None if ``keep_ratio`` is set.
        keep_ratio: Share to keep of the linears of the chosen layers.
        num_parameters: Parameters of the whole dense model.
        multiple_of: Ranks and numbers of channels are multiples of this number; None takes that of
            the target.
        mlp: Whether MLPs lose channels, or their matrices are factorized like all others.
        removable: What may be removed as a whole.
        target: What will serve the model.
        embeddings: Whether rows of embedding and head may become factors.
    """

    removed_ratio: float | None = None
    keep_ratio: float | None = None
    num_parameters: int
    multiple_of: int | None = None
    mlp: MlpChoice = "factors"
    removable: RemovableChoice = "none"
    target: TargetChoice = "any"
    embeddings: EmbeddingsChoice = "none"

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        key = "keep_ratio" if self.removed_ratio is None else "removed_ratio"
        options: dict[str, OptionValue] = {key: getattr(self, key)}
        options |= {"ranks": "global", "mlp": self.mlp}
        if self.unit != 1:
            options["multiple_of"] = self.unit
        if self.removable != "none":
            options["removable"] = self.removable
        if self.target != "any":
            options["target"] = self.target
        if self.embeddings != "none":
            options["embeddings"] = self.embeddings
        return options

    @property
    def unit(self) -> int:
        """Number whose multiples ranks and numbers of channels are."""
        return MULTIPLES[self.target] if self.multiple_of is None else self.multiple_of

    def budgeted(self, view: DecoderView, layers: tuple[int, ...]) -> Budgeted:
        """Return what shares the budget: MLPs with removable channels, and all other linears.

        A model that cannot be cut for the target is a ``ConfigError``.

        Args:
            view: The dense model; its weights may be on the meta device.
            layers: Numbers of the layers that may be compressed, ascending.
        """
        mlps = narrowable_mlps(view, layers) if self.mlp == "channels" else {}
        mixtures = _mixtures(view, mlps)
        mlps = mlps_for(self.target, view, mlps, loses_experts=mixtures is not None)
        shapes = weight_shapes(view, Plan(method="budget"), layers)
        inside = {name for mlp in mlps.values() for name in (mlp.reader, *mlp.writers)}
        return Budgeted(
            shapes={name: shape for name, shape in shapes.items() if name not in inside},
            mlps=mlps,
            removables=removable_parts(view, layers, self.removable),
            rows=row_shapes(view) if self.embeddings == "factors" else {},
            mixtures=mixtures,
        )

    def allocation(
        self,
        budgeted: Budgeted,
        losses: Mapping[str, Tensor],
        prices: Mapping[str, float] | None = None,
    ) -> Allocation:
        """Return the ranks and channels of everything that gets smaller, and what is removed.

        Args:
            budgeted: What shares the budget.
            losses: Predicted loss of dropping each component of a matrix or a group of rows,
                ``(K,)`` by name, and each channel of an MLP, ``(I,)`` by reader, or of experts,
                ``(E, I)``; descending.
            prices: Measured loss of removing each layer and block, by its name.
        """
        budget = self.budget(budgeted)
        tried = (
            self._with_experts(budgeted, losses, prices or {}, left, budget)
            for left in choices_of_experts(budgeted.mixtures, budgeted.mlps, losses)
        )
        return min(filter(None, tried), key=lambda allocation: allocation.loss)

    def _with_experts(
        self,
        budgeted: Budgeted,
        losses: Mapping[str, Tensor],
        prices: Mapping[str, float],
        left: ExpertsLeft,
        budget: int,
    ) -> Allocation | None:
        """Return the best allocation if these experts are left; None if they are too many."""
        choices = self._grouped(self._choices(budgeted, losses, left), budgeted, prices, left)
        freed, find = budgeted.freed(left), allocate_shared if self.target == "plain" else allocate
        if self._least(choices) > budget + freed:
            return None
        found = find(choices, budget + freed)
        lost = math.fsum(left.losses.values())
        return found._replace(size=found.size - freed, loss=found.loss + lost, experts=left.kept)

    def target_losses(
        self,
        budgeted: Budgeted,
        losses: Mapping[str, Tensor],
        prices: Mapping[str, float] | None = None,
        *,
        view: DecoderView,
    ) -> dict[str, float]:
        """Return the predicted loss for each target that this budget and the model allow.

        Arguments: see ``allocation``, and the dense model. Empty if MLPs lose no channels.
        """
        found: dict[str, float] = {}
        targets: tuple[TargetChoice, ...] = ("plain",) if budgeted.keeps_widths else TARGETS
        for target in targets if budgeted.mlps else ():
            rule, parts = replace(self, target=target), budgeted
            if target != "any":
                parts = replace(parts, rows={})
            if target == "plain":
                whole = tuple(part for part in budgeted.removables if not part.is_block)
                parts = replace(parts, removables=whole)
            try:
                loses_experts = parts.mixtures is not None
                mlps = mlps_for(target, view, budgeted.mlps, loses_experts=loses_experts)
                parts = replace(parts, mlps=mlps)
                found[target] = rule.allocation(parts, losses, prices).loss
            except ConfigError:  # out of reach for this target
                continue
        return found

    def budget(self, budgeted: Budgeted) -> int:
        """Return how many parameters stay; a budget out of reach is a ``ConfigError``."""
        losses = dict.fromkeys((*budgeted.shapes, *budgeted.rows), torch.zeros(1))
        losses |= {n: torch.zeros(mlp.loss_shape) for n, mlp in budgeted.mlps.items()}
        free = dict.fromkeys((part.name for part in budgeted.removables), 0.0)
        *_, fewest = choices_of_experts(budgeted.mixtures, budgeted.mlps, losses)
        choices = self._grouped(self._choices(budgeted, losses, fewest), budgeted, free, fewest)
        return self._budget(budgeted, self._least(choices) - budgeted.freed(fewest))

    def _least(self, choices: Sequence[Choice]) -> float:
        return (smallest_shared_size if self.target == "plain" else smallest_size)(choices)

    def _grouped(
        self,
        choices: Iterable[MatrixChoice | ChannelChoice],
        budgeted: Budgeted,
        prices: Mapping[str, float],
        experts: ExpertsLeft,
    ) -> list[Choice]:
        """Return the choices, with those of each removable layer or block in a group.

        With a layer, its removed experts cost nothing more.
        """
        left: dict[str, Choice] = {choice.name: choice for choice in choices}
        # Blocks first, so that the group of a layer holds theirs.
        for part in sorted(budgeted.removables, key=lambda part: not part.is_block):
            inside = budgeted.inside(part)
            if not part.is_block:
                inside |= {b.name for b in budgeted.removables if b.layer == part.layer}
            left[part.name] = GroupChoice(
                name=part.name,
                children=[left.pop(name) for name in sorted(left.keys() & inside)],
                removal_loss=prices[part.name] - _sum(experts.losses, budgeted.inside(part)),
                own_size=budgeted.own_size(part) - _sum(experts.sizes, budgeted.inside(part)),
                removed_size=budgeted.left_size(part),
            )
        return list(left.values())

    def _choices(
        self, budgeted: Budgeted, losses: Mapping[str, Tensor], experts: ExpertsLeft
    ) -> list[MatrixChoice | ChannelChoice]:
        top = None if self.target == "any" else 0
        matrices = [
            MatrixChoice(name, shape, losses[name], max_rank=top, multiple_of=self.unit)
            for name, shape in (*budgeted.shapes.items(), *budgeted.rows.items())
        ]
        mlps = [
            ChannelChoice(
                name,
                mlp.size_of(len(experts.kept[name])) if name in experts.kept else mlp.channel_size,
                _of_all(losses[name], experts.kept.get(name)),
                min_channels=mlp.num_channels if mlp.has_width else 1,
                multiple_of=math.lcm(self.unit, mlp.multiple_of),
            )
            for name, mlp in budgeted.mlps.items()
        ]
        return [*matrices, *mlps]

    def _budget(self, budgeted: Budgeted, least: float) -> int:
        linears, dense = budgeted.linear_size, budgeted.size
        # Rounded inwards, so that both ends can be requested.
        if self.removed_ratio is None:
            key, keep_ratio = f"keep_ratio {self.keep_ratio}", self.keep_ratio or 0.0
            kept = dense - linears + round(keep_ratio * linears)
            low = max((linears - dense + least) / linears, 0.0)
            feasible = f"{math.ceil(low * 1e4) / 1e4:.4f} to below 1"
        else:
            key = f"removed_ratio {self.removed_ratio}"
            kept = dense - round(self.removed_ratio * self.num_parameters)
            high = max((dense - least) / self.num_parameters, 0.0)
            feasible = f"above 0 to {math.floor(high * 1e4) / 1e4:.4f}"
        if not least <= kept <= dense:
            of = "" if self.target == "any" else f" with attention dense (target {self.target})"
            raise ConfigError(
                f"method.{key} is out of reach: the feasible range of these linears{of} is "
                f"{feasible}"
            )
        if kept == dense:
            raise ConfigError(
                f"method.{key} removes less than one parameter: nothing would be removed"
            )
        return kept


def _mixtures(view: DecoderView, mlps: Mapping[str, Narrowable]) -> NumberedExperts | None:
    """Return the mixtures that may lose experts: all of the model, or none."""
    if not any(mlp.num_experts for mlp in mlps.values()):
        return None
    found = numbered_experts(view)
    return found if found is not None and found.mixtures.keys() <= mlps.keys() else None


def _of_all(losses: Tensor, experts: Sequence[int] | None) -> Tensor:
    """Return the losses of channels, those of some experts added up."""
    if losses.ndim == 1:
        return losses
    return (losses if experts is None else losses[list(experts)]).sum(0)


def _sum(values: Mapping[str, float], names: Iterable[str]) -> float:
    return math.fsum(values[name] for name in sorted(names) if name in values)
