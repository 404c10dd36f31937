"""``trim``: a model without the tokens that some texts never use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning.config import TrimConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.config.values import check_values
from grasp_lightning.data.corpora import (
    Corpus,
    CountedText,
    check_texts,
    corpora_of,
    counted_texts,
)
from grasp_lightning.data.token_texts import count_tokens
from grasp_lightning.errors import GraspError, ModelError
from grasp_lightning.models.checkpoint import check_not_quantized, save_model
from grasp_lightning.models.formats.gguf.pretokenizers import pre_tokenizer_of
from grasp_lightning.models.gguf import read_header
from grasp_lightning.models.loading import LoadedModel, load_model
from grasp_lightning.models.size import count_bytes, count_parameters
from grasp_lightning.models.source import resolve_source, source_hash
from grasp_lightning.models.verification import can_generate, verify_saved
from grasp_lightning.models.vocabulary.choice import Choice, choose_tokens
from grasp_lightning.models.vocabulary.files import (
    TOKENIZER,
    fitting_files,
    processor_tokens,
    read_tokenizer,
    tokenizer_content,
    write_tokenizer,
)
from grasp_lightning.models.vocabulary.logits import compare_logits, kept_logits
from grasp_lightning.models.vocabulary.pieces import pieces_of
from grasp_lightning.models.vocabulary.rows import check_rows, special_ids, trim_rows
from grasp_lightning.reporting.metrics import Change
from grasp_lightning.reporting.trimming import TextLength, TrimFacts, trim_content
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.copies import (
    MODEL_NAME,
    SIZE_FACTOR,
    CopyRun,
    finish_copy,
    stored_facts,
    write_beside_copy,
)

FACTS_NAME = "trim.json"
SOURCE_CARD_NAME = "SOURCE_MODEL_CARD.md"


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The checked inputs.

    Attributes:
        tokens: Text of every token by its id.
        special: Those that were added to the pieces.
        num_rows: Rows of the embedding.
        choice: The tokens that stay.
        pre_tokenizer: llama.cpp's name of it, if it has one.
        generates: Whether the model generates with its cache.
    """

    loaded: LoadedModel
    tokens: Mapping[int, str]
    special: Mapping[int, str]
    num_rows: int
    texts: Sequence[CountedText]
    choice: Choice
    pre_tokenizer: str | None
    generates: bool

    @property
    def new_vocabulary(self) -> dict[str, int]:
        """New id of every token that stays, by its text."""
        ids = self.choice.new_ids
        return {text: ids[index] for index, text in self.tokens.items() if index in ids}


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
                FACTS_NAME,
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
    model, tokenizer = loaded.model, loaded.tokenizer
    check_not_quantized(model, ModelError)
    gguf_file = resolve_source(config.model).gguf_file
    has_file = gguf_file is not None or any(
        file.name == TOKENIZER for file in loaded.origin.side_files
    )
    content = tokenizer_content(tokenizer, has_file=has_file)
    pieces = pieces_of(content)
    num_rows = check_rows(model)
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    tokens = {**{index: piece for piece, index in pieces.ids.items()}, **added}
    if max(tokens) >= num_rows:
        raise ModelError(
            f"the tokenizer has token {max(tokens)}, but the model has only {num_rows} rows: they "
            "do not belong together"
        )
    texts = [text for corpus in corpora for text in counted_texts(corpus, tokenizer, num_rows)]
    counts = torch.stack([text.counts.counts for text in texts if text.is_named]).sum(dim=0)
    protected = {*processor_tokens(content), *special_ids(model, num_rows)}
    choice = choose_tokens(
        pieces,
        tokens,
        counts.tolist(),
        protected.union(tokenizer.all_special_ids),
        multiple_of=config.multiple_of,
        num_tokens=config.num_tokens,
    )
    return _Inputs(
        loaded=loaded,
        tokens=tokens,
        special=added,
        num_rows=num_rows,
        texts=texts,
        choice=choice,
        pre_tokenizer=read_header(gguf_file).pre_tokenizer
        if gguf_file is not None
        else pre_tokenizer_of(tokenizer),
        generates=can_generate(model),
    )


def _execute(config: TrimConfig, inputs: _Inputs, run: RunFolder) -> TrimFacts:
    loaded, choice = inputs.loaded, inputs.choice
    model, old = loaded.model, loaded.tokenizer
    sizes = count_parameters(model), count_bytes(model)
    windows, kept = [text.counts.first.tolist() for text in inputs.texts], torch.tensor(choice.rows)
    before = kept_logits(model, windows, range(inputs.num_rows), kept)
    trim_rows(model, choice.rows)
    after = kept_logits(model, windows, choice.rows, kept)
    logits = compare_logits(before, after, model.dtype)
    run.check_free_space(int(SIZE_FACTOR * count_bytes(model)))
    with run.new_folder(MODEL_NAME) as folder:
        save_model(model, folder)
        write_tokenizer(old, folder, choice.new_ids, inputs.pre_tokenizer)
        new = read_tokenizer(
            folder, inputs.new_vocabulary, trust_remote_code=config.model.trust_remote_code
        )
        check_texts(inputs.texts, old, new, choice.new_ids, same_pieces=choice.keeps_all_used)
        facts = TrimFacts(
            model=loaded.origin.name,
            dtype=str(model.dtype).removeprefix("torch."),
            tokens=Change(before=inputs.num_rows, after=len(choice.rows)),
            parameters=Change(before=sizes[0], after=count_parameters(model)),
            bytes=Change(before=sizes[1], after=count_bytes(model)),
            used_tokens=choice.num_used,
            filling_tokens=choice.num_fillers,
            same_pieces=choice.keeps_all_used,
            logit_difference=logits.difference,
            largest_logit=logits.largest,
            special_tokens={text: choice.new_ids[old] for old, text in inputs.special.items()},
            texts=tuple(
                _length(text, new, len(choice.rows)) for text in inputs.texts if text.is_shown
            ),
        )
        origin = replace(loaded.origin, side_files=fitting_files(loaded.origin.side_files))
        write_beside_copy(
            folder,
            origin,
            "trimmed-vocabulary",
            trim_content(facts),
            source_card=SOURCE_CARD_NAME,
        )
        verify_saved(model, folder, generates=inputs.generates)
    finish_copy(run, FACTS_NAME, facts, source_hash(config.model))
    return facts


def _length(text: CountedText, tokenizer: PreTrainedTokenizerBase, size: int) -> TextLength:
    before, num_bytes = text.counts.num_tokens, text.counts.num_bytes
    after = count_tokens(text.documents, tokenizer, size).num_tokens
    return TextLength(
        name=text.name,
        is_named=text.is_named,
        num_bytes=num_bytes,
        tokens=Change(before=before, after=after),
        tokens_per_byte=Change(before=before / num_bytes, after=after / num_bytes),
    )
