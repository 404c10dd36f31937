"""Rotates the hidden states of a whole model, and keeps the first directions.

Legend: D hidden size, d kept directions; Q_k ``(D, d)`` the orthonormal basis of read k; N outputs
and M inputs of a linear; V rows of an embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView, configs_of
from grasp_lightning.models.linears import DenseModule, as_linear
from grasp_lightning.models.lowrank import NarrowedLinear, dense_shape
from grasp_lightning.models.operations.base import (
    Applier,
    Shapes,
    Site,
    dense_module,
    like,
    register,
)
from grasp_lightning.models.size import LinearShape
from grasp_lightning.models.sliced import (
    ShortcutLinear,
    SlicedNorm,
    give_bias,
    set_shortcut,
    shortcut_name,
    slice_embedding,
)
from grasp_lightning.models.stream import Stream, stream_of
from grasp_lightning.plan import SliceStream, StreamRead

_ROWS = 8192  # of a weight that are computed at once, in float64
# Keys for the dropout between a block and the hidden states, where the shortcuts are added.
_DROPOUT = ("dropout", "resid_pdrop", "hidden_dropout", "residual_dropout", "hidden_dropout_prob")


def basis_key(read: StreamRead) -> str:
    """Return the name of the tensor with the basis of a read."""
    return f"{read.norms[0]}.basis"


class Slice(Applier[SliceStream]):
    """Its tensors: ``<first norm of a read>.basis``, ``(D, d)``, orthonormal, one for each read.

    - Gains, biases and means of norms go into the linears and embeddings around them.
    - Linears that read the hidden states get the weight ``W Q_k``, those that write ``Q_k+1^T W``,
      embeddings ``E Q_0``. Tied embeddings are no longer tied.
    - Residual connections get a shortcut ``Q_k+1^T Q_k``.
    """

    operation = SliceStream
    verb = "slices"
    noun = "basis"

    def check(self, operation: SliceStream, site: Site) -> None:
        """Check that the model has these blocks, all of them unchanged."""
        if site.replaced or len(site.left) < site.view.num_layers:
            raise PlanError("the plan slices the hidden states after another change of the model")
        try:
            stream = stream_of(site.view)
        except ModelError as error:
            raise PlanError(f"the plan slices the hidden states: {error}") from error
        if (operation.embeddings, operation.reads) != (stream.embeddings, stream.reads):
            raise PlanError("the plan slices hidden states that this model does not have")
        size = _size(site.view, operation)
        if not 1 <= operation.width <= size:
            raise PlanError(
                f"the plan keeps {operation.width} directions of the hidden states: it must keep "
                f"from 1 to {size}"
            )

    def new_shapes(self, operation: SliceStream, dense: Shapes) -> dict[str, LinearShape]:
        """Return shapes with fewer columns for readers, and fewer rows for writers.

        The head, which reads the last hidden states, is in no decoder layer and has no entry.
        """
        shapes = {n: shape._replace(is_narrowed=True) for n, shape in dense.items()}
        for read in operation.reads:
            for name in shapes.keys() & read.readers:
                shapes[name] = shapes[name]._replace(columns=operation.width)
            for name in shapes.keys() & read.writers:
                shapes[name] = shapes[name]._replace(rows=operation.width)
        return {name: shapes[name] for name in operation.linears if name in shapes}

    def own_tensors(self, operation: SliceStream, view: DecoderView) -> dict[str, Tensor]:
        """Return empty bases, in float32 or better."""
        dtype = torch.promote_types(view.model.dtype, torch.float32)
        shape = (_size(view, operation), operation.width)
        return {
            basis_key(read): torch.empty(shape, dtype=dtype, device="meta")
            for read in operation.reads
        }

    def num_added(self, operation: SliceStream, view: DecoderView) -> int:
        """Return the size of shortcuts and new biases, less that of norms and removed columns."""
        stream, size = stream_of(view), _size(view, operation)
        rows = sum(len(_embedding(view, name).weight) for name in operation.embeddings)
        norms = sum(p.numel() for name in stream.forms for p in view.module(name).parameters())
        biases = sum(
            dense_shape(dense_module(view, reader))[0]
            for reader, norm in stream.norm_of.items()
            if _bias(view, norm) is not None and dense_module(view, reader).bias is None
        )
        shortcuts = (len(operation.reads) - 1) * operation.width**2
        return shortcuts + biases - norms - rows * (size - operation.width)

    def apply(
        self, view: DecoderView, operation: SliceStream, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace all linears, norms and embeddings on the way, and add the shortcuts."""
        stream = stream_of(view)
        bases = [tensors[basis_key(read)].double() for read in operation.reads]
        for name in operation.embeddings:
            embedding = _embedding(view, name)
            weight = _rows(embedding.weight, bases[0], centers=stream.centers)
            slice_embedding(embedding, like(weight, embedding.weight))
        for name in operation.linears:
            view.set_module(name, _sliced(view, name, operation, stream, bases))
        for number, read in enumerate(operation.reads):
            for name in read.norms:
                norm = SlicedNorm(len(bases[0]), stream.forms[name].eps)
                view.set_module(name, norm.train(view.module(name).training))
            if read.writers:
                _set_shortcut(view, read, bases[number], bases[number + 1])
        _settle_config(view)


