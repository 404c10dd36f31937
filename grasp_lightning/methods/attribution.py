"""Gradient scores of singular components, and factors of the best components."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import OutputError
from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize
from grasp_lightning.linalg.ranks import top_components
from grasp_lightning.methods.base import Decision, Track, untracked
from grasp_lightning.methods.dealing import kept, own_weights
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.streamed import dense_weights, streamed_weights
from grasp_lightning.plan import FactorizeLinear
from grasp_lightning.reading.on_access import OnAccess, by_full_name
from grasp_lightning.stats.base import DecidedLinears, Needs, Scoring, Step

ATTRIBUTION = "attribution"


def attribution_step(
    model: DecoderView,
    modules: Iterable[str],
    scoring: Scoring,
    *,
    ranks: Mapping[str, int] | None = None,
    track: Track = untracked,
) -> Step:
    """Return the step that scores every singular component of some linears.

    Args:
        model: The model.
        modules: Full names of the linears in the original model.
        scoring: How components are scored; ``magnitude`` needs no pass over the data.
        ranks: Ranks to cut the weights to; None leaves them to the decision.
        track: Shows the progress of the factorisation.
    """
    is_streamed = streamed_weights(model.model) is not None
    bases = (_on_disk if is_streamed else _factorized)(dense_weights(model, modules), track)
    measured = () if scoring.score == "magnitude" else tuple(bases)
    needs = Needs(weight_gradients=measured, scoring=scoring)
    return Step(name=ATTRIBUTION, needs=needs, bases=bases, ranks=ranks)


def _on_disk(weights: Mapping[str, Tensor], track: Track) -> Mapping[str, SVD]:
    """Factorize every weight; the results wait in temporary files, and are read on access.

    The processes share the work. Each has a folder of its own, with links to the files of the
    others, so that it may delete its folder at any time. A full disk raises ``OutputError``.
    """
    folder = TemporaryDirectory()  # it is deleted with the last reader
    paths = {name: Path(folder.name) / f"{n:06d}.safetensors" for n, name in enumerate(weights)}
    for name in track(processes.own_share(tuple(weights)), "factorize"):
        parts = {part: tensor.cpu() for part, tensor in factorize(weights[name])._asdict().items()}
        with _as_output_error(paths[name]):
            save_file(parts, paths[name])
    folders = processes.gather(folder.name)
    for position, path in enumerate(paths.values()):
        owner = position % len(folders)
        if owner != processes.rank():
            with _as_output_error(path):
                _link(Path(folders[owner]) / path.name, path)
    processes.barrier()  # the others may still link to its files
    return OnAccess({name: partial(_read_basis, folder, path) for name, path in paths.items()})


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {path}: {error}; set TMPDIR to a folder on a larger disk"
        ) from error


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _read_basis(folder: "TemporaryDirectory[str]", path: Path) -> SVD:
    del folder  # it is kept until here
    return SVD(**load_file(path))


def _factorized(weights: Mapping[str, Tensor], track: Track) -> Mapping[str, SVD]:
    """Factorize every weight; the processes share the work."""
    number = processes.num_processes()
    own = {name: factorize(weight) for name, weight in own_weights(weights, track, "factorize")}
    if number == 1:
        return own
    bases = {}
    for position, (name, weight) in enumerate(weights.items()):
        basis = own[name] if name in own else _empty_basis(weight)
        bases[name] = SVD(*(processes.from_rank(part, position % number) for part in basis))
    return bases


def _empty_basis(weight: Tensor) -> SVD:
    rows, columns = weight.shape
    count = min(rows, columns)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shapes = ((rows, count), (count,), (count, columns))
    return SVD(*(torch.empty(shape, dtype=dtype, device=weight.device) for shape in shapes))


def stored_scores(bases: Mapping[str, SVD], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores and singular values by their storage names, float32 on the CPU."""
    stored: dict[str, Tensor] = {}
    for module, basis in bases.items():
        stored[f"{module}.scores"] = scores[module].float().cpu()
        stored[f"{module}.singular_values"] = basis.s.float().cpu()
    return stored


def keep_best_components(
    bases: Mapping[str, SVD],
    scores: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    store: DecidedLinears | None = None,
) -> Decision:
    """Factorise each matrix and keep its best-scored components; store the scores of all matrices.

    Args:
        bases: Decomposition of every weight, by module.
        scores: Score of every component, ``(K,)`` per module; the largest are kept.
        ranks: Number of components to keep, by module; a missing module stays dense.
        store: Keeps the factors; None: they stay in memory.
    """
    operations: list[FactorizeLinear] = []
    chosen: dict[str, tuple[int, ...]] = {}
    for module in bases:
        if module not in ranks:
            continue
        components = top_components(scores[module], ranks[module])
        operations.append(FactorizeLinear(module=module, rank=ranks[module], components=components))
        chosen[module] = components

    def factors(module: str) -> Mapping[str, Tensor]:
        return balanced_factors(bases[module], chosen[module])._asdict()

    if store is None:
        found = {module: factors(module) for module in chosen}
    else:
        found = kept(store, chosen, factors, untracked, "factorize")
    return Decision(
        operations=tuple(operations),
        tensors=by_full_name(found, "left", "right"),
        scores=stored_scores(bases, scores),
    )
