"""What ``quantization_config`` of a compressed model says. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

QUANT_METHOD: Final = "grasp_lightning"
_KEYS: Final = {"quant_method", "ranks", "shapes", "seams", "stream"}
# Linears of attention: narrower ones have lost heads.
_HEADS: Final = (".q_proj", ".k_proj", ".v_proj", ".qkv_proj", ".o_proj")


@dataclass(frozen=True)
class SavedLinears:
    """The linears of a checkpoint that differ from those of the dense model, by full name.

    Attributes:
        ranks: Rank of each low-rank linear. Its right factor is stored as ``<module>.weight``,
            its left factor as ``<module>.left.weight``, its bias as ``<module>.left.bias``.
        shapes: (outputs, inputs) of each narrowed linear.
    """

    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    def __contains__(self, module: str) -> bool:
        return module in self.ranks or module in self.shapes


def read_config(config: Mapping[str, object]) -> SavedLinears:
    """Read the ``quantization_config`` of a compressed model.

    Raises:
        ValueError: If a newer version has written it, weights are quantized, the model has seams
            or sliced hidden states, layers have lost attention heads, experts were narrowed,
            rows of embedding or head are factors, compression has added biases, or it is damaged.
    """
    if weights := _mapping(config, "weights"):
        raise ValueError(
            f"the weights of this model are quantized with {weights.get('quant_method')}, which "
            "this plugin does not read; serve the unquantized model"
        )
    _check_keys(config)
    ranks, shapes = _mapping(config, "ranks"), _mapping(config, "shapes")
    for module, rank in ranks.items():
        if not _is_size(rank, least=0):
            raise ValueError(f"rank of {module} must be an integer of at least 0, got {rank!r}")
    for module, shape in shapes.items():
        if not (isinstance(shape, list | tuple) and [_is_size(n) for n in shape] == [True, True]):
            raise ValueError(f"shape of {module} must be two positive integers, got {shape!r}")
        if module in ranks:
            raise ValueError(f"{module} has both a rank and a shape; expected one of them")
    return SavedLinears(ranks, {module: (shape[0], shape[1]) for module, shape in shapes.items()})


def _check_keys(config: Mapping[str, object]) -> None:
    if _mapping(config, "seams"):
        raise ValueError(
            "this model has seams (linear maps of the hidden states, method.seam=linear), which "
            "vLLM does not compute; serve a model compressed with method.seam=none or replaceme"
        )
    if _mapping(config, "stream"):
        raise ValueError(
            "this model has sliced hidden states (method.name=slicegpt), which vLLM does not "
            "compute; serve a model compressed with another method"
        )
    if _mapping(config, "experts"):
        raise ValueError(
            "this model has narrowed experts, which this plugin does not read; serve it with "
            "transformers, or compress with method.target=plain"
        )
    if config.get("biases"):
        raise ValueError(
            "this model has biases that compression has added (method.name=flap), which this "
            "plugin does not read; serve it with transformers or llama.cpp"
        )
    if rows := _mapping(config, "rows"):
        raise ValueError(
            f"{min(rows)} of this model consists of factors (method.embeddings=factors), which "
            "vLLM does not compute; serve it with transformers, or export it with format=dense"
        )
    if heads := [name for name in _mapping(config, "shapes") if name.endswith(_HEADS)]:
        raise ValueError(
            f"{heads[0]} has lost attention heads, and vLLM needs the same number in all layers; "
            "serve the model with transformers or llama.cpp"
        )
    if unknown := sorted(config.keys() - _KEYS):
        raise ValueError(
            f"quantization_config has unknown keys {unknown}: the model was saved by a newer "
            "version of grasp_lightning, please update grasp-lightning-vllm"
        )


def _mapping(config: Mapping[str, object], key: str) -> dict[str, Any]:  # Any: values of JSON
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} of quantization_config must be a mapping, got {value!r}")  # noqa: TRY004
    return dict(value)


def _is_size(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
