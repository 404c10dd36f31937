"""Loads a model whose decoder layers stay on disk, from a folder of safetensors files."""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.checkpoint import attach_quantizer, check_not_quantized
from grasp_lightning.models.completeness import check_complete
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.device import resolve_device
from grasp_lightning.models.experts import narrowed_experts
from grasp_lightning.models.factored_rows import factorized_rows
from grasp_lightning.models.integrity import check_finite_weight, hash_of_tensors
from grasp_lightning.models.loading import LoadedModel, load_without_weights
from grasp_lightning.models.lowrank import (
    GraspQuantizer,
    has_replaced,
    is_quantized_here,
    take_over_remote_code,
)
from grasp_lightning.models.source import describe_origin, downloaded, resolve_source
from grasp_lightning.models.stored_shapes import stored_shapes
from grasp_lightning.models.streamed import StoredAt, StreamedWeights, read_stored
from grasp_lightning.models.weight_files import ADVICE, fault, weight_files
from grasp_lightning.reading.tensors import open_tensors

_INSTEAD = "set model.loading=whole"


def check_streamable(config: ModelConfig) -> None:
    """Refuse sources that cannot be read layer by layer: a ``ConfigError``."""
    source = resolve_source(config)
    problem = None
    if config.trust_remote_code:
        problem = "code of a checkpoint (model.trust_remote_code) may build it in another way"
    elif source.gguf_file is not None:
        problem = "a GGUF file is converted as a whole"
    if problem is not None:
        raise ConfigError(f"model.loading is streamed, but {problem}; or {_INSTEAD}")


def load_streamed(
    config: ModelConfig, *, may_be_compressed: bool = False
) -> tuple[LoadedModel, str]:
    """Return a streamed model in eval mode with its tokenizer, and the hash of its weights.

    The files of a hub model that are not in the cache are downloaded.
    All weights are read once, in one process, to check and hash them. It fails like
    ``load_model``, and with a ``ModelError`` for a family that cannot be run layer by layer.

    Args:
        config: The model.
        may_be_compressed: Whether its linears may be replaced, as of a model that only runs.

    Raises:
        ModelError: As above.
    """
    check_streamable(config)
    device = resolve_device(config.device)
    source = processes.on_first(lambda: downloaded(resolve_source(config)))
    model, tokenizer = load_without_weights(replace(config, revision=source.revision))
    folder = source.local_folder()
    assert folder is not None  # all files are in it
    if has_replaced(model) and not may_be_compressed:
        raise ModelError(
            f"{source.name} is compressed already, which cannot be streamed: {_INSTEAD}"
        )
    if factorized_rows(model) or narrowed_experts(model):
        raise ModelError(
            f"{source.name} has factors of its embedding or narrowed experts, which cannot be "
            f"streamed: {_INSTEAD}"
        )
    weights = _attached(source.name, model, folder, device)
    digest = processes.on_first(lambda: hash_of_tensors(_checked(model, weights)))
    model.config.name_or_path = model.name_or_path = source.name  # no path of this machine is saved
    tokenizer.name_or_path = source.name
    loaded = LoadedModel(model=model, tokenizer=tokenizer, origin=describe_origin(source))
    return loaded, digest


