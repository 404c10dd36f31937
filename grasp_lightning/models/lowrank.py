"""Low-rank and narrowed linears and seams, and how transformers loads and saves models with them.

This file needs only torch and transformers: its text, ``int4.py``, ``experts.py``, ``sliced.py``
and ``factored_rows.py`` are copied into every saved model, which then opens without grasp_lightning
(with ``trust_remote_code=True``).

A saved model is an ordinary Hugging Face folder whose ``quantization_config`` names the low-rank
linears with their ranks and the narrowed ones with their shapes. A narrowed weight, or the right
factor of a low-rank linear, is stored under the key of the dense weight (``<module>.weight``): a
program that does not know this format finds a tensor of the wrong shape and stops, instead of
leaving the linear at random values. A seam has no dense weight: it takes the key of a parameter of
another shape in its decoder layer, which is stored as ``<seam>.held``. A model with sliced hidden
states has narrowed linears, narrower embeddings, and shortcuts under keys of their own; ``stream``
says where.

If the weights are also quantized, by torchao or bitsandbytes, ``weights`` holds the config of
transformers for that method, whose own quantizer reads and writes them once the linears have their
shapes.
"""

import json
import re
import shutil
import sys
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grasp_lightning.models.experts import is_narrowed_experts, narrowed_experts, shrink_experts
from grasp_lightning.models.factored_rows import (
    checked_rows,
    guard_resizing,
    is_factorized_rows,
    replace_rows,
    rows_settings,
)
from grasp_lightning.models.int4 import Int4Linear, as_int4_linear, is_int4, unpacked
from grasp_lightning.models.sliced import (
    BIASES,
    HEAD,
    SHORTCUTS,
    checked_settings,
    is_shortcut,
    is_sliced_norm,
    slice_modules,
    sliced_problem,
    stream_settings,
)

QUANT_METHOD = "grasp_lightning"
SEAM_BEFORE, SEAM_AFTER = "seam", "seam_after"  # names in a decoder layer
REMOTE_MODULE = "modeling_grasp"

_QUANTIZED_TENSORS = {"Int8Tensor", "Int4Tensor", "Int4OpaqueTensor", "Params4bit"}
# Added to the name of a module for the values of its weight.
_TORCHAO_VALUES = "._weight_qdata"


