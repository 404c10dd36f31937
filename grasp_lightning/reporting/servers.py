"""Which programs run a model, and the command for each: a table of the card."""

from dataclasses import dataclass
from typing import NamedTuple, Self

from transformers import PreTrainedModel

from grasp_lightning.models.experts import narrowed_experts
from grasp_lightning.models.factored_rows import factorized_rows
from grasp_lightning.models.formats.gguf.layout import layout_refusal
from grasp_lightning.models.lowrank import (
    LowRankLinear,
    biases_of,
    has_replaced,
    low_rank_linears,
    seams,
)
from grasp_lightning.models.sliced import is_sliced
from grasp_lightning.models.units import has_fewer_heads

_WITH_HEADS = (
    "not possible: this model has different numbers of attention heads in its layers, or added "
    "biases, and vLLM computes neither"
)
_WITH_EXPERTS = (
    "not possible: this model has narrowed experts in a format that vLLM does not read; "
    "`method.target=plain` makes an ordinary folder of most mixtures"
)
_SLICED = "not possible: only its own code computes its sliced hidden states"
_WITH_ROWS = (
    "not possible: only its own code computes the factors of its embedding; an ordinary folder, "
    "which is larger, comes from `export --format dense`"
)
_WITH_SEAMS = "not possible: this model has seams, linear maps that only its own code computes"


class ServerRow(NamedTuple):
    """One program, and how it runs the model or why it cannot, in Markdown."""

    program: str
    how: str


@dataclass(frozen=True, kw_only=True)
class Servers:
    """What decides which programs run a model.

    Attributes:
        special: Linears that its family does not have, ``low-rank``, ``narrowed``, ``seam`` or
            ``sliced``; None if the folder is an ordinary one.
        only_here: Why only transformers runs it, for each other program; None if others do.
        has_heads: Whether compression has removed attention heads or added biases.
        has_experts: Whether compression has narrowed experts.
        num_multiplied: Number of low-rank linears that a GGUF file holds as dense matrices.
        num_restored: Parameters that this adds.
        gguf_refusal: Why llama.cpp cannot run the model, as the rest of a sentence; None if it can.
    """

    special: str | None = None
    only_here: str | None = None
    has_heads: bool = False
    has_experts: bool = False
    num_multiplied: int = 0
    num_restored: int = 0
    gguf_refusal: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return what is known of a model; its weights may be on the meta device."""
        linears = low_rank_linears(model).values()
        # One of rank 0 belongs to a removed block, which is removed in a GGUF file too.
        kept = [linear for linear in linears if linear.rank]
        special = "low-rank" if linears else "seam" if seams(model) else "narrowed"
        only_here = _WITH_SEAMS if seams(model) else None
        if factorized_rows(model):
            special, only_here = "low-rank", only_here or _WITH_ROWS
        if is_sliced(model):
            special, only_here = "sliced", _SLICED
        return cls(
            special=special if has_replaced(model) else None,
            only_here=only_here,
            has_heads=has_fewer_heads(model) or bool(biases_of(model)),
            has_experts=bool(narrowed_experts(model)),
            num_multiplied=len(kept),
            num_restored=sum(map(_saving, kept)),
            gguf_refusal=layout_refusal(model),
        )

    def rows(self, num_removed: int | None = None) -> list[ServerRow]:
        """Return the rows of the table.

        Args:
            num_removed: Number of parameters that compression removed; None if it is not known.
        """
        if self.only_here is not None:
            others = ("vLLM", "llama.cpp, Ollama", "torchao, 8 bits")
            rows = (ServerRow(program, self.only_here) for program in others)
            return [ServerRow("transformers", "as above"), *rows]
        # Not a name to install: the plugin is not on PyPI, where anybody could take it.
        plugin = ", with the plugin of grasp_lightning (`plugins/vllm`)" if self.special else ""
        vllm = _WITH_EXPERTS if self.has_experts else f"`vllm serve .`{plugin}"
        return [
            ServerRow("transformers", "as above"),
            ServerRow("vLLM", _WITH_HEADS if self.has_heads else vllm),
            ServerRow("llama.cpp, Ollama", self._gguf(num_removed)),
            ServerRow("torchao, 8 bits", _export("torchao --type int8")),
        ]

    def _gguf(self, num_removed: int | None) -> str:
        if self.gguf_refusal is not None and self.special is None:
            return (
                f"this model {self.gguf_refusal}; the folder is an ordinary one, so "
                "`convert_hf_to_gguf.py .` of llama.cpp works if llama.cpp has this family"
            )
        if self.gguf_refusal is not None:
            return f"not possible: this model {self.gguf_refusal}"
        if not self.num_multiplied:
            return _export("gguf")
        share = f"{self.num_restored / num_removed:.0%}" if num_removed else "part"
        are = "linear is" if self.num_multiplied == 1 else "linears are"
        note = f"{self.num_multiplied} low-rank {are} multiplied back"
        return f"{_export('gguf')}; {note}, which loses {share} of the saving"


def _saving(linear: LowRankLinear) -> int:
    rows, columns = linear.out_features, linear.in_features
    return rows * columns - linear.rank * (rows + columns)


def _export(form: str) -> str:
    folder = form.partition(" ")[0]
    return f"`grasp-lightning export --model . --format {form} --output_dir ../{folder}`"