def _attached(
    name: str, model: PreTrainedModel, folder: Path, device: torch.device
) -> StreamedWeights:
    """Load what is outside the decoder layers, and let these read their weights from a folder."""
    check_not_quantized(model, ModelError)
    if is_quantized_here(model):
        raise ModelError(f"the weights of {name} are quantized, which is not streamed: {_INSTEAD}")
    take_over_remote_code(model)
    attach_quantizer(model)
    names, _ = stored_names(model)
    view, found = DecoderView(model), _files(folder)
    _match_dtype(model, found)
    _check_stored(name, model, folder, names)
    files = {own: StoredAt(found[key], key) for own, key in names.items() if key in found}
    check_apart(model, view)
    layers = {id(module) for index in view.layer_indices for module in view.layer(index).modules()}
    _compute_buffers(name, model, device)  # first: it also initialises weights
    _load_outside(model, layers, files, device)
    return StreamedWeights(view, files, device)


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor.

    Raises:
        ModelError: If a file is missing, damaged, or no safetensors file.
    """
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise ModelError(
                f"{fault(path)}: model.loading streamed reads safetensors files only; {_INSTEAD}"
            )
        with open_tensors(path, ModelError, fault(path), ADVICE) as content:
            found |= dict.fromkeys(content.keys(), path)
    return found


def _match_dtype(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
    """Give the model the dtype that ``from_pretrained`` would give it.

    Raises:
        ModelError: If the family keeps some weights in float32.
    """
    if model.config.dtype is None:  # no key of the config says it: that of the first weight
        name, path = next(iter(files.items()))
        (first,) = read_stored({name: StoredAt(path, name)}, [name]).values()
        model.to(dtype=first.dtype)  # type: ignore[call-arg]  # transformers wraps it
        model.config.dtype = first.dtype
    in_float32 = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    if in_float32 and model.dtype.itemsize < torch.float32.itemsize:
        raise ModelError(
            f"{type(model).__name__} keeps some weights in float32, which cannot be streamed in "
            f"{model.dtype}: set model.dtype=float32, or {_INSTEAD}"
        )


def _check_stored(
    name: str, model: PreTrainedModel, folder: Path, names: Mapping[str, str]
) -> None:
    """Refuse a checkpoint whose names and shapes are not those of the model: a ``ModelError``."""
    stored, tied = stored_shapes(folder), model.all_tied_weights_keys
    state = model.state_dict()
    wanted = {names.get(key, key): tuple(tensor.shape) for key, tensor in state.items()}
    missing = sorted(key for key in wanted.keys() - stored.keys() if key not in tied)
    if missing:
        raise ModelError(
            f"the weight files of {name} have no {missing[0]}, and model.loading streamed converts "
            f"no names: {_INSTEAD}"
        )
    both = wanted.keys() & stored.keys()
    wrong = [(key, stored[key], wanted[key]) for key in both if stored[key] != wanted[key]]
    check_complete(name, {"missing_keys": [], "mismatched_keys": wrong, "error_msgs": []})


def check_apart(model: PreTrainedModel, view: DecoderView) -> None:
    """Refuse decoder layers that share weights: a ``ModelError``."""
    owners: dict[int, set[int | None]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(view.layer_of(key))
    if any(len(found) > 1 for found in owners.values()):
        raise ModelError(
            f"decoder layers of {type(model).__name__} share weights, so they cannot be streamed: "
            f"{_INSTEAD}"
        )


def _load_outside(
    model: PreTrainedModel,
    layers: AbstractSet[int],
    files: Mapping[str, StoredAt],
    device: torch.device,
) -> None:
    """Load parameters and buffers outside the decoder layers; tied ones stay tied."""
    loaded: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        if id(module) in layers:
            continue
        prefix = f"{path}." if path else ""
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in loaded:
                tensor = read_stored(files, [prefix + key])[prefix + key]
                loaded[id(parameter)] = nn.Parameter(
                    tensor.to(device=device, dtype=parameter.dtype), requires_grad=False
                )
            module._parameters[key] = loaded[id(parameter)]
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                tensor = read_stored(files, [prefix + key])[prefix + key]
                module._buffers[key] = tensor.to(device=device, dtype=buffer.dtype)


@torch.no_grad()
def _compute_buffers(name: str, model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, as transformers does.

    Raises:
        ModelError: If the family does not compute one of them.
    """
    owners: list[nn.Module] = []
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers[key]
            if buffer is not None:
                empty = torch.empty_like(buffer, device=device)
                module._buffers[key] = empty.fill_(torch.nan if buffer.is_floating_point() else 0)
                owners.append(module)
    for module in {id(owner): owner for owner in owners}.values():
        model._init_weights(module)  # type: ignore[no-untyped-call]  # untyped in transformers
    for path, buffer in model.named_buffers():
        if buffer.device.type != "meta" and not buffer.isfinite().all():
            raise ModelError(
                f"{name} has a buffer {path} whose values transformers does not compute, so it "
                f"cannot be streamed: {_INSTEAD}"
            )


def _checked(model: PreTrainedModel, weights: StreamedWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the state dict, sorted by name and checked to be finite."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.tensors(sorted(model.state_dict())):
        if name in parameters:
            check_finite_weight(name, tensor)
        yield name, tensor


def stored_names(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, str]]:
    """Return the name in the files of each tensor that is stored, and the files' metadata."""
    state = model.state_dict(keep_vars=True)
    keys, metadata = list(state), dict[str, str]()
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, GraspQuantizer):
        stored, metadata = quantizer.get_state_dict_and_metadata(model)
        keys = list(stored)  # in the order of the state dict
    names: dict[str, str] = {}
    seen: set[int] = set()
    for (name, tensor), key in zip(state.items(), keys, strict=True):
        if id(tensor) not in seen:  # tied weights are stored once
            seen.add(id(tensor))
            names[name] = key
    return names, metadata
