"""The rows of a model's embedding and head, one per token, and the token ids in its configs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError

# Lists of ids in a generation config; removed tokens can no longer be generated.
_LISTS: Final = ("suppress_tokens", "begin_suppress_tokens")
_ODD: Final = ("bad_words_ids", "sequence_bias", "force_words_ids", "forced_decoder_ids")
_PROBE: Final = (5, 3, 4, 5, 2)  # ids that positions or kinds of tokens never are

Config = Any  # Any: a PreTrainedConfig or a GenerationConfig


def check_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the embedding; refuse a model with others of that kind.

    Raises:
        ModelError: See ``check_ends``; or its generation config has ids that cannot be renumbered.
    """
    embedding, _ = check_ends(model)
    odd = next((key for key in _ODD if getattr(model.generation_config, key, None)), None)
    if odd is not None:
        raise ModelError(
            f"the generation_config.json of the model has {odd}, whose token ids cannot be "
            "renumbered; remove it"
        )
    return int(embedding.weight.shape[0])


def check_ends(model: PreTrainedModel) -> tuple[Any, Any]:  # Any: as in _ends
    """Return embedding and head; refuse a model in which other modules have rows per token.

    On the meta device, embeddings that read token ids beside it are not found.

    Raises:
        ModelError: If it has no head of as many rows, or if other modules share their weights or
            embed tokens, too.
    """
    embedding, head = _ends(model)
    ends = {id(embedding.weight), id(head.weight)}
    others = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if module not in (embedding, head)
        and any(id(parameter) in ends for parameter in module.parameters(recurse=False))
    ]
    others += _other_names(model, embedding, head)
    if not (others or embedding.weight.is_meta):
        others += _other_embeddings(model, embedding)
    if others:
        raise ModelError(
            f"{type(model).__name__} also has one row per token in {', '.join(sorted(others))}; "
            "expected an embedding, and a head that may share its weight"
        )
    return embedding, head


def special_ids(model: PreTrainedModel, num_rows: int) -> frozenset[int]:
    """Return the token ids that the configs of a model name, below its number of rows."""
    found = {
        token
        for config in _configs(model)
        for _, value in _id_keys(config)
        for token in (value if isinstance(value, list | tuple) else [value])
    }
    return frozenset(token for token in found if 0 <= token < num_rows)


def trim_rows(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Keep some rows of embedding and head, in place; configs get their number and new ids.

    Args:
        model: A model that ``check_rows`` accepts.
        rows: Old id of each new id, ``(n,)``; with all of ``special_ids``.
    """
    embedding, head = _ends(model)
    old_size, size = embedding.weight.shape[0], len(rows)
    new_ids = {old: new for new, old in enumerate(rows)}
    index = torch.tensor(rows, device=embedding.weight.device)
    is_tied = head.weight is embedding.weight
    embedding.weight = _selected(embedding.weight, index)
    head.weight = embedding.weight if is_tied else _selected(head.weight, index)
    if getattr(head, "bias", None) is not None:
        head.bias = _selected(head.bias, index)
    embedding.num_embeddings = head.out_features = size
    modules: Iterator[Any] = model.modules()  # Any: with the attributes of any family
    for module in modules:
        is_sized = getattr(module, "vocab_size", None) == old_size
        if is_sized:
            module.vocab_size = size
        if is_sized or module is embedding:
            _renumber_padding(module, new_ids)
    model.config.get_text_config().vocab_size = size
    for config in _configs(model):
        _renumber_config(config, new_ids)


def _renumber_padding(module: Any, new_ids: Mapping[int, int]) -> None:  # noqa: ANN401  of any family
    # A padding id of -1 is the last row for torch, which may be removed.
    if isinstance(getattr(module, "padding_idx", None), int):
        module.padding_idx = new_ids.get(module.padding_idx)


def _renumber_config(config: Config, new_ids: Mapping[int, int]) -> None:
    for key, value in list(_id_keys(config)):
        setattr(config, key, _renumbered(value, new_ids))
    for key in _LISTS:
        listed = getattr(config, key, None)
        if listed:
            setattr(config, key, [new_ids[old] for old in listed if old in new_ids] or None)


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:  # Any: embedding and linear of any family
    """Return embedding and head, refused if they have not one row per token each."""
    get_head: Any = model.get_output_embeddings  # Any: untyped in transformers
    embedding, head = model.get_input_embeddings(), get_head()
    rows = [getattr(getattr(end, "weight", None), "shape", (None,))[0] for end in (embedding, head)]
    if not isinstance(embedding, nn.Embedding) or rows[0] != rows[1]:
        raise ModelError(
            f"{type(model).__name__} has no embedding and head with one row per token each: they "
            f"have {rows[0]} and {rows[1]} rows"
        )
    return embedding, head


def _other_names(model: PreTrainedModel, embedding: nn.Module, head: nn.Module) -> list[str]:
    """Return further places of embedding and head in the model."""
    found: list[str] = []
    for end in (embedding, head):
        names = [n for n, m in model.named_modules(remove_duplicate=False) if m is end]
        found += names[1:]
    return found


def _other_embeddings(model: PreTrainedModel, embedding: nn.Module) -> list[str]:
    """Return the embeddings that get token ids besides the one of the model, found by a pass."""
    ids = torch.tensor([_PROBE], device=model.device)
    found: list[str] = []

    def look(name: str, args: Sequence[object]) -> None:
        if any(isinstance(given, Tensor) and torch.equal(given, ids) for given in args):
            found.append(name)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _selected(parameter: Tensor, index: Tensor) -> nn.Parameter:
    chosen = parameter.detach()[index.to(parameter.device)].clone()
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _configs(model: PreTrainedModel) -> list[Config]:
    found = [model.config, model.config.get_text_config(), model.generation_config]
    return list({id(config): config for config in found if config is not None}.values())


def _id_keys(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config that name tokens, with one id or a list of ids."""
    for key, value in vars(config).items():
        values = value if isinstance(value, list | tuple) else [value]
        if key.endswith(("_token_id", "_token_index")) and all(type(v) is int for v in values):
            yield key, value


def _renumbered(value: Any, new_ids: Mapping[int, int]) -> Any:  # noqa: ANN401  an id, or a list
    if isinstance(value, list | tuple):
        return type(value)(new_ids.get(old, old) for old in value)
    return new_ids.get(value, value)
