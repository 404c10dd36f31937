"""``plan``: what a configuration would remove, from the model's shapes alone."""

from dataclasses import dataclass, replace

from grasp_lightning.config import CompressConfig, MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.ranks import rank_for_keep_ratio, stays_dense
from grasp_lightning.methods import configured_layers, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_meta_model
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Sizes before and after, without data.

    Attributes:
        dense: Parameters of the model, tied ones counted once.
        most: Parameters after compression, if the smallest layers are chosen.
        least: Parameters after compression, if the largest layers are chosen.
        num_layers: Number of layers that are replaced or deleted.
        ranks: Rank by linear, inside one of the layers.
    """

    dense: int
    most: int
    least: int
    num_layers: int
    ranks: dict[str, int]

    @property
    def lines(self) -> list[str]:
        """The prediction as text; the first line begins with the removed share in percent."""
        share = f"{1 - self.most / self.dense:.1%}"
        if self.least != self.most:
            share += f" to {1 - self.least / self.dense:.1%}, depending on the layers chosen,"
        first = f"{share} of {self.dense:,} parameters removed: {self.most:,} remain"
        rows = [
            f"  {name}: {f'rank {rank}' if rank else 'dense'}" for name, rank in self.ranks.items()
        ]
        kind = (
            f"each of the {self.num_layers} layers, replaced" if rows else "the layers are deleted"
        )
        return [first, f"{kind}:" if rows else f"{self.num_layers} layers: {kind}", *rows]


def predict(view: DecoderView, method: MethodConfig) -> Prediction:
    """Return the sizes before and after compression, from shapes alone.

    More layers than the model has are a ``ConfigError``.

    Args:
        view: The model; its weights may be on the meta device.
        method: Options as ``resolve_method`` returns them.

    Returns:
        The prediction.

    Raises:
        ModelError: If no layer would be left.
    """
    choice = configured_layers(method)
    choice.check(view.num_layers)
    if choice.count == view.num_layers and not method.keep_ratio:
        raise ModelError(
            f"all {view.num_layers} decoder layers would be deleted; leave at least one"
        )
    keep_ratio = method.keep_ratio or 0.0
    dense = count_parameters(view.model)
    saved = {
        index: dense - parameters_after(view, _operations(view, index, keep_ratio))
        for index in choice.layers or view.layer_indices
    }
    by_size = sorted(saved.values())
    first = next(iter(saved))
    return Prediction(
        dense=dense,
        most=dense - sum(by_size[: choice.count]),
        least=dense - sum(by_size[-choice.count :]),
        num_layers=choice.count,
        ranks=_ranks(view, first, keep_ratio) if keep_ratio else {},
    )


def run_plan(config: CompressConfig) -> Prediction:
    """Return what a configuration would remove; reads no weights.

    Args:
        config: The same configuration that ``compress`` takes.

    Returns:
        The prediction.
    """
    config = replace(config, method=resolve_method(config.method))
    return predict(DecoderView(load_meta_model(config.model)), config.method)


def _ranks(view: DecoderView, index: int, keep_ratio: float) -> dict[str, int]:
    """Return the rank of every linear of a layer by its short name, 0 where it stays dense."""
    prefix = f"{view.layers_name}.{index}."
    return {
        op.module.removeprefix(prefix): op.rank for op in _factorizations(view, index, keep_ratio)
    }


def _operations(view: DecoderView, index: int, keep_ratio: float) -> tuple[Operation, ...]:
    if not keep_ratio:
        # Never the last one left: the size of a deletion does not depend on what else is deleted.
        return (DropLayers(layers=(index,)),)
    return tuple(op for op in _factorizations(view, index, keep_ratio) if op.rank)


def _factorizations(view: DecoderView, index: int, keep_ratio: float) -> list[FactorizeLinear]:
    operations = []
    for module, linear in view.linears(index).items():
        rows, columns = linear.out_features, linear.in_features
        rank = rank_for_keep_ratio(keep_ratio, rows, columns)
        kept = 0 if stays_dense(rank, rows, columns) else rank
        operations.append(FactorizeLinear(module=module, rank=kept, components=None))
    return operations
