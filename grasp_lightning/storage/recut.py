"""Compression to another ratio from the scores of a finished run, without a pass over the data."""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.config import MetricOptions
from grasp_lightning.errors import ConfigError, OutputError, PlanError
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.linalg.row_groups import NUM_GROUPS
from grasp_lightning.methods.layer_choice import score_key
from grasp_lightning.methods.removal import read_price
from grasp_lightning.methods.sensitivity import SENSITIVITY, read_trials
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import weights_of
from grasp_lightning.plan import OptionValue, Plan, SelectLayers, row_group
from grasp_lightning.reading.text import read_text
from grasp_lightning.reading.yaml_text import read_yaml
from grasp_lightning.run_folder import names
from grasp_lightning.run_folder.manifest import Manifest
from grasp_lightning.stats.base import Needs, Scoring, Sensitivity, Statistics, Step, Vocabulary
from grasp_lightning.storage.moments import stored_moments
from grasp_lightning.storage.progress import moments_key, step_key
from grasp_lightning.storage.tensor_files import TensorFile

# With other threads or hardware, a second decomposition may differ in the last bits.
_TOLERANCE: Final = 1e-4
# Options of methods that read the text again, and what for.
_NEEDS_TEXT: Final = MappingProxyType(
    {
        "merge": "tries merges of layers",
        "epochs": "trains a layer",
        "ridge": "fits a linear map for deleted layers",
        "pattern": "measures each layer behind the pruned ones",
        "directions_of": "rotates hidden states, block after block,",
    }
)
_ADVICE = "name another run, or measure without from_scores"


