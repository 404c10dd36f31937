"""Load a causal language model completely, or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.peft_utils import find_adapter_config_file

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.auto_classes import auto_class
from grasp_lightning.models.completeness import check_complete, check_config_builds, warn_of_rest
from grasp_lightning.models.device import resolve_device
from grasp_lightning.models.integrity import check_finite, model_hash

# The import also makes compressed models known to transformers.
from grasp_lightning.models.lowrank import QUANT_METHOD
from grasp_lightning.models.quiet import quiet_transformers
from grasp_lightning.models.side_files import fetch_side_files
from grasp_lightning.models.source import (
    ModelOrigin,
    ModelSource,
    check_whole,
    describe_origin,
    first_line,
    hub_error,
    pinned,
    resolve_source,
)
from grasp_lightning.models.stored_shapes import stored_shapes
from grasp_lightning.progress import pass_bar
from grasp_lightning.reading.text import check_file

__all__ = [
    "LoadedModel",
    "ModelOrigin",
    "check_finite",
    "load_meta_model",
    "load_model",
    "load_without_weights",
    "model_hash",
    "resolve_device",
]

# What libraries raise if a value is not of the type that they assume.
_UNFORESEEN = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
# What transformers, tokenizers, safetensors and torch raise on files they cannot use.
_LOADING_ERRORS = (
    *_UNFORESEEN,
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    EOFError,
    MemoryError,
    PickleError,
    SafetensorError,
    StrictDataclassError,
)
# Counts in a config that must be positive in every family that has them.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A complete and finite model in eval mode on its device, with tokenizer and origin."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: ModelOrigin


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model in eval mode, with every weight read and finite, and its tokenizer.

    A ``ConfigError`` reports keys without effect or an unavailable device, a ``ModelError`` a model
    that is missing, incomplete or damaged, and a ``NumericsError`` weights with NaN or infinity.
    """
    check_whole(config)
    device = resolve_device(config.device)
    source = pinned(resolve_source(config))
    _require_parts(source)
    # Before transformers reads a local file, to find a damaged GGUF file.
    origin = None if source.is_hub else describe_origin(source)
    hf_config = _read_config(source, config)
    tokenizer = _read_tokenizer(source, config)
    architectures = hf_config.architectures
    with pass_bar(f"loading {source.name}", None, console=Console(stderr=True)):
        model, report = _read_weights(source, config, hf_config)
    check_complete(source.name, report)
    with _as_model_error(source):
        check_config_builds(source.name, model)
    folder = source.local_folder() if source.gguf_file is None else None
    unexpected = frozenset(report["unexpected_keys"])
    stored = stored_shapes(folder) if folder else None
    warn_of_rest(source.name, model, architectures, unexpected, stored)
    with _as_model_error(source):
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a too narrow type
    check_finite(model)
    model.config.name_or_path = model.name_or_path = source.name  # no path of this machine is saved
    tokenizer.name_or_path = source.name
    if source.is_hub:  # licence and size are only known once its files are cached
        fetch_side_files(source.location, source.revision, source.local_folder())
    return LoadedModel(model=model, tokenizer=tokenizer, origin=origin or describe_origin(source))


