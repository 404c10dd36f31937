"""The files of a grid, and the configuration behind each of its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from grasp_lightning.comparison.grid import Cell, folder_name, method_of, renamed
from grasp_lightning.comparison.measurements import Measurements, key_of
from grasp_lightning.config import (
    CompareConfig,
    CompensateConfig,
    CompressConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    StatisticsConfig,
)
from grasp_lightning.config.compensate_settings import check_settings, needs_dense
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.sources import check_corpus
from grasp_lightning.errors import ConfigError, OutputError
from grasp_lightning.methods import resolve_method
from grasp_lightning.models.source import check_whole, resolve_source
from grasp_lightning.run_folder import write_file
from grasp_lightning.run_folder.lock import check_unlocked, safe_root
from grasp_lightning.run_folder.rules import RunState, classify, config_hash

State = RunState | Literal["changed"]
"""``changed``: an earlier configuration made it, and ``overwrite`` allows to replace it."""


@dataclass(frozen=True)
class GridFolder:
    """The output folder of a grid: where things are, and what state cells are in."""

    config: CompareConfig

    @property
    def root(self) -> Path:
        """The folder as the user named it."""
        return Path(self.config.output_dir).expanduser()

    def run(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.root / "cells" / cell.name

    def settings_file(self, cell: Cell) -> Path:
        """Return the file from which the command of a cell reads its configuration."""
        return self.root / "configs" / f"{cell.name}.yaml"

    def measurements(self, cell: Cell) -> Path:
        """Return the file with what was measured on a cell."""
        return self.root / "measurements" / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        """Return the file with the output of all processes of a cell."""
        return self.root / "logs" / f"{cell.name}.log"

    @cached_property
    def models(self) -> Mapping[str, ModelConfig]:
        """How to load each dense model, from a converted copy if it is a GGUF file."""
        found = {}
        for name, model in self.config.models.items():
            with renamed("model", f"models.{name}"):
                check_whole(model)
                is_gguf = resolve_source(model).gguf_file is not None
            copy = replace(model, path=str(self.converted(name)), gguf_file=None, revision=None)
            found[name] = copy if is_gguf else model
        return found

    def converted(self, name: str) -> Path:
        """Return the folder of the float32 copy of a GGUF model."""
        return Path(self.config.output_dir) / "models" / folder_name(name)

    def model(self, cell: Cell) -> ModelConfig:
        """Return how to load the model of a cell."""
        dense = self.models[cell.model]
        if cell.is_dense:
            return dense
        path = str(Path(self.config.output_dir) / "cells" / cell.name / "model")
        return replace(dense, path=path, revision=None, gguf_file=None)

    def settings(self, cell: Cell) -> CompressConfig | CompensateConfig:
        """Return the configuration of the command that makes a cell."""
        output_dir = str(Path(self.config.output_dir) / "cells" / cell.name)
        if cell.compensation is not None:
            recipe = self.config.compensations[cell.compensation]
            return CompensateConfig(
                output_dir=output_dir,
                seed=cell.seed,
                model=self.model(cell.start),
                evaluation=self._held_out,
                **_sections(self._with_teacher(recipe, cell)),
            )
        return CompressConfig(
            output_dir=output_dir,
            seed=cell.seed,
            model=self.models[cell.model],
            method=method_of(self.config, cell),
            calibration=self.config.calibration,
            evaluation=self._held_out,
            trainer=self.config.trainer,
            statistics=self._statistics,
        )

    @property
    def _statistics(self) -> StatisticsConfig:
        """The settings of all cells, which share what they measure."""
        statistics = self.config.statistics
        folder = str(Path(self.config.output_dir) / "statistics")
        return statistics if statistics.shared is not None else replace(statistics, shared=folder)

    @property
    def _held_out(self) -> EvaluationConfig:
        """The least that the commands take: the texts are measured afterwards.

        Embedded text, so that other ``texts`` do not change the configuration of any cell.
        """
        return EvaluationConfig(
            source="pydoc", num_samples=1, seqlen=min(self.config.calibration.seqlen, 512)
        )

    def _with_teacher(self, recipe: Recipe, cell: Cell) -> Recipe:
        """Fill in the dense model as the teacher of a recipe that needs one and names none."""
        distillation = recipe.distillation
        if not needs_dense(recipe) or distillation.teacher is not None:
            return recipe
        teacher = self.models[cell.model].path
        return replace(recipe, distillation=replace(distillation, teacher=teacher))

    def key(self, cell: Cell) -> str:
        """Return a key of a cell's model: it changes with everything that the model depends on."""
        if cell.is_dense:
            return key_of(self.config.models[cell.model])
        key = config_hash(self._plain(cell))
        return key_of(self.key(cell.start), key) if cell.is_trained else key

    def _plain(self, cell: Cell) -> Mapping[str, Any]:  # Any: values of YAML
        """Return the configuration that the run folder of a cell is compared with."""
        settings = self.settings(cell)
        if isinstance(settings, CompressConfig):
            settings = replace(settings, method=resolve_method(settings.method))
        return to_dict(settings)

    def state(self, cell: Cell) -> State:
        """Return what the run folder of a cell contains, without a look at its lock.

        Raises:
            OutputError: If the folder holds something else, or a run of another configuration that
                ``overwrite`` does not allow to replace.
        """
        root = safe_root(self.run(cell), ())
        try:
            _, found = classify(root, self._plain(cell), overwrite=False)
        except OutputError:
            if not self.config.overwrite:
                raise
            classify(root, self._plain(cell), overwrite=True)
            return "changed"
        if cell.is_trained and found == "finished":
            made = Measurements.read(self.measurements(cell)).made
            if made not in (None, self.key(cell)):  # it would start from another model now
                return "changed"
        return found

    def is_in_use(self, cell: Cell) -> bool:
        """Return whether another process writes the run folder of a cell."""
        try:
            check_unlocked(self.run(cell))
        except OutputError:
            return True
        return False

    def write_settings(self, cell: Cell) -> Path:
        """Write the configuration of a cell as a user would, and return the file."""
        file = self.settings_file(cell)
        text = yaml.safe_dump(to_dict(self.settings(cell)), sort_keys=False)
        write_file(file, lambda path: path.write_text(text, encoding="utf-8"))
        return file


def _sections(recipe: Recipe) -> dict[str, Any]:  # Any: values of all types
    return {field.name: getattr(recipe, field.name) for field in fields(Recipe)}


def check_inputs(folder: GridFolder, cells: Sequence[Cell]) -> None:
    """Refuse, before anything runs, settings that no cell could use; read no weights.

    A key without effect, or that contradicts others, is a ``ConfigError``; a run folder that holds
    something else is an ``OutputError``.
    """
    _check_texts(folder.config)
    for cell in cells:
        if cell.is_dense:
            continue
        settings = folder.settings(cell)
        if isinstance(settings, CompensateConfig):
            _check_training(settings, f"compensations.{cell.compensation}")
        folder.state(cell)


def _check_texts(config: CompareConfig) -> None:
    mixture_parts(config.calibration, "calibration")
    paths = config.calibration.path or ()
    files = {"calibration": paths if isinstance(paths, tuple) else (paths,)}
    for name, text in config.texts.items():
        with renamed("evaluation", f"texts.{name}"):
            check_corpus(text, "evaluation")
        files[f"texts.{name}"] = (text.path,) if text.path else ()
    for section, names in files.items():
        for name in names:
            if not Path(name).expanduser().is_file():
                raise ConfigError(f"{section}.path: no such file: {name}")


def _check_training(settings: CompensateConfig, place: str) -> None:
    try:
        check_settings(settings)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
