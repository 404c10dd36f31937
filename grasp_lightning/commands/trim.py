"""``trim``: a model without the tokens that some texts never use."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grasp_lightning.commands.trimming import Trimming, trimming_of
from grasp_lightning.config import TrimConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.config.values import check_values
from grasp_lightning.data.corpora import Corpus, corpora_of
from grasp_lightning.errors import GraspError, ModelError
from grasp_lightning.models.checkpoint import check_not_quantized, save_model
from grasp_lightning.models.loading import LoadedModel, load_model
from grasp_lightning.models.size import count_bytes, count_parameters
from grasp_lightning.models.source import resolve_source, source_hash
from grasp_lightning.models.verification import can_generate, verify_saved
from grasp_lightning.models.vocabulary.files import fitting_files
from grasp_lightning.reporting.metrics import Change
from grasp_lightning.reporting.trimming import TrimFacts, trim_content
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import TRIM
from grasp_lightning.storage.copies import (
    MODEL_NAME,
    SIZE_FACTOR,
    CopyRun,
    finish_copy,
    stored_facts,
    write_beside_copy,
)

SOURCE_CARD_NAME = "SOURCE_MODEL_CARD.md"


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The checked inputs; ``generates`` says whether the model generates with its cache."""

    loaded: LoadedModel
    trimming: Trimming
    generates: bool


def run_trim(config: TrimConfig) -> CopyRun[TrimFacts]:
    """Write a model without the tokens that the corpora never use; a finished one is only read.

    Raises:
        GraspError: If model, corpora or output folder do not fit, or a check of the result fails;
            then nothing is written.
    """
    check_values(config)
    corpora = corpora_of(config)
    source = resolve_source(config.model)
    protected = [] if source.folder is None else [source.folder]
    settings = to_dict(config)
    _, state = RunFolder.look_up(
        config.output_dir, settings, overwrite=config.overwrite, protected=protected
    )
    inputs = None if state == "finished" else _prepared(config, corpora)
    with RunFolder.open(
        config.output_dir, settings, overwrite=config.overwrite, protected=protected
    ) as run:
        if run.state == "finished" or inputs is None:
            facts = stored_facts(
                run,
                TRIM,
                TrimFacts,
                source_hash(config.model),
                source=config.model.path,
                verb="trim",
            )
        else:
            try:
                facts = _execute(config, inputs, run)
            except GraspError:
                run.discard()
                raise
    return CopyRun(folder=Path(config.output_dir), facts=facts)


def _prepared(config: TrimConfig, corpora: Sequence[Corpus]) -> _Inputs:
    """Load the model, count the tokens of all texts, and choose those that stay."""
    loaded = load_model(config.model)
    check_not_quantized(loaded.model, ModelError)
    trimming = trimming_of(loaded, config.model, config, corpora)
    return _Inputs(loaded=loaded, trimming=trimming, generates=can_generate(loaded.model))


def _execute(config: TrimConfig, inputs: _Inputs, run: RunFolder) -> TrimFacts:
    loaded, trimming = inputs.loaded, inputs.trimming
    model = loaded.model
    parameters, num_bytes = count_parameters(model), count_bytes(model)
    logits = trimming.trim(model)
    run.check_free_space(int(SIZE_FACTOR * count_bytes(model)))
    with run.new_folder(MODEL_NAME) as folder:
        save_model(model, folder)
        new = trimming.written(folder, trust_remote_code=config.model.trust_remote_code)
        change = trimming.change(new, Change(before=parameters, after=count_parameters(model)))
        facts = trimming.facts(loaded.origin.name, model, change, num_bytes, logits)
        origin = replace(loaded.origin, side_files=fitting_files(loaded.origin.side_files))
        write_beside_copy(
            folder,
            origin,
            "trimmed-vocabulary",
            trim_content(facts),
            source_card=SOURCE_CARD_NAME,
        )
        verify_saved(model, folder, generates=inputs.generates)
    finish_copy(run, TRIM, facts, source_hash(config.model))
    return facts