def _size(view: DecoderView, operation: SliceStream) -> int:
    return _embedding(view, operation.embeddings[0]).weight.shape[1]


def _embedding(view: DecoderView, name: str) -> nn.Embedding:
    embedding = view.module(name)
    assert isinstance(embedding, nn.Embedding)  # stream_of finds no others
    return embedding


def _bias(view: DecoderView, norm: str) -> Tensor | None:
    bias: Tensor | None = getattr(view.module(norm), "bias", None)
    return None if bias is None else bias.detach().double()


def _sliced(
    view: DecoderView,
    name: str,
    operation: SliceStream,
    stream: Stream,
    bases: Sequence[Tensor],
) -> NarrowedLinear:
    """Return the linear that replaces one which reads or writes the hidden states."""
    module = dense_module(view, name)
    old = as_linear(module)
    weight = old.weight.detach().double()  # (N, M)
    bias = None if old.bias is None else old.bias.detach().double()
    numbers = range(len(bases))
    for number in (n for n in numbers if name in operation.reads[n].readers):
        norm = stream.norm_of[name]
        shift = _bias(view, norm)
        if shift is not None:
            bias = weight @ shift + (0 if bias is None else bias)
        gain = view.module(norm).get_parameter("weight").detach().double()
        weight = _rows(weight * (gain + stream.forms[norm].offset), bases[number])
    for basis in (bases[n + 1] for n in numbers if name in operation.reads[n].writers):
        weight = _rows(weight.mT, basis, centers=stream.centers).mT
        if bias is not None:
            bias = _rows(bias[None], basis, centers=stream.centers)[0]
    return _narrowed(module, weight, bias)


def _narrowed(module: DenseModule, weight: Tensor, bias: Tensor | None) -> NarrowedLinear:
    """Return a linear with these values that is otherwise like another one."""
    old = as_linear(module)
    rows, columns = weight.shape
    new = NarrowedLinear(columns, rows, bias=False, device="meta")
    new.weight = like(weight, old.weight)
    if bias is not None and old.bias is not None:
        new.register_parameter("bias", like(bias, old.bias))
    elif bias is not None:
        give_bias(new, like(bias, old.weight))
    return new.train(module.training)


def _rows(weight: Tensor, basis: Tensor, *, centers: bool = False) -> Tensor:
    """Return rows in a basis, ``(R, D) -> (R, d)``, float64; ``centers`` subtracts their mean."""
    parts = []
    for start in range(0, len(weight), _ROWS):
        wide = weight.detach()[start : start + _ROWS].double()
        wide = wide - wide.mean(dim=-1, keepdim=True) if centers else wide
        parts.append(wide @ basis.to(wide))
    return torch.cat(parts)


def _set_shortcut(view: DecoderView, read: StreamRead, basis: Tensor, following: Tensor) -> None:
    """Add the shortcut from one read to the following one."""
    norm, writer = read.norms[0], read.writers[0]
    size = basis.shape[1]
    weight = following.mT @ basis - torch.eye(size, dtype=basis.dtype, device=basis.device)
    writing = view.module(writer)
    shortcut = ShortcutLinear(size, size, bias=False, device="meta")
    shortcut.weight = like(weight, writing.get_parameter("weight"))
    shortcut.train(writing.training)
    set_shortcut(view.model, shortcut_name(norm, writer), shortcut, norm, writer)


def _settle_config(view: DecoderView) -> None:
    """Make the config say that no weights are tied, and that nothing drops outputs of shortcuts."""
    for config in configs_of(view.model):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False
        for key in _DROPOUT:
            if getattr(config, key, None):
                setattr(config, key, 0.0)
    for index in view.layer_indices:
        layer: Any = view.layer(index)  # Any: attributes of every family
        for key in _DROPOUT:
            if isinstance(getattr(layer, key, None), float):
                setattr(layer, key, 0.0)
    model: Any = view.model  # Any: untyped in transformers
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


register(Slice())
