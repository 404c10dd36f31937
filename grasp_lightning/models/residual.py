"""Which MLPs add the output of a linear to the hidden states as it is, found on the meta device."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.dropping import RUN_ERRORS
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.rebuilding import rebuilt_empty
from grasp_lightning.models.source import first_line

# What autograd records of operations that leave the values of a tensor.
_SAME_VALUES = ("View", "UnsafeView", "Reshape", "Alias", "Clone", "ToCopy", "Squeeze", "Unsqueeze")

_Args = tuple[object, ...]
_Kwargs = dict[str, object]
_Problems = dict[int, str | None]

_known: WeakKeyDictionary[DecoderView, _Problems] = WeakKeyDictionary()


def fold_problem(view: DecoderView, index: int) -> str | None:
    """Return why no linear map can be folded into the MLP of a decoder layer; None if one can.

    The last linear of the MLP, ``mlps(view, index)[0].reader``, must be added to the hidden states
    as it is: without a norm, a factor or a dropout in between. Autograd says so: between the two,
    it must record nothing but additions. The model that the config builds runs once, on the meta
    device. All layers must still be in the model; its weights may be on the meta device.
    """
    if view not in _known:
        _known[view] = _problems(view)
    return _known[view][index]


def _problems(view: DecoderView) -> _Problems:
    trial = DecoderView(rebuilt_empty(view.model))
    problems: _Problems = dict.fromkeys(
        trial.layer_indices, "it has no MLP whose last linear is known by its shape"
    )
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index in trial.layer_indices:
            layer = trial.layer(index)
            for mlp in mlps(trial, index):
                problems[index] = "the model does not call it"
                add = partial(_start_graph, outputs, index)
                stack.enter_context(trial.module(mlp.reader).register_forward_hook(add))
                check = partial(_check, outputs, problems, index)
                stack.enter_context(layer.register_forward_hook(check))
            # Every layer gets a graph of its own.
            stack.enter_context(layer.register_forward_pre_hook(_detach, with_kwargs=True))
        obstacle = _run(trial)
    if obstacle is not None:
        text = f"this cannot be checked without weights ({obstacle})"
        return {i: text if problem is not None else None for i, problem in problems.items()}
    return problems


def _run(view: DecoderView) -> str | None:
    """Run the model once; return the error if it cannot run on the meta device."""
    tokens = torch.zeros((1, 4), dtype=torch.int64, device="meta")
    # bfloat16 is the only dtype with products of experts on the meta device.
    view.model.config.pad_token_id = None  # with one, some families look for it in the tokens
    run: Any = view.model.to(torch.bfloat16)  # type: ignore[arg-type]  # Any: every family
    try:
        with frozen(view.model), torch.enable_grad():
            run.base_model(input_ids=tokens, use_cache=True)  # without one, masks read values
    except RUN_ERRORS as error:
        return first_line(error)
    return None


def _detach(_: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
    hidden = hidden_input(args, kwargs).detach()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _start_graph(
    outputs: dict[int, Tensor], index: int, _: nn.Module, _args: _Args, output: Tensor
) -> Tensor:
    outputs[index] = output.detach().requires_grad_()
    return outputs[index].clone()  # some families add to it in place


def _check(
    outputs: dict[int, Tensor],
    problems: _Problems,
    index: int,
    _: nn.Module,
    _args: _Args,
    output: object,
) -> None:
    if index in outputs:
        is_added = _is_added(outputs[index], hidden_output(output))
        what = "its MLP output is not added to the hidden states as it is"
        problems[index] = None if is_added else f"{what}: a norm, a factor or more is in between"


def _is_added(leaf: Tensor, total: Tensor) -> bool:
    """Return whether a tensor is another one plus terms that do not depend on that one."""
    node: Any = total.grad_fn  # Any: nodes of autograd have no types
    while node is not None:
        if getattr(node, "variable", None) is leaf:
            return True
        kind = type(node).__name__.removesuffix("0").removesuffix("Backward").removeprefix("_")
        before = list(_inputs(node))
        is_plain = kind in _SAME_VALUES or (kind == "Add" and node._saved_alpha == 1)
        # All that requires a gradient here depends on the leaf.
        if not is_plain or len(before) != 1:
            return False
        (node,) = before
    return False


def _inputs(node: Any) -> Iterator[Any]:  # noqa: ANN401  as above
    return (before for before, _ in node.next_functions if before is not None)
