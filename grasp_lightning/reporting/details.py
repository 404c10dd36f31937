"""Tables of the report: what a compression decided for each linear, MLP and block."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from grasp_lightning.methods.laco import SIMILARITY_KEY
from grasp_lightning.methods.sensitivity import read_trials, trial_counts
from grasp_lightning.models.linears import in_attention
from grasp_lightning.plan import (
    FactorizeLinear,
    FactorizeRows,
    MergeLayers,
    NarrowExperts,
    NarrowMlp,
    Operation,
    Plan,
    RemoveBlock,
    RemoveExperts,
    RemoveHeads,
    SliceStream,
    SparsifyLinear,
    TryMerge,
)
from grasp_lightning.reporting.linears import (
    module_place,
    predicted_losses,
    removed_parts,
    scored_linears,
)
from grasp_lightning.reporting.metrics import Metrics
from grasp_lightning.reporting.tables import indices_text

_KINDS: dict[type[Operation], str] = {
    FactorizeLinear: "low-rank",
    NarrowMlp: "narrowed",
    NarrowExperts: "narrowed",
    RemoveExperts: "with fewer experts",
    RemoveHeads: "with fewer heads",
    RemoveBlock: "removed",
    SparsifyLinear: "sparse",
    SliceStream: "narrowed",
}
_LOSSES = ("Predicted loss, nats per token", "Measured")
_SCORES = ("Score kept", "Squared norm kept", "Beyond the largest")
_LOSS_NOTE = (
    "Predicted loss: half the curvature of the change, on the calibration text. Measured: mean "
    "divergence from the dense predictions on held-out text, with this cut alone and before any "
    "refit. Linears that are not listed stay dense."
)
_ROWS_NOTE = (
    "Predicted loss: half the curvature of the change, on the calibration text. Measured: mean "
    "divergence from the dense predictions on held-out text, with this group alone. Groups that "
    "are not listed stay dense."
)
_SCORE_NOTE = (
    "Score and squared norm: share of the linear's total in its kept components. Beyond the "
    "largest: kept components that plain truncation to the same rank would remove."
)


class Details(NamedTuple):
    """A table to expand; columns have a heading and a kind: row (names the row), text or number."""

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    note: str


def decision_details(metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor]) -> list[Details]:
    """Return the non-empty tables of layers, ranks, channels, experts, heads, removals, merges."""
    tables = (
        _layers(metrics, plan),
        _ranks(plan, scores),
        _channels(metrics, plan, scores),
        _experts(plan),
        _heads(plan),
        _rows(plan, scores),
        _removals(plan, scores),
        _merges(plan, scores),
        _truncations(plan, scores),
    )
    return [table for table in tables if table.rows]


def _layers(metrics: Metrics, plan: Plan) -> Details:
    kinds: dict[tuple[int, bool], list[str]] = {}
    for operation in plan.operations:
        for module in operation.modules:
            index, kind = module_place(module)
            kinds.setdefault((index, in_attention(kind)), []).append(
                _KINDS.get(type(operation), "changed")
            )
    rows = []
    has_parts = any(metrics.layer_changes.values())  # otherwise all changed layers are deleted
    for layer in sorted(metrics.layer_changes, key=int) if has_parts else ():
        change = metrics.layer_changes[layer]
        cells = ["deleted", "deleted"]
        if int(layer) in plan.merged_layers:
            cells = ["merged", "merged"]
        elif change is not None:
            parts = ((change.attention, True), (change.mlp, False))
            cells = [_part(count.total, kinds.get((int(layer), at), [])) for count, at in parts]
        rows.append((layer, *cells))
    return Details(
        "Changes in each decoder layer",
        (("Layer", "row"), ("Attention", "text"), ("MLP", "text")),
        rows,
        "Number of linears of each part. Layers that are not listed are unchanged.",
    )


def _part(total: int, kinds: Sequence[str]) -> str:
    texts = [f"{count} of {total} {kind}" for kind, count in Counter(kinds).items()]
    return ", ".join(texts) or "unchanged"


def _ranks(plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    losses = predicted_losses(plan, scores)
    scored = {linear.module: linear for linear in scored_linears(plan, scores)}
    # A run predicts the loss of all its linears, or of none.
    has_losses = not losses.keys().isdisjoint(plan.ranks)
    headings = _LOSSES if has_losses else _SCORES
    rows = []
    for module, rank in plan.ranks.items():
        num_components, cells = "", ("",) * len(headings)
        if module in losses:
            num_components = str(len(scores[f"{module}.scores"]))
            cells = _loss_cells(module, losses, scores)
        elif module in scored:
            linear = scored[module]
            num_components = str(len(linear.scores))
            shares = (f"{linear.kept_score:.1%}", f"{linear.kept_energy:.1%}")
            cells = (*shares, str(linear.num_beyond_largest))
        rows.append((*_place(module), str(rank), num_components, *cells))
    return Details(
        f"Ranks of all {len(rows)} replaced linears",
        _columns("Linear", "Rank", "of", *headings),
        rows,
        _LOSS_NOTE if has_losses else _SCORE_NOTE,
    )


def _channels(metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    losses = predicted_losses(plan, scores)
    has_losses = not losses.keys().isdisjoint(plan.channels)
    headings = _LOSSES if has_losses else ()
    rows = []
    for reader, kept in plan.channels.items():
        width = metrics.channels[reader].dense if reader in metrics.channels else None
        shares = ("", "") if width is None else (str(width), f"{kept / width:.1%}")
        cells = _loss_cells(reader, losses, scores) if has_losses else ()
        rows.append((*_place(reader), str(kept), *shares, *cells))
    return Details(
        f"Channels of all {len(rows)} narrowed MLPs",
        _columns("Linear that reads them", "Channels", "of", "Kept", *headings),
        rows,
        "The linears that write the channels and the linear that reads them keep the same share "
        "of their weights.",
    )


def _experts(plan: Plan) -> Details:
    rows = [(*_place(name), str(kept), str(total)) for name, (kept, total) in plan.experts.items()]
    return Details(
        f"Experts of all {len(rows)} mixtures that lose some",
        _columns("Mixture", "Experts", "of"),
        rows,
        "Each mixture loses the experts that affect its loss least, and all lose equally many.",
    )


def _heads(plan: Plan) -> Details:
    rows = [(*_place(name), str(kept), str(total)) for name, (kept, total) in plan.heads.items()]
    return Details(
        f"Key/value groups of all {len(rows)} attention blocks that lose heads",
        _columns("Attention", "Key/value groups", "of"),
        rows,
        "A group is one key head, one value head, and the query heads that read them.",
    )


def _rows(plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    losses = predicted_losses(plan, scores)
    rows = []
    for op in plan.operations:
        for cut in op.cuts if isinstance(op, FactorizeRows) else ():
            ((name, rank),) = cut.row_ranks.items()
            group = cut.group_ranks.index(rank) + 1
            number = str(cut.groups.count(str(group)))
            cells = _loss_cells(name, losses, scores)
            rows.append((" and ".join(op.modules), str(group), number, str(rank), *cells))
    return Details(
        f"Rows of embedding and head: {len(rows)} groups of tokens became factors",
        (
            ("Matrix", "row"),
            *((name, "number") for name in ("Group", "Tokens", "Rank", *_LOSSES)),
        ),
        rows,
        "Groups are numbered from the most frequent tokens to the rarest. " + _ROWS_NOTE,
    )


def _removals(plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    removed = removed_parts(plan, scores)
    plural = "s" if len(removed) > 1 else ""
    return Details(
        f"Removed entirely: {len(removed)} layer{plural} or block{plural}",
        _columns("Part", "Measured loss, nats per token"),
        [(*_place(name), f"{loss:.4f}") for name, loss in removed.items()],
        "Mean divergence from the dense predictions on calibration text, with only this part "
        "removed. The linears of a removed block have rank 0; a removed layer is deleted.",
    )


def _merges(plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    rows: list[tuple[str, ...]] = []
    num_gone, num_merges = 0, 0
    for op in plan.operations:
        if isinstance(op, TryMerge):
            similarity = scores.get(SIMILARITY_KEY.format(num_gone=num_gone, base=op.base))
            shown = "" if similarity is None else f"{float(similarity):.4f}"
            layers = (str(op.base), indices_text(op.absorbed))
            rows.append((*layers, shown, f"passes sweep {op.sweep + 1}"))
        elif isinstance(op, MergeLayers):
            num_gone, num_merges = num_gone + len(op.absorbed), num_merges + 1
            rows.append((str(op.base), indices_text(op.absorbed), "", "merged"))
    return Details(
        f"Search for merges: {num_merges} of {len(rows) - num_merges} tried",
        (("Layer", "row"), ("Absorbs", "text"), ("Similarity", "number"), ("Result", "text")),
        rows,
        "Mean cosine between the final hidden states with this merge, after those that are merged "
        "already, and those of the dense model. Each sweep from the top layer down accepts lower "
        "similarities than the one before.",
    )


def _truncations(plan: Plan, scores: Mapping[str, Tensor]) -> Details:
    measured, candidates = trial_counts(scores) or (0, 0)
    suffix = ".tried_ranks"
    rows = []
    for module in (key.removesuffix(suffix) for key in scores if key.endswith(suffix)):
        losses = read_trials(module, scores)
        ends = ((rank, math.exp(losses[rank])) for rank in (max(losses), min(losses)))
        cells = (f"{value:.4g}" for rank, perplexity in ends for value in (rank, perplexity))
        rank = str(plan.ranks.get(module, "dense"))
        rows.append((*_place(module), rank, str(len(losses)), *cells))
    return Details(
        f"Search for ranks: {measured} of {candidates} truncations measured",
        _columns(
            "Linear", "Rank", "Measured", "Highest", "Perplexity", "Lowest", "Perplexity there"
        ),
        rows,
        "Perplexity of the calibration windows of the search, with this linear alone truncated to "
        "the highest and the lowest of the measured ranks.",
    )


def _columns(name: str, *numbers: str) -> list[tuple[str, str]]:
    return [("Layer", "number"), (name, "row"), *((number, "number") for number in numbers)]


def _loss_cells(
    module: str, losses: Mapping[str, float], scores: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return predicted and measured loss of a cut; empty if unknown."""
    found = (losses.get(module), scores.get(f"{module}.measured"))
    predicted, measured = ("" if loss is None else f"{float(loss):.4f}" for loss in found)
    return predicted, measured


def _place(module: str) -> tuple[str, str]:
    layer, kind = module_place(module)
    return (str(layer) if layer >= 0 else "", kind)
