"""Which architecture of llama.cpp computes what a model does, and with which sizes.

llama.cpp reads one width of the MLPs, and one number of heads, for all layers of most
architectures. Two take them per layer:
``deci`` has the graph of Llama, with heads per layer and optional biases; ``openelm`` has that of
Qwen3, without an output matrix of its own. Source: ``src/models`` of llama.cpp, build 11549.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from transformers import PreTrainedModel

from grasp_lightning.models.lowrank import biases_of, is_low_rank
from grasp_lightning.models.seams import computation_refusal
from grasp_lightning.models.units import head_size

MULTIPLE: Final = 32
"""Widths of MLPs are filled up to multiples of it: the number of values in a quantized block."""


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    Attributes:
        name: Value of ``general.architecture``.
        is_per_layer: Whether it reads the widths of MLPs and the numbers of heads per layer.
        pairs_neighbours: Whether its rotary embedding turns neighbouring values, not halves.
        fuses_qkv: Whether q, k and v are one tensor.
        takes_no_heads: Whether a layer can have 0 heads.
    """

    name: str
    is_per_layer: bool = False
    pairs_neighbours: bool = False
    fuses_qkv: bool = False
    takes_no_heads: bool = False


_LLAMA: Final = Architecture("llama", pairs_neighbours=True)
_DECI: Final = Architecture("deci", is_per_layer=True, pairs_neighbours=True, takes_no_heads=True)
_OPENELM: Final = Architecture("openelm", is_per_layer=True, fuses_qkv=True)

FAMILIES: Final = {
    "LlamaForCausalLM": (_LLAMA, _DECI),
    "MistralForCausalLM": (_LLAMA, _DECI),
    "Qwen2ForCausalLM": (Architecture("qwen2"), _DECI),
    "Qwen3ForCausalLM": (Architecture("qwen3"), _OPENELM),
}
"""By class: the family's own architecture, and one that takes a width per layer."""

_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
_ROPE_KEYS: Final = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
}
# llama.cpp has these values, and in these architectures reads no others from a file.
_ROPE_FIXED: Final = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1}


@dataclass(frozen=True)
class Layout:
    """The sizes that llama.cpp reads, one per decoder layer.

    Attributes:
        architecture: The architecture that computes what the model does.
        widths: Channels of each MLP, filled up to a multiple; a removed one has one block of zeros.
        kept: Channels that the model itself has, 0 for a removed MLP.
        heads: Attention heads, 0 where the attention was removed and the architecture allows it.
        key_value_heads: Key and value heads.
    """

    architecture: Architecture
    widths: tuple[int, ...]
    kept: tuple[int, ...]
    heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]

    @property
    def padded(self) -> tuple[int, ...]:
        """Number of zero channels of each MLP."""
        return tuple(width - kept for width, kept in zip(self.widths, self.kept, strict=True))


def layout_of(model: PreTrainedModel) -> Layout:
    """Return the layout of a model that ``layout_refusal`` accepts; the meta device works."""
    layers = layers_of(model)
    kept = tuple(0 if adds_nothing(x.mlp.down_proj) else x.mlp.up_proj.out_features for x in layers)
    widths = tuple(max(-(-width // MULTIPLE), 1) * MULTIPLE for width in kept)
    # llama.cpp takes the size of a head from the first layer, which therefore keeps its heads.
    has_heads = [i == 0 or not adds_nothing(x.self_attn.o_proj) for i, x in enumerate(layers)]
    own, per_layer = FAMILIES[type(model).__name__]
    size = head_size(layers[0].self_attn)
    heads = [x.self_attn.o_proj.in_features // size for x in layers]
    groups = [x.self_attn.k_proj.out_features // size for x in layers]
    varies = len(set(widths)) > 1 or (per_layer.takes_no_heads and not all(has_heads))
    varies = varies or len(set(groups)) > 1 or bool(biases_of(model))
    architecture = per_layer if varies else own
    has_heads = [True] * len(layers) if not architecture.takes_no_heads else has_heads
    return Layout(
        architecture=architecture,
        widths=widths,
        kept=kept,
        heads=tuple(number * has for number, has in zip(heads, has_heads, strict=True)),
        key_value_heads=tuple(number * has for number, has in zip(groups, has_heads, strict=True)),
    )


def layout_refusal(model: PreTrainedModel) -> str | None:
    """Return why llama.cpp cannot compute a model, as the rest of a sentence; None if it can."""
    family, config = type(model).__name__, model.config
    refusal = computation_refusal(model, "llama.cpp")
    if refusal is not None:
        return refusal
    if family not in FAMILIES:
        return (
            f"has class {family}, which format gguf does not support; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if config.hidden_act != "silu":
        return f"has MLPs with {config.hidden_act}, but llama.cpp computes silu in this family"
    if family == "Qwen3ForCausalLM" and config.attention_bias:
        return "has biases in its attention, but llama.cpp reads none in this family"
    if family == "Qwen3ForCausalLM" and biases_of(model):
        return (
            "has biases that compression has added, but llama.cpp reads none in this family; "
            "compress with another method than flap"
        )
    return _rope_refusal(config.rope_parameters) or _openelm_refusal(model)


def _rope_refusal(rope: Mapping[str, object]) -> str | None:
    kind = rope.get("rope_type", "default")
    others = sorted(
        key
        for key, value in rope.items()
        if key not in _ROPE_KEYS and value not in (None, _ROPE_FIXED.get(key))
    )
    if kind in _ROPE_TYPES and not others:
        return None
    what = f"{others[0]} {rope[others[0]]}" if others else f"type {kind}"
    return (
        f"has rotary embeddings with {what}, which format gguf does not write; it knows the types "
        f"{', '.join(_ROPE_TYPES)}"
    )


def _openelm_refusal(model: PreTrainedModel) -> str | None:
    config = model.config
    fits = config.tie_word_embeddings and config.rope_parameters.get("rope_type") != "llama3"
    if fits or layout_of(model).architecture is not _OPENELM:
        return None
    return (
        "has MLPs of different widths, or layers with different numbers of heads: llama.cpp reads "
        "one for all layers of Qwen3, and its architecture openelm, which takes one per layer, has "
        "no output matrix of its own and no rotary embeddings of type llama3; compress with "
        "method.target=plain, which gives all MLPs one width"
    )


def layers_of(model: PreTrainedModel) -> Any:  # noqa: ANN401  modules of four families
    """Return the decoder layers of a model of one of the families."""
    body: Any = model.model  # Any: each family declares a class of its own
    return body.layers


def adds_nothing(linear: Any) -> bool:  # noqa: ANN401  dense, narrowed or low-rank
    """Return whether a linear returns zeros only: it has rank 0 and no bias."""
    return is_low_rank(linear) and bool(linear.rank == 0) and linear.bias is None


def context_length(model: PreTrainedModel) -> int:
    """Return the longest text on which llama.cpp computes what the model does, in tokens.

    In these architectures llama.cpp attends to all earlier tokens, so a sliding window is a limit.
    """
    config: Any = model.config  # Any: each family declares a class of its own
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    limit: int = config.max_position_embeddings
    return min(limit, int(window)) if slides and window is not None else limit
