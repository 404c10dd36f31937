"""``compress``: from a configuration to a run folder with a smaller model in it."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track
from torch import Tensor

from callbacks.measure import TrainerMeasure
from grasp_lightning.commands.outputs import Outcome, write_outputs
from grasp_lightning.commands.parsing import to_dict
from grasp_lightning.commands.phases import Phases
from grasp_lightning.commands.plan import predict
from grasp_lightning.config import CompressConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows, batches, evaluation_windows
from grasp_lightning.errors import ConfigError, GraspError
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.layer_choice import SELECT
from grasp_lightning.methods.low_rank import ATTRIBUTION
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, model_hash
from grasp_lightning.models.size import measure_size
from grasp_lightning.models.source import resolve_source
from grasp_lightning.pipeline import Measure, compress
from grasp_lightning.plan import Plan
from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Statistics, Step

_PHASE_OF_STEP = {SELECT: "similarity", ATTRIBUTION: "attribution"}
_SAFETY = 1.1  # tokenizer, report and logs, beside weights and factors


@dataclass(frozen=True, kw_only=True)
class CompressRun:
    """A finished run.

    Attributes:
        folder: The run folder, as the user named it.
        metrics: What was measured.
    """

    folder: Path
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a run works on, after everything that a user can get wrong was checked."""

    loaded: LoadedModel
    view: DecoderView
    data: CalibrationData
    held_out: TokenWindows


@dataclass(kw_only=True)
class _Kept:
    """What the decisions of all steps leave behind."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, plan: Plan, decision: Decision) -> None:
        del plan
        self.scores |= decision.scores
        self.factors |= decision.tensors


def run_compress(config: CompressConfig) -> CompressRun:
    """Compress a model as a configuration says, and write its run folder.

    A run that is finished already is not done again: its metrics are read.

    Args:
        config: What the user set.

    Returns:
        The finished run.

    Raises:
        ConfigError: If ``output_dir`` is not set.
        GraspError: Of other kinds, for a wrong configuration, model, corpus, number, or output
            folder; nothing of the run is left then.
    """
    output_dir = config.output_dir
    if output_dir is None:
        raise ConfigError("output_dir is not set: name the run folder to write, e.g. runs/first")
    config = replace(config, method=resolve_method(config.method))
    model_folder = resolve_source(config.model).folder
    protected = [] if model_folder is None else [model_folder]
    with RunFolder.open(
        output_dir, to_dict(config), overwrite=config.overwrite, protected=protected
    ) as run:
        if run.state == "finished":
            metrics = _stored_metrics(run)
        else:
            try:
                metrics = _execute(config, run)
            except GraspError:
                run.discard()
                raise
    return CompressRun(folder=Path(output_dir), metrics=metrics)


def _stored_metrics(run: RunFolder) -> Metrics:
    return Metrics.from_dict(json.loads(run.path("metrics.json").read_text(encoding="utf-8")))


def _execute(config: CompressConfig, run: RunFolder) -> Metrics:
    phases = Phases()
    with phases("load"):
        inputs = _prepare(config, run)
        hashes = {"model": model_hash(inputs.loaded.model), **inputs.data.fingerprint}
    view = inputs.view
    dense_size = measure_size(view)
    dense_perplexity = _perplexity(config, inputs, phases, "dense")
    method = build_method(config.method, view, _track)
    plan, kept = Plan(method=method.name, options=method.options, inputs=hashes), _Kept()
    with TemporaryDirectory() as logs:
        measure = _timed(TrainerMeasure(inputs.data, config.trainer, Path(logs)), phases)
        with phases("factorize", excluding=_PHASE_OF_STEP.values()):
            plan = compress(view, method, measure, plan, kept)
        with run.new_folder("logs") as folder:
            shutil.copytree(logs, folder, dirs_exist_ok=True)
    outcome = Outcome(
        loaded=inputs.loaded,
        plan=plan,
        scores=kept.scores,
        factors=kept.factors,
        sizes=Pair(dense=dense_size, compressed=measure_size(view)),
        perplexity=Pair(
            dense=dense_perplexity,
            compressed=_perplexity(config, inputs, phases, "compressed"),
        ),
        perplexity_tokens=inputs.held_out.num_targets,
        settings=to_dict(config),
    )
    metrics = write_outputs(run, outcome, phases)
    run.finish()
    return metrics


def _prepare(config: CompressConfig, run: RunFolder) -> _Inputs:
    """Load model and text, and fail early on all that does not fit."""
    loaded = load_model(config.model)
    view = DecoderView(loaded.model)
    prediction = predict(view, config.method)
    factors = prediction.most if prediction.ranks else 0
    needed = (prediction.most + factors) * loaded.model.dtype.itemsize
    run.check_free_space(int(_SAFETY * needed))
    data = CalibrationData(config.calibration, loaded.tokenizer, config.seed)
    data.setup("fit")
    return _Inputs(
        loaded=loaded,
        view=view,
        data=data,
        held_out=evaluation_windows(config.evaluation, loaded.tokenizer),
    )


def _perplexity(config: CompressConfig, inputs: _Inputs, phases: Phases, which: str) -> float:
    size = config.evaluation.batch_size
    stream = track(
        batches(inputs.held_out, size),
        total=-(-len(inputs.held_out) // size),
        description=f"perplexity, {which}",
    )
    with phases("evaluate"):
        return evaluate_perplexity(inputs.view, stream)


def _timed(measure: Measure, phases: Phases) -> Measure:
    def timed(view: DecoderView, step: Step) -> Statistics:
        with phases(_PHASE_OF_STEP.get(step.name, step.name)):
            return measure(view, step)

    return timed


def _track(items: Sequence[str], description: str) -> Iterable[str]:
    return track(items, description=description)