def load_without_weights(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model on the meta device and its tokenizer.

    Fails like ``load_model``, except for the values of weights.
    """
    resolve_device(config.device)
    source = pinned(resolve_source(config))
    _require_parts(source)
    return load_meta_model(config, warns=True), _read_tokenizer(source, config)


def load_meta_model(config: ModelConfig, *, warns: bool = False) -> PreTrainedModel:
    """Build a model from its configuration alone, with all parameters on the meta device.

    Fails like ``load_model``, except for weights, tokenizer and device. With ``warns``, a warning
    says if the model is only a part of its checkpoint.
    """
    source = pinned(resolve_source(config))
    _require_config(source)
    if source.gguf_file is not None:
        describe_origin(source)
    hf_config = _read_config(source, config)
    dtype = _dtype_of(config, source)
    with _as_model_error(source), torch.device("meta"):
        build = auto_class(hf_config).from_config
        options = {} if dtype == "auto" else {"dtype": dtype}
        model = build(hf_config, trust_remote_code=config.trust_remote_code, **options)
        stored = getattr(hf_config, "quantization_config", None)
        if isinstance(stored, Mapping) and stored.get("quant_method") == QUANT_METHOD:
            quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
            quantizer.preprocess_model(model=model)
    if warns and source.gguf_file is None:
        warn_of_rest(source.name, model, hf_config.architectures)
    return cast(PreTrainedModel, model.eval())


def _require_parts(source: ModelSource) -> None:
    _require_config(source)
    if source.gguf_file is not None or source.is_hub:
        return
    folder = Path(source.location)
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_dir():  # a FIFO would block
            check_file(file, ModelError, f"model.path: {file}")
    # Read now, to report a damaged file before loading starts.
    if not stored_shapes(folder):
        raise ModelError(
            f"model.path: {folder} has a config.json but no weights "
            f"(model.safetensors or pytorch_model.bin)"
        )


def _require_config(source: ModelSource) -> None:
    if source.gguf_file is not None:
        return
    with _as_model_error(source):
        where = str(source.snapshot or source.location)
        has_adapter = find_adapter_config_file(where, revision=source.revision)
    folder = Path(source.location)
    has_config = source.is_hub or (folder / "config.json").is_file()
    if has_adapter and has_config:
        raise ModelError(
            f"model.path: {source.location} has a PEFT adapter next to the model: merge it first, "
            "with peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(), or move "
            "adapter_config.json elsewhere to use the model without the adapter"
        )
    if has_adapter:
        raise ModelError(
            f"model.path: {source.location} is a PEFT adapter without its base model: merge it "
            f"first, with peft.AutoPeftModelForCausalLM.from_pretrained({source.location!r})"
            ".merge_and_unload().save_pretrained(folder), and name that folder"
        )
    if not has_config:
        files = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; it has {files[0]}: set model.gguf_file" if files else ""
        raise ModelError(f"model.path: {folder} is not a model folder: it has no config.json{hint}")


def _read_config(source: ModelSource, config: ModelConfig) -> PreTrainedConfig:
    with _as_model_error(source), quiet_transformers():
        arguments = _arguments(source, config)
        if source.gguf_file is None:
            _check_counts(source, PreTrainedConfig.get_config_dict(**arguments)[0])
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(**arguments))


def _check_counts(source: ModelSource, content: Mapping[str, Any]) -> None:  # Any: JSON
    text = content.get("text_config")
    for section in (content, text if isinstance(text, dict) else {}):
        for key in _COUNTS:
            if isinstance(section.get(key), int) and section[key] < 1:
                raise ModelError(
                    f"the config.json of {source.name} has {key} {section[key]}; expected 1 or more"
                )


def _read_tokenizer(source: ModelSource, config: ModelConfig) -> PreTrainedTokenizerBase:
    with _as_model_error(source, "the tokenizer of "), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(**_arguments(source, config))
    # transformers makes an empty tokenizer for some families when its files are missing.
    ids = set(tokenizer("the text", add_special_tokens=False)["input_ids"])
    if ids <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"{source.name} has no tokenizer, or one without a vocabulary: put tokenizer.json and "
            f"tokenizer_config.json next to its config.json"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _read_weights(
    source: ModelSource, config: ModelConfig, hf_config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, Any]]:  # Any: mixed report
    options: dict[str, Any] = {}  # Any: keyword arguments of transformers
    if source.gguf_file is not None:
        # With GPU kernels for GGUF installed, weights would otherwise stay packed.
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _as_model_error(source), quiet_transformers():
        model, report = auto_class(hf_config).from_pretrained(
            **_arguments(source, config),
            config=hf_config,
            dtype=_dtype_of(config, source),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
            **options,
        )
    if source.gguf_file is not None and hasattr(model, "hf_quantizer"):
        # The older parser of transformers leaves it in place, and saving would fail.
        model.hf_quantizer.remove_quantization_config(model)
    return model, report


def _arguments(
    source: ModelSource, config: ModelConfig
) -> dict[str, Any]:  # Any: keyword arguments
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": str(source.snapshot or source.location),
        "trust_remote_code": config.trust_remote_code,
    }
    if source.gguf_file is not None:
        arguments["gguf_file"] = str(source.gguf_file)
    elif source.revision is not None and source.snapshot is None:
        arguments["revision"] = source.revision
    return arguments


def _dtype_of(config: ModelConfig, source: ModelSource) -> torch.dtype | str:
    if config.dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.dtype))
    return torch.float32 if source.gguf_file is not None else "auto"


@contextmanager
def _as_model_error(source: ModelSource, part: str = "") -> Iterator[None]:
    """Turn the errors of libraries on unusable files into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{source.name} cannot be used: {first_line(error)}") from error
    except Exception as error:
        # tokenizers has no class of its own for its errors.
        if not isinstance(error, _LOADING_ERRORS) and type(error) is not Exception:
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source.name} needs its own model code; read that code, and set "
                f"model.trust_remote_code: true if you trust it"
            ) from error
        if source.is_hub and isinstance(error, OSError):
            raise hub_error(source.name, error) from error
        reason = first_line(error)
        if isinstance(error, _UNFORESEEN):
            reason = f"{reason} ({type(error).__name__}); its files are damaged or do not match"
        raise ModelError(f"cannot load {part}{source.name}: {reason}") from error
