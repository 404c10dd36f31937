"""Saves a model as an ordinary Hugging Face folder."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.errors import GraspError, ModelError, OutputError
from grasp_lightning.models import experts, factored_rows, int4, lowrank, sliced
from grasp_lightning.models.factored_rows import guard_resizing
from grasp_lightning.models.lowrank import (
    QUANT_METHOD,
    REMOTE_MODULE,
    GraspQuantizer,
    check_fails_closed,
    config_of,
    has_replaced,
    is_quantized_here,
)
from grasp_lightning.models.plain import make_plain
from grasp_lightning.models.quiet import quiet_transformers
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.source import first_line

_AUTO_CONFIG = "AutoConfig"
_OWN_IMPORTS = re.compile(
    r"^from grasp_lightning\.models\.\w+ import (?:\([^)]*\)|.*)\n", re.MULTILINE
)

# Auto classes that open a saved model without the package, if its family has them.
_AUTO_CLASSES = {
    "AutoModel": transformers.MODEL_MAPPING,
    "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}

# Bound methods of the family's own class: it does the loading, so that key conversions and other
# rules that transformers ties to its classes apply.
_REMOTE_CLASS = '''

class Grasp{name}({origin}):
    """``{name}``, with low-rank and narrowed linears registered; what it loads is a ``{name}``."""

    from_pretrained = {origin}.from_pretrained
'''
_REMOTE_MODEL = _REMOTE_CLASS + "    _from_config = {origin}._from_config\n"


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model, changed or not, as a folder that ``from_pretrained`` opens.

    With low-rank or narrowed linears, the config names them in ``quantization_config``, and the
    folder gets a generated ``modeling_grasp.py``. Such a model loads after ``import
    grasp_lightning`` or with ``trust_remote_code=True``; otherwise loading stops with an error.
    MLPs narrowed to one width that the config has a key for make an ordinary model, also in memory:
    see ``models.plain``. Weight files of an earlier save in the folder are deleted. The model stays
    usable and can be saved again.

    Args:
        model: The model, in any dtype.
        folder: Created if absent.
        tokenizer: Saved with the model.
        max_shard_size: Maximum size of a weight file, in bytes or as text such as ``5GB``.

    Raises:
        ModelError: If another method quantized the model, a low-rank linear has as high a rank as
            it has outputs, or the config would rebuild another model.
    """
    path = Path(folder)
    check_not_quantized(model, ModelError)
    try:
        check_fails_closed(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    make_plain(model)
    attach_quantizer(model)
    problem = rebuild_problem(model)
    if problem is not None:
        raise ModelError(problem)
    _write(model, path, tokenizer, max_shard_size)


def save_quantized(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a model that was quantized in place, with the code that opens it without the package.

    Args:
        model: A model after ``quantize_model``.
        folder: Created if absent; weight files of an earlier save in it are deleted.
        tokenizer: Saved with the model.
    """
    _write(model, Path(folder), tokenizer, "5GB")


def _write(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
) -> None:
    needs_code = has_replaced(model) or is_quantized_here(model)
    prepare_folder(path)
    # Keep the keys of the model in memory: transformers' reverse conversions to an older layout may
    # split or permute tensors, and do not know factors.
    save_original_format = not needs_code
    with quiet_transformers():
        model.save_pretrained(
            path, max_shard_size=max_shard_size, save_original_format=save_original_format
        )
    if needs_code:
        write_remote_code(model, path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def foreign_quantizer(model: PreTrainedModel) -> str | None:
    """Return the name of another quantization method on a model, such as ``gguf``, if any."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(model.config, "quantization_config", None)
    config = quantizer.quantization_config if quantizer is not None else config
    if config is None:
        return None
    # Weights that are quantized within our format are foreign too.
    stored = config.get("weights") if isinstance(config, dict) else getattr(config, "weights", None)
    config = stored or config
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return None if method == QUANT_METHOD else str(getattr(method, "value", method))


def attach_quantizer(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` store the replaced linears of a model changed in memory.

    Without it, factors and narrowed weights would get keys and shapes that no loader expects. A
    model without replaced linears loses its quantizer. It must not have a foreign one.
    """
    holder: Any = model  # Any: transformers does not declare the attributes it sets
    guard_resizing(model)
    if has_replaced(model):
        model.config.quantization_config = config_of(model)
        holder.hf_quantizer = GraspQuantizer(model.config.quantization_config)
    elif getattr(model, "hf_quantizer", None) is not None:
        holder.hf_quantizer.remove_quantization_config(model)


def check_not_quantized(model: PreTrainedModel, error: type[GraspError]) -> None:
    """Raise an error if a model has a quantizer of another method."""
    foreign = foreign_quantizer(model)
    if foreign is not None:
        raise error(
            f"the model is quantized with {foreign}; expected floating-point weights; load it "
            "dequantized, without its quantization state"
        )


def prepare_folder(path: Path) -> None:
    """Create a folder, or delete weights in it that loaders would prefer or mix with new ones."""
    path.mkdir(parents=True, exist_ok=True)
    stale = [path / "model.safetensors", path / "model.safetensors.index.json"]
    for file in (*stale, *path.glob("model-*-of-*.safetensors"), path / f"{REMOTE_MODULE}.py"):
        file.unlink(missing_ok=True)


def write_remote_code(model: PreTrainedModel, path: Path) -> None:
    """Write the code that opens a saved model without the package, and register it in its config.

    A checkpoint with code of its own keeps its model classes: reading its config registers ours.
    """
    config_class, is_custom = type(model.config), _is_remote(type(model))
    if not (is_custom or type(model).__module__.startswith("transformers.")):
        return  # a class of the caller's program, which a folder cannot contain
    classes = {_AUTO_CONFIG: config_class} | ({} if is_custom else _model_classes(config_class))
    linears = _OWN_IMPORTS.sub("", inspect.getsource(lowrank))
    parts = (*map(inspect.getsource, (int4, experts, sliced, factored_rows)), linears)
    code = ["\n\n".join(parts), "\n\nimport transformers  # noqa: E402\n"]
    for found, auto in {found: auto for auto, found in classes.items()}.items():
        name, origin = found.__name__, f"transformers.{found.__name__}"
        if _is_remote(found):
            module = found.__module__.rpartition(".")[2]
            code.append(f"from .{module} import {name}  # noqa: E402\n")
            origin = name
        form = _REMOTE_CLASS if auto == _AUTO_CONFIG else _REMOTE_MODEL
        code.append(form.format(name=name, origin=origin))
    (path / f"{REMOTE_MODULE}.py").write_text("".join(code), encoding="utf-8")
    file = path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    ours = {auto: f"{REMOTE_MODULE}.Grasp{found.__name__}" for auto, found in classes.items()}
    content["auto_map"] = {**content.get("auto_map", {}), **ours}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_classes(config_class: type[PreTrainedConfig]) -> dict[str, type]:
    """Return the class of transformers that each auto class opens for a family."""
    classes: dict[str, type] = {}
    for auto, mapping in _AUTO_CLASSES.items():
        if config_class in mapping:
            found: Any = mapping[config_class]  # Any: a class, or a tuple of classes
            classes[auto] = found[0] if isinstance(found, tuple) else found
    return classes


def _is_remote(found: type) -> bool:
    """Return whether transformers imported a class from code in a checkpoint."""
    return found.__module__.startswith("transformers_modules.")


def push_folder(folder: Path, repository: str) -> str:
    """Upload a model folder to a hub repository, created if absent, and return its address."""
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder))
    except (OSError, HFValidationError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise OutputError(
            f"push_to_hub: cannot upload to {repository} ({first_line(error)}); the model is in "
            f"{folder}: check the name, the network and your login, and run the same command again"
        ) from error