class LowRankLinear(nn.Module):
    """A linear ``y = left(right(x))`` of lower rank; ``bias`` belongs to ``left``.

    With rank 0 it returns its bias alone, and its empty weights are buffers: DeepSpeed, which
    partitions parameters, may wait for them forever.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # A factor of rank 0 has nothing to initialise.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        if rank == 0:
            for factor in (self.right, self.left):
                weight = factor.weight.detach()
                del factor.weight
                factor.register_buffer("weight", weight)

    @property
    def weight(self) -> Tensor:
        """Product of the factors, ``(out_features, in_features)``; families like Mamba read it.

        If they are quantized, it is on the meta device: GPT-2 asks for it to initialise it.
        """
        if type(self.left.weight).__name__ in _QUANTIZED_TENSORS:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.left.weight @ self.right.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the left linear, ``(out_features,)``, or None."""
        return self.left.bias

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.right.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.left.out_features

    @property
    def rank(self) -> int:
        """Size between the two linears."""
        return self.right.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply both linears, ``(..., in_features)`` -> ``(..., out_features)``."""
        return cast(Tensor, self.left(self.right(x)))


class NarrowedLinear(nn.Linear):
    """A linear with fewer inputs or outputs than the config of its model says.

    Attributes:
        adds_bias: Whether compression gave it a bias that the config of its model does not build.
    """

    adds_bias = False


class _WithHeads:
    """The config of a model with another number of heads, for one attention that reads it there."""

    def __init__(self, shared: PreTrainedConfig, num_heads: int) -> None:
        self.shared = shared
        self.num_attention_heads = num_heads

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  keys of all types
        if name == "shared":  # while it is copied
            raise AttributeError(name)
        return getattr(self.shared, name)


def fit_heads(attention: nn.Module) -> None:
    """Let an attention split the output of its fused linear into the heads that it has now.

    Only attention that reads its number of heads needs this, as that of Phi-3; others view as many
    heads as their linears compute.
    """
    holder: Any = attention  # Any: attributes of one family alone
    fused, output = (getattr(attention, name, None) for name in ("qkv_proj", "o_proj"))
    if fused is None or output is None or not hasattr(attention, "num_key_value_heads"):
        return
    if not hasattr(fused, "out_features"):  # several linears, as in Zaya
        return
    num_heads = output.in_features // holder.head_dim
    holder.num_key_value_heads = (fused.out_features // holder.head_dim - num_heads) // 2
    shared = getattr(holder.config, "shared", holder.config)
    is_dense = num_heads == shared.num_attention_heads
    holder.config = shared if is_dense else _WithHeads(shared, num_heads)


class SeamLinear(nn.Linear):
    """A square linear without bias, whose output a decoder layer adds to the hidden states."""

    def add_to(self, hidden: Tensor) -> Tensor:
        """Return the hidden states plus their map, ``(B, T, C)`` -> ``(B, T, C)``."""
        hidden = hidden.to(self.weight.device)
        return hidden + cast(Tensor, self(hidden))


def set_seam(layer: nn.Module, name: str, seam: SeamLinear) -> None:
    """Make a decoder layer hold a seam and use it.

    Args:
        layer: A decoder layer without a seam of this name.
        name: ``seam`` adds to the states that enter the layer, ``seam_after`` to those that leave.
        seam: The linear.
    """
    layer.add_module(name, seam)
    if name == SEAM_BEFORE:
        layer.register_forward_pre_hook(_cross_before, with_kwargs=True)
    else:
        layer.register_forward_hook(_cross_after)


def _cross_before(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],  # Any: of every family
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    add = cast(SeamLinear, layer.get_submodule(SEAM_BEFORE)).add_to
    if args:
        return (add(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"])}


def _cross_after(layer: nn.Module, _: object, output: Any) -> Any:  # noqa: ANN401  of every family
    add = cast(SeamLinear, layer.get_submodule(SEAM_AFTER)).add_to
    return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)


def is_low_rank(module: nn.Module) -> bool:
    """Return whether a module is a low-rank linear, of this file or of a copy of it."""
    # By name: a model loaded through remote code holds the class of the copied file.
    return type(module).__name__ == LowRankLinear.__name__


def is_narrowed(module: nn.Module) -> bool:
    """Return whether a module is a narrowed linear, of this file or of a copy of it."""
    # By name, as above; FSDP2 creates a subclass for every module that it shards.
    return any(base.__name__ == NarrowedLinear.__name__ for base in type(module).__mro__)


def dense_shape(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (out_features, in_features); a ``Conv1D``, as in GPT-2, stores them reversed."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def low_rank_linears(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank linears of a model by full name, sorted by name."""
    found = {name: module for name, module in model.named_modules() if is_low_rank(module)}
    return {name: cast(LowRankLinear, found[name]) for name in sorted(found)}


def narrowed_linears(model: nn.Module) -> dict[str, NarrowedLinear]:
    """Return the narrowed linears of a model by full name, sorted by name."""
    found = {name: module for name, module in model.named_modules() if is_narrowed(module)}
    return {name: cast(NarrowedLinear, found[name]) for name in sorted(found)}


def is_seam(module: nn.Module) -> bool:
    """Return whether a module is a seam, of this file or of a copy of it."""
    return any(base.__name__ == SeamLinear.__name__ for base in type(module).__mro__)


def seams(model: nn.Module) -> dict[str, SeamLinear]:
    """Return the seams of a model by full name, sorted by name."""
    found = {name: module for name, module in model.named_modules() if is_seam(module)}
    return {name: cast(SeamLinear, found[name]) for name in sorted(found)}


def is_replaced(module: nn.Module) -> bool:
    """Return whether compression made a module: linear, rows, experts, seam, norm or shortcut."""
    is_sliced = is_sliced_norm(module) or is_shortcut(module)
    is_smaller = is_low_rank(module) or is_narrowed(module) or is_narrowed_experts(module)
    return is_smaller or is_seam(module) or is_sliced or is_factorized_rows(module)


def has_replaced(model: nn.Module) -> bool:
    """Return whether a model has modules that compression made."""
    return any(is_replaced(module) for module in model.modules())


class GraspConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model, by full module names.

    Args:
        ranks: Rank of each low-rank linear.
        shapes: ``[out_features, in_features]`` of each narrowed linear.
        seams: For each seam the parameter of its decoder layer under whose key it is stored.
        biases: Narrowed linears with a bias that the config of the model does not build.
        weights: The config of the quantizer of transformers that reads the weights of linears, with
            its ``quant_method``; None for plain floating point.
        stream: What slicing changed besides shapes of linears, see
                ``sliced.stream_settings``.
        experts: Inner channels of the experts that have lost some.
        rows: Groups of the rows of embedding and head, see ``factored_rows.rows_settings``.
        **unknown: Refused: a newer format may have additions that must not be ignored.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        quant_method: str = QUANT_METHOD,
        shapes: Mapping[str, Sequence[int]] | None = None,
        weights: Mapping[str, Any] | None = None,  # Any: values of JSON
        seams: Mapping[str, str] | None = None,
        *,
        biases: Sequence[str] = (),
        stream: Mapping[str, Any] | None = None,  # Any: values of JSON
        experts: Mapping[str, int] | None = None,
        rows: Mapping[str, Any] | None = None,  # Any: values of JSON
        **unknown: object,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config has unknown keys {sorted(unknown)}: the model was saved by a "
                f"newer version of {QUANT_METHOD}, please update it"
            )
        _check_linears(ranks or {}, shapes or {}, biases)
        _check_seams(seams or {})
        _check_experts(experts or {})
        self.experts = dict(experts or {})
        self.rows = checked_rows(rows or {})
        self.biases = list(biases)
        self.seams = dict(seams or {})
        self.stream = checked_settings(stream or {})
        self.quant_method = quant_method  # type: ignore[assignment]  # its enum has no others
        self.ranks = dict(ranks or {})
        self.shapes = {module: list(shape) for module, shape in (shapes or {}).items()}
        self.weights = dict(weights) if weights else None

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return the content of config.json, without what says nothing, except for ranks."""
        content: dict[str, Any] = super().to_dict()
        for key in ("shapes", "weights", "seams", "biases", "stream", "experts", "rows"):
            if not content[key]:
                del content[key]
        return content


# transformers refuses another quantization_config for such a model, and names the class.
GraspConfig.__name__ += (
    " (to quantize it, load it without quantization_config, then call "
    "grasp_lightning.quantize(model, 'int8'))"
)


class GraspQuantizer(HfQuantizer):
    """Loads and saves replaced linears and seams through transformers' quantizer registry."""

    requires_calibration = True  # so that transformers does not "quantize" a dense checkpoint
    is_trainable = True
    is_qat_trainable = True  # else trainers refuse to train the factors
    is_compileable = True
    quantization_config: GraspConfig

    def __init__(self, quantization_config: GraspConfig, **kwargs: bool) -> None:
        super().__init__(quantization_config, **kwargs)
        self._modules: dict[str, str] = {}  # name in the checkpoint -> name in the model
        self._seam_keys: dict[str, str] = {}  # key in the checkpoint -> key in the model
        self._conversions: list[WeightTransform] = []
        self._weights: Any = _weights_quantizer(quantization_config.weights)
        if self._weights is not None:
            self.is_qat_trainable = self._weights.is_qat_trainable
            self.is_trainable = self._weights.is_trainable

    def validate_environment(self, *arguments: object, **options: object) -> None:
        """Raise an error if the quantizer of the weights cannot run here."""
        if self._weights is not None:
            self._weights.validate_environment(*arguments, **options)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: object
    ) -> bool:
        """Return whether a parameter is quantized, so that its stored shape may differ."""
        return self._weights is not None and bool(
            self._weights.param_needs_quantization(model, param_name, **options)
        )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: object = None,
        checkpoint_files: Sequence[str] | None = None,
        **options: object,
    ) -> None:
        """Replace dense linears and add seams while the model is still on the meta device."""
        self._replace_linears(model)
        names = {name for name, _ in model.named_modules()}
        for stored, width in self.quantization_config.experts.items():
            shrink_experts(model.get_submodule(_name_in_model(model, names, stored)), stored, width)
        slice_modules(model, self.quantization_config.stream, partial(_name_in_model, model, names))
        self._add_seams(model)
        settings = self.quantization_config
        biases = settings.biases if self._weights is None else ()
        added = [f"{module}.bias" for module in biases]
        added += [f"{name}.weight" for name in settings.stream.get(SHORTCUTS, ())]
        added += replace_rows(model, settings.rows, partial(_name_in_model, model, names))
        _check_stored([*self._seam_keys, *added], checkpoint_files or ())
        if self._weights is not None:
            self._weights.preprocess_model(
                model, device_map=device_map, checkpoint_files=checkpoint_files, **options
            )

    def _replace_linears(self, model: PreTrainedModel) -> None:
        names = {name for name, _ in model.named_modules()}
        for stored, rank in self.quantization_config.ranks.items():
            module, linear = _linear_in_model(model, names, stored)
            rows, columns = dense_shape(linear)
            if rank > min(rows, columns):
                raise ValueError(
                    f"rank {rank} of {stored} does not fit a linear of {rows} x {columns}"
                )
            low_rank = LowRankLinear(columns, rows, rank, **_options_of(linear))
            model.set_submodule(module, low_rank)
            self._modules[stored] = module
            for factor in (low_rank.left, low_rank.right):
                # They are loaded: a family's initialisation of linears by name does not apply.
                factor._is_hf_initialized = True  # type: ignore[assignment]  # a flag, no module
        self._narrow_linears(model, names)

    def _narrow_linears(self, model: PreTrainedModel, names: AbstractSet[str]) -> None:
        # The quantizer of bitsandbytes takes plain linears only.
        narrowed = NarrowedLinear if self._weights is None else nn.Linear
        stream, changed = self.quantization_config.stream, set[str]()
        for stored, (rows, columns) in self.quantization_config.shapes.items():
            if stored == stream.get(HEAD) and stored not in names:
                continue  # a model without its head
            module, linear = _linear_in_model(model, names, stored)
            dense = dense_shape(linear)
            if not (rows <= dense[0] and columns <= dense[1] and (rows, columns) != dense):
                raise ValueError(
                    f"shape {rows} x {columns} of {stored} is not smaller than that of a linear of "
                    f"{dense[0]} x {dense[1]}"
                )
            options, adds_bias = _options_of(linear), stored in self.quantization_config.biases
            options["bias"] = options["bias"] or adds_bias or stored in stream.get(BIASES, ())
            new = narrowed(columns, rows, **options)
            if isinstance(new, NarrowedLinear):
                new.adds_bias = adds_bias
            model.set_submodule(module, new)
            changed.add(module.rpartition(".")[0])
        for parent in changed:
            fit_heads(model.get_submodule(parent))

    def _add_seams(self, model: PreTrainedModel) -> None:
        names = {name for name, _ in model.named_modules()}
        size = model.config.get_text_config().hidden_size
        for stored, held in self.quantization_config.seams.items():
            parent, _, name = stored.rpartition(".")
            module = _name_in_model(model, names, parent)
            layer = model.get_submodule(module)
            parameter = held.removeprefix(f"{parent}.")
            known = dict(layer.named_parameters())
            if parameter not in known or tuple(known[parameter].shape) == (size, size):
                raise ValueError(f"{stored} cannot be stored as {held} of this model")
            dtype = known[parameter].dtype
            seam = SeamLinear(size, size, bias=False, device="meta", dtype=dtype)
            set_seam(layer, name, seam)
            # In this order: the first renaming must not undo the second one.
            self._seam_keys[held] = f"{module}.{name}.weight"
            self._seam_keys[f"{stored}.held"] = f"{module}.{parameter}"

    def get_weight_conversions(self) -> list[WeightTransform]:
        """Return one renaming per low-rank linear, whose right factor is in ``<module>.weight``.

        The values of all weights that torchao quantized are stored under such keys too.
        """
        names = {f"{stored}.weight": f"{m}.right.weight" for stored, m in self._modules.items()}
        if self._weights is not None:
            quantized = _torchao_weights(getattr(self._weights, "metadata", {}))
            ranks = self.quantization_config.ranks
            names |= {_stored_key(key, ranks): key for key in map(_values_of, quantized)}
        names |= self._seam_keys
        self._conversions = [
            WeightRenaming(source_patterns=f"^{re.escape(stored)}$", target_patterns=key)
            for stored, key in names.items()
        ]
        if self._weights is not None:
            self._conversions += self._weights.get_weight_conversions()
        return [*self._conversions]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: object
    ) -> PreTrainedModel:
        """Leave the model as if it had been compressed in memory."""
        # transformers reverses used renamings on save; ours would give keys that end in "$", and
        # get_state_dict_and_metadata has already renamed.
        ours = {id(conversion) for conversion in self._conversions}
        used = getattr(model, "_weight_conversions", None) or []
        holder: Any = model  # Any: transformers does not declare the attributes it sets
        holder._weight_conversions = [entry for entry in used if id(entry) not in ours]
        guard_resizing(model)
        if self._weights is not None:
            self._weights.postprocess_model(model)
            finish_quantized(model)
            model.config.quantization_config = self.quantization_config
            take_over_remote_code(model)
            return model
        # Names of the model that was saved; the loaded class may have another prefix.
        model.config.quantization_config = config_of(model)
        take_over_remote_code(model)
        # The factors are plain floating point, so .half() and .float() stay allowed.
        holder.is_quantized = False
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to store, with right factors under the keys of dense weights."""
        if self._weights is None:
            check_fails_closed(model)
        tensors, metadata = _plain_tensors(model.state_dict(), self._weights)
        ranks = low_rank_linears(model)
        held: dict[str, str] = {}
        for seam, parameter in seam_keys_of(model).items():
            held |= {f"{seam}.weight": parameter, parameter: f"{seam}.held"}
        return {
            held.get(key) or _stored_key(key, ranks): tensor for key, tensor in tensors.items()
        }, metadata

    def is_serializable(self) -> bool:
        """Return True, so that ``save_pretrained`` may be called."""
        return True


def is_quantized_here(model: PreTrainedModel) -> bool:
    """Return whether the weights of a model are quantized within this format."""
    config = getattr(model.config, "quantization_config", None)
    return bool(getattr(config, "weights", None))


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of every low-rank linear by full name, sorted by name."""
    return {module: linear.rank for module, linear in low_rank_linears(model).items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every narrowed linear by full name, sorted by name."""
    found = narrowed_linears(model)
    return {module: (linear.out_features, linear.in_features) for module, linear in found.items()}


def biases_of(model: nn.Module) -> list[str]:
    """Return the full names of narrowed linears with an added bias, sorted."""
    return [module for module, linear in narrowed_linears(model).items() if linear.adds_bias]


def seam_keys_of(model: nn.Module) -> dict[str, str]:
    """Return, for every seam by full name, the parameter under whose key it is stored.

    It is one of its decoder layer whose shape is not that of the seam, so that a loader without
    this format stops. Replaced linears have keys of their own.

    Raises:
        ValueError: If a layer has none.
    """
    found: dict[str, str] = {}
    for name, seam in seams(model).items():
        parent = name.rpartition(".")[0]
        layer = model.get_submodule(parent)
        ours = tuple(f"{n}." for n, module in layer.named_modules() if is_replaced(module))
        # Vectors first, usually a norm: they have another shape in every family.
        parameters = sorted(layer.named_parameters(), key=lambda entry: entry[1].ndim)
        free = (
            key
            for key, parameter in parameters
            if not key.startswith(ours) and parameter.shape != seam.weight.shape
        )
        key = next((key for key in free if f"{parent}.{key}" not in found.values()), None)
        if key is None:
            raise ValueError(f"{name} cannot be saved: no parameter of its layer has another shape")
        found[name] = f"{parent}.{key}"
    return found


def config_of(model: nn.Module) -> GraspConfig:
    """Return the config that rebuilds what compression made of a model."""
    return GraspConfig(
        ranks_of(model),
        shapes=shapes_of(model),
        seams=seam_keys_of(model),
        biases=biases_of(model),
        stream=stream_settings(model),
        experts=narrowed_experts(model),
        rows=rows_settings(model),
    )


def check_fails_closed(model: nn.Module) -> None:
    """Raise a ``ValueError`` if a loader without this format would load it without an error."""
    # The right factor (r, M) must differ in shape from the dense weight: (N, M), or (M, N) for a
    # Conv1D, where they agree only if r = M = N. A narrowed weight (n, m) always differs: n <= N
    # and m <= M, one of them less, exclude n = M and m = N too.
    for module, linear in low_rank_linears(model).items():
        if linear.rank == linear.out_features:
            raise ValueError(
                f"{module} has rank {linear.rank}, as many as its output features, which saves "
                "nothing; leave it dense"
            )
    problem = sliced_problem(model)
    if problem is not None:
        raise ValueError(problem)


def finish_quantized(model: nn.Module) -> None:
    """Bring a model with loaded or new quantized weights into the form that computes."""
    for name, module in [*model.named_modules()]:
        if is_int4(module._parameters.get("weight")):
            model.set_submodule(name, as_int4_linear(module))
        elif type(module).__name__ == "Linear4bit":
            # Once packed for AVX-512, its state cannot be saved, and few shapes can be packed.
            module.support_avx512bf16_for_cpu = False
            missing = module.weight.quant_state.shape[1] - module.in_features
            if missing:
                module.register_forward_pre_hook(partial(_pad_input, missing))
    for linear in low_rank_linears(model).values():
        if isinstance(linear.right, Int4Linear):  # a padded rank is not cut and padded again
            linear.right.out_features = linear.left.in_features = linear.right.weight.shape[0]


def _pad_input(missing: int, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Return the input of a linear with zeros for the columns that its weight has in addition."""
    return nn.functional.pad(inputs[0], (0, missing))


def _weights_quantizer(config: Mapping[str, Any] | None) -> HfQuantizer | None:
    """Return the quantizer of transformers that reads quantized weights, if there are any."""
    if config is None:
        return None
    library = str(config.get("quant_method"))
    if find_spec(library) is None:
        raise ImportError(
            f"the weights of this model are quantized with {library}, which is not installed: "
            f"pip install {library}"
        )
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
    return quantizer


def _plain_tensors(
    state: Mapping[str, Tensor], quantizer: HfQuantizer | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the plain tensors of a state dict, and what torchao needs to assemble its own."""
    if quantizer is None or quantizer.quantization_config.quant_method != "torchao":
        return dict(state), {}
    from torchao.prototype.safetensors import safetensors_support  # noqa: PLC0415

    portable = {key: unpacked(t) if is_int4(t) else t for key, t in state.items()}
    flat: Any = safetensors_support.flatten_tensor_state_dict(portable)  # Any: untyped there
    return flat[0], flat[1]


def _torchao_weights(metadata: Mapping[str, str]) -> list[str]:
    """Return the names of the quantized parameters in the metadata of safetensors files."""
    kinds = {
        name: json.loads(metadata[name])["_type"]
        for name in json.loads(metadata.get("tensor_names", "[]"))
    }
    return [name for name, kind in kinds.items() if kind != "Tensor"]


def _stored_key(key: str, ranks: Container[str]) -> str:
    """Return the key under which the tensor of a key of the model is stored."""
    if key.endswith(_TORCHAO_VALUES):
        key = key.removesuffix(_TORCHAO_VALUES) + ".weight"
    module = key.removesuffix(".right.weight")
    return f"{module}.weight" if module in ranks else key


def _values_of(parameter: str) -> str:
    return parameter.removesuffix(".weight") + _TORCHAO_VALUES


def _check_linears(
    ranks: Mapping[str, int], shapes: Mapping[str, Sequence[int]], biases: Iterable[str]
) -> None:
    for module, rank in ranks.items():
        if not _is_size(rank, least=0):
            raise ValueError(f"rank of {module} must be an integer of at least 0, got {rank!r}")
    for module, shape in shapes.items():
        if not _is_shape(shape):
            raise ValueError(f"shape of {module} must be two positive integers, got {shape!r}")
        if module in ranks:
            raise ValueError(f"{module} has both a rank and a shape; expected one of them")
    for module in biases:
        if module not in shapes:
            raise ValueError(f"bias of {module}: expected a linear with a shape")


def _check_seams(seams: Mapping[str, str]) -> None:
    for seam, held in seams.items():
        layer, _, name = seam.rpartition(".")
        if name not in (SEAM_BEFORE, SEAM_AFTER) or not str(held).startswith(f"{layer}."):
            raise ValueError(
                f"seam {seam} must be {SEAM_BEFORE} or {SEAM_AFTER} of a decoder layer, stored as "
                f"one of its parameters, got {held!r}"
            )


def _check_experts(experts: Mapping[str, int]) -> None:
    for module, width in experts.items():
        if not _is_size(width):
            raise ValueError(f"width of {module} must be a positive integer, got {width!r}")


def _is_size(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and [_is_size(size) for size in value] == [True, True]


def _linear_in_model(
    model: PreTrainedModel, names: AbstractSet[str], stored: str
) -> tuple[str, nn.Linear | Conv1D]:
    """Return name and module of a dense linear."""
    module = _name_in_model(model, names, stored)
    linear = model.get_submodule(module)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise TypeError(f"{stored} must be a Linear, got {type(linear).__name__}")
    return module, linear


def _name_in_model(model: PreTrainedModel, names: AbstractSet[str], stored: str) -> str:
    """Return the name of a module, with or without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    candidates = (stored, stored.removeprefix(prefix), prefix + stored)
    module = next((name for name in candidates if name in names), None)
    if module is None:
        raise ValueError(
            f"quantization_config names {stored}, but {type(model).__name__} has no such module"
        )
    return module


def _check_stored(keys: Iterable[str], files: Sequence[str]) -> None:
    """Refuse weight files without some keys: transformers would load random values for them."""
    missing = set(keys)
    for file in files if missing else ():
        if not str(file).endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as stored:
            missing -= set(stored.keys())
    if files and missing:
        raise ValueError(f"the weight files lack {min(missing)}, which compression has added")


def _options_of(linear: nn.Linear | Conv1D) -> dict[str, Any]:  # Any: keyword arguments
    """Return the arguments of the linear that replaces another while on the meta device."""
    return {"bias": linear.bias is not None, "device": "meta", "dtype": linear.weight.dtype}


def take_over_remote_code(model: PreTrainedModel) -> None:
    """Remove our entries of ``auto_map``, and let ``save_pretrained`` write them and their file.

    It knows the files of custom model classes only, while the loaded model has its family's own
    class. A model that the package loaded without its remote code is saved without it.
    """
    auto_map = getattr(model.config, "auto_map", None) or {}
    ours = {auto: ref for auto, ref in auto_map.items() if f"{REMOTE_MODULE}." in ref}
    kept = {auto: ref for auto, ref in auto_map.items() if auto not in ours}
    _set_auto_map(model.config, kept)
    file = _code_file([ref.rpartition(".")[2] for ref in ours.values()])
    if file is not None:
        local = {auto: ref.rpartition("--")[2] for auto, ref in ours.items()}
        holder: Any = model  # Any: a method of one model alone
        holder.save_pretrained = partial(_save_with_code, model, local, file)


def _code_file(names: Sequence[str]) -> str | None:
    """Return the remote code file that defines some classes; None if none is loaded."""
    copies = [module for name, module in sys.modules.items() if name.endswith(f".{REMOTE_MODULE}")]
    fitting = [module for module in copies if all(hasattr(module, name) for name in names)]
    return fitting[-1].__file__ if names and fitting else None


def _save_with_code(
    model: PreTrainedModel,
    auto_map: Mapping[str, str],
    file: str,
    save_directory: str | Path,
    *arguments: object,
    **options: object,
) -> None:
    """Save a model together with the code that opens it without the package."""
    save: Any = type(model).save_pretrained  # Any: options of transformers
    earlier = dict(getattr(model.config, "auto_map", None) or {})
    needed = has_replaced(model) or is_quantized_here(model)
    _set_auto_map(model.config, {**earlier, **auto_map} if needed else earlier)
    try:
        save(model, save_directory, *arguments, **options)
    finally:
        _set_auto_map(model.config, earlier)
    for path in (file, *get_relative_import_files(file)) if needed else ():
        shutil.copyfile(path, Path(save_directory) / Path(path).name)


def _set_auto_map(config: PreTrainedConfig, auto_map: Mapping[str, str]) -> None:
    if auto_map:
        config.auto_map = dict(auto_map)
    elif hasattr(config, "auto_map"):
        del config.auto_map


# Only if absent: the package and the file inside a saved model may both be loaded.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, GraspConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, GraspQuantizer)