class StoredScores:
    """A ``Measure`` without data: it returns the scores of a finished run.

    Raises:
        ConfigError: If the folder holds no finished run whose scores can be cut again.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        root = Path(folder)
        self._file = TensorFile(root / names.SCORES, advice=_ADVICE)
        try:
            _check_finished(root)
            self.plan = _stored_plan(root)
            _check_plan(self.plan, root)
            self._scores = self._file.read(ignoring=".measured")
            self._moments = stored_moments(root, _ADVICE)
            _check_step(self.plan, self._moments.steps)
        except (OutputError, PlanError) as error:
            raise ConfigError(
                f"from_scores: {folder} is not a finished run with scores: {error}"
            ) from error
        schedule = self.plan.options.get("schedule")
        if schedule == "one_shot" or self._moments:
            return
        if schedule is None:
            raise ConfigError(
                f"from_scores: {folder} has neither scores of components nor "
                "statistics.safetensors; runs with a method.weighting keep that file if "
                "statistics.store is set"
            )
        raise ConfigError(
            f"from_scores: {folder} was made with schedule {schedule}, whose scores are valid only "
            "with the layers replaced before them; only runs with one_shot can be cut again"
        )

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the windows behind the scores."""
        return {key: value for key, value in self.plan.inputs.items() if key != "model"}

    def check_vocabulary(self, inputs: Mapping[str, str], embeddings: str | None) -> None:
        """Check that the scores belong to this vocabulary, and to these counts of its tokens.

        Args:
            inputs: Hashes of a run.
            embeddings: Its ``method.embeddings``.

        Raises:
            ConfigError: If they do not.
        """
        keys = ("vocabulary", *(("token_counts",) if embeddings == "factors" else ()))
        if any(self.plan.inputs.get(key) != inputs.get(key) for key in keys):
            raise ConfigError(
                f"from_scores: {self._folder} was made with another vocabulary: use its "
                "method.vocabulary and tokens.corpora, or measure again without from_scores"
            )

    def check(self, model_hash: str, options: Mapping[str, OptionValue]) -> None:
        """Check that the scores belong to this model and fit the method's options.

        Raises:
            ConfigError: If they do not.
        """
        if self.plan.inputs.get("model") != model_hash:
            raise ConfigError(
                f"from_scores: {self._folder} has scores of a different model, or of this model in "
                "a different dtype"
            )
        for key, work in _NEEDS_TEXT.items():
            if key in options:
                raise ConfigError(
                    f"from_scores: this method {work} on the calibration text; leave from_scores "
                    "unset"
                )
        if options.get("schedule") not in (None, "one_shot"):
            raise ConfigError(
                "from_scores: schedule iterative needs new measurements; use one_shot"
            )
        self._check_search(options)
        if "weighting" in options:
            self._check_fisher(options.get("fisher"))
        else:
            self._check_scoring(options)

    def _check_scoring(self, options: Mapping[str, OptionValue]) -> None:
        """Refuse scores of components by another formula."""
        for key in (field.name for field in fields(Scoring)):
            here, there = options.get(key), self.plan.options.get(key)
            if here is not None and here != there:
                raise ConfigError(
                    f"from_scores: method.{key} is {here} here, but {self._folder} has scores with "
                    f"{there}"
                )

    def _check_search(self, options: Mapping[str, OptionValue]) -> None:
        """Refuse losses of truncations in another metric."""
        keys = ("ranks", *(field.name for field in fields(MetricOptions)))
        for key in keys if options.get("ranks") == SENSITIVITY else ():
            here, there = options.get(key), self.plan.options.get(key)
            if here != there:
                raise ConfigError(
                    "from_scores: the losses of truncations belong to their metric: "
                    f"method.{key} is {here} here and {there} in {self._folder}; use the same, or "
                    "measure without from_scores"
                )

    def _check_fisher(self, here: OptionValue) -> None:
        there = self.plan.options.get("fisher", "empirical")  # not an option of earlier runs
        if self.plan.options.get("weighting") == "kfac" and here not in (None, there):
            raise ConfigError(
                f"from_scores: method.fisher is {here} here, but {self._folder} has gradients with "
                f"{there}; set method.fisher={there}, or measure again without from_scores"
            )

    def check_windows(self, fingerprint: Mapping[str, str]) -> None:
        """Raise a ``ConfigError`` unless a refit uses the same windows as the scores."""
        if any(self.inputs.get(key) != value for key, value in fingerprint.items()):
            raise ConfigError(
                "from_scores: method.refit reads the calibration text again, and this is not the "
                f"text of {self._folder}; use its calibration settings and seed, or set "
                "method.refit=none"
            )

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Return the stored statistics that a step needs; a missing one raises ``ConfigError``."""
        if step.needs.layer_gradients:
            raise ConfigError(
                "from_scores: this method needs the gradients of whole layers, which no run "
                "stores; measure without from_scores"
            )
        for module, basis in step.bases.items():
            self._check_basis(module, basis)
        metric = None if step.needs.layer_metric is None else self._layer_metric(view, step.needs)
        for module, weight in weights_of(view, step.needs.moments).items():
            self._check_moments(module, step.needs)
            self._moments.check(module, weight.shape)
        self._check_vocabulary(step.needs.vocabulary)
        prices = self._prices(step.needs)
        tried = self._truncation_losses(step.needs.sensitivity)
        if step.needs.moment_kinds:
            return Statistics(
                moments=self._moments,
                removal_losses=prices,
                row_losses=self._row_losses(step.needs.vocabulary),
                truncation_losses=tried,
            )
        linears = view.all_linears()
        scores = {
            module: self.component_scores(
                module, min(linears[module].out_features, linears[module].in_features)
            )
            for module in step.needs.weight_gradients
        }
        return Statistics(layer_metric=metric, component_scores=scores, removal_losses=prices)

    def _prices(self, needs: Needs) -> dict[str, float]:
        if needs.removables and needs.removal_measure == "loss":
            raise ConfigError(
                "from_scores: this method needs the loss without each layer, which no run stores; "
                "measure without from_scores"
            )
        return {part.name: self.price(part.name) for part in needs.removables}

    def _truncation_losses(self, search: Sensitivity | None) -> dict[str, dict[int, float]]:
        """Return the stored losses of a search; a linear without any is a ``ConfigError``."""
        found: dict[str, dict[int, float]] = {}
        for module, ranks in {} if search is None else search.ranks.items():
            stored = read_trials(module, self._scores)
            found[module] = {rank: stored[rank] for rank in ranks if rank in stored}
            if not found[module]:
                raise ConfigError(
                    f"from_scores: {self._folder} has no measured truncations of {module}; name a "
                    "run with the same method.layers"
                )
        return found

    def price(self, name: str) -> float:
        """Return the measured removal of a layer or block; a missing one is a ``ConfigError``."""
        price = read_price(name, self._scores)
        if price is None:
            raise ConfigError(
                f"from_scores: {self._folder} has no measured removal of {name}; name a run with "
                "the same method.removable and method.layers, or set method.removable=none"
            )
        return price

    def _layer_metric(self, view: DecoderView, needs: Needs) -> Tensor:
        assert needs.layer_metric is not None  # the caller only asks in that case
        key = score_key(needs.layer_metric, needs.span)
        values = self._scores.get(key)
        expected = view.num_layers - needs.span + 1
        if values is None or len(values) != expected:
            raise ConfigError(
                f"from_scores: {self._folder} has no {key} for spans of {needs.span} layers; set "
                "method.layers, or the layer_metric and num_layers of that run"
            )
        return self._file.check(self._scores, key, torch.float32, expected)

    def component_scores(self, module: str, *shape: int) -> Tensor:
        """Return the scores of a linear or of experts; missing ones are a ``ConfigError``."""
        key = f"{module}.scores"
        if key not in self._scores:
            raise ConfigError(
                f"from_scores: {self._folder} has no scores of {module}: more or other layers are "
                "requested than it has scored; score all layers with method.score_all_layers"
            )
        return self._file.check(self._scores, key, torch.float32, *shape)

    def _check_vocabulary(self, vocabulary: Vocabulary | None) -> None:
        """Refuse a run that has not measured the rows of embedding and head."""
        if vocabulary is not None and vocabulary.embedding not in self._moments:
            raise ConfigError(
                f"from_scores: {self._folder} has not measured the rows of {vocabulary.embedding}; "
                "name a run with method.embeddings=factors and statistics.store, or set "
                "method.embeddings=none"
            )

    def _row_losses(self, vocabulary: Vocabulary | None) -> dict[str, float]:
        """Return the stored losses of tried groups of rows."""
        ends = () if vocabulary is None else (vocabulary.embedding, vocabulary.head)
        names = (row_group(end, group) for end in ends for group in range(1, NUM_GROUPS))
        found = {name: read_price(name, self._scores) for name in names}
        return {name: loss for name, loss in found.items() if loss is not None}

    def _check_moments(self, module: str, needs: Needs) -> None:
        missing = sorted(needs.moment_kinds - self._moments.kinds(module))
        if missing:
            raise ConfigError(
                f"from_scores: {self._folder} has no {missing[0]} of {module}; name a run with the "
                "same method.weighting on all requested layers, and statistics.store"
            )

    def _check_basis(self, module: str, basis: SVD) -> None:
        stored = self._scores.get(f"{module}.singular_values")
        if stored is None:
            return
        here = basis.s.float().cpu()
        error = (here - stored).abs().max() if here.shape == stored.shape else here.max()
        if error > _TOLERANCE * stored.max():
            raise ConfigError(
                f"from_scores: the singular values of {module} differ from those in {self._folder} "
                f"by {float(error):.2g}: the scores belong to other weights"
            )


def _stored_plan(root: Path) -> Plan:
    try:
        return Plan.from_json(read_text(root / names.PLAN, PlanError))
    except PlanError as error:
        raise PlanError(f"{error}; {_ADVICE}") from error


def _check_finished(root: Path) -> None:
    manifest = Manifest.read(root)  # a copy of the files that are read here has none
    if manifest is not None and manifest.state != "finished":
        raise PlanError(f"it is {manifest.state}; let it finish, or {_ADVICE}")


def _check_plan(plan: Plan, root: Path) -> None:
    """Refuse a plan that does not belong to the run in its folder."""
    file = root / names.PLAN
    if plan.complete is not True:
        raise PlanError(f"{file} does not say that it is complete; {_ADVICE}")
    if not isinstance(plan.inputs, Mapping):
        raise PlanError(f"{file} does not say what it was made from; {_ADVICE}")
    config = read_yaml(root / names.CONFIG, PlanError)
    method = config.get("method") if isinstance(config, dict) else None
    if not isinstance(method, dict):
        raise PlanError(f"{root / names.CONFIG} names no method; {_ADVICE}")
    said = {"name": plan.method, **plan.options}
    for key, value in method.items():
        here = tuple(sorted(value)) if isinstance(value, list) else value
        if here is not None and key in said and said[key] != here:
            raise PlanError(
                f"{file} says {key} {said[key]}, its config.yaml says {value}; {_ADVICE}"
            )


def _check_step(plan: Plan, steps: set[str]) -> None:
    """Refuse statistics that were measured for a plan of other options or another model."""
    chosen = list(takewhile(lambda op: isinstance(op, SelectLayers), plan.operations))
    begun = [
        replace(plan, operations=tuple(chosen[:n]), complete=False) for n in range(len(chosen) + 1)
    ]
    # Files of earlier versions have the key of their step.
    if not steps <= {key(before) for before in begun for key in (moments_key, step_key)}:
        raise PlanError(f"its statistics were measured for another plan; {_ADVICE}")
