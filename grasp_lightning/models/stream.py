"""Where a model reads and writes its hidden states, found by running it on the meta device.

Legend: D hidden size.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.dropping import RUN_ERRORS
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import dense_shape, has_replaced
from grasp_lightning.models.rebuilding import rebuilt_empty
from grasp_lightning.models.source import first_line
from grasp_lightning.plan import StreamRead

# Operations of torch that leave the values and features of a tensor, and those that read none.
_SAME_VALUES = {
    *("view", "_unsafe_view", "reshape", "alias", "clone", "detach", "_to_copy", "lift_fresh"),
    *("unsqueeze", "squeeze", "slice", "select", "expand", "contiguous"),
}
_NO_VALUES = {"new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like"}
_SCALES = {"mul", "mul_", "div", "div_"}
_SUMS, _BOTH = {"add", "add_"}, 2  # terms of a sum
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_TOLERANCE = 1e-3  # relative, of a norm that computes in float32


class NormForm(NamedTuple):
    """What a norm computes: ``gain * (x - mean) / sqrt(mean((x - mean)^2) + eps) + bias``.

    Attributes:
        centers: Whether it subtracts the mean (a layer norm), or not (an RMS norm).
        offset: What is added to its weight to give the gain, 0 or 1.
    """

    eps: float
    centers: bool
    offset: float


class Stream(NamedTuple):
    """How the hidden states of a model come about.

    Attributes:
        size: D.
        embeddings: Full names of the embeddings whose sum they start with.
        reads: All blocks in order, and the head.
        forms: What each norm of ``reads`` computes, by full name.
        norm_of: The norm whose output each reader reads.
    """

    size: int
    embeddings: tuple[str, ...]
    reads: tuple[StreamRead, ...]
    forms: Mapping[str, NormForm]
    norm_of: Mapping[str, str]

    @property
    def centers(self) -> bool:
        """Whether the norms subtract the mean."""
        return next(iter(self.forms.values())).centers


_known: WeakKeyDictionary[DecoderView, Stream | str] = WeakKeyDictionary()


def stream_of(view: DecoderView) -> Stream:
    """Return where a dense model reads and writes its hidden states.

    They must be the sum of embeddings and of outputs of linears as they are, and every block must
    read them through one kind of norm, whose output only linears read. The model that the config
    builds runs once on the meta device; the weights of ``view`` do not matter.

    Raises:
        ModelError: If the hidden states cannot be rotated, with the reason in one line.
    """
    if view not in _known:
        try:
            _known[view] = _traced(view)
        except _OddError as error:
            _known[view] = str(error)
    found = _known[view]
    if isinstance(found, str):
        raise ModelError(
            f"the hidden states of {type(view.model).__name__} cannot be rotated: {found}"
        )
    return found


def norm_form(module: nn.Module, size: int) -> NormForm | None:
    """Return what a norm over ``size`` features computes, found by running a copy of it.

    None if it is neither a layer norm nor an RMS norm; its weights may be on the meta device.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    eps = next((e for key in _EPS_NAMES if isinstance(e := getattr(module, key, None), float)), 0.0)
    is_known = "weight" in shapes and shapes.keys() <= {"weight", "bias"}
    if not is_known or eps <= 0 or set(shapes.values()) != {(size,)}:
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").double()
    values = {"weight": torch.linspace(0.5, 2.0, size), "bias": torch.linspace(-1.0, 1.0, size)}
    # Of the size of the root of eps, so that eps shows; the mean is not 0.
    hidden = eps**0.5 * torch.linspace(-1.0, 3.0, size).double()
    with torch.no_grad():
        for name in shapes:
            probe.get_parameter(name).copy_(values[name])
        try:
            found: Tensor = probe(hidden[None, None])[0, 0].double()
        except RUN_ERRORS:
            return None
    bias = values["bias"].double() if "bias" in shapes else 0.0
    for centers, offset in product((False, True), (0.0, 1.0)):
        moved = hidden - hidden.mean() if centers else hidden
        normed = moved * torch.rsqrt(moved.square().mean() + eps)
        expected = normed * (values["weight"].double() + offset) + bias
        if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return NormForm(eps, centers, offset)
    return None


class _OddError(Exception):
    """The structure of the model does not allow a rotation; the text says why."""


@dataclass(eq=False)
class _State:
    """Hidden states: what was added to those of an earlier read, or to nothing.

    Attributes:
        base: Number of that read; None for the sum of embeddings.
        writers: Names of the embeddings or linears.
        read: Number of the read that these states are the input of.
    """

    base: int | None
    writers: tuple[str, ...]
    read: int | None = None


@dataclass(eq=False)
class _Normed:
    """The output of a norm of a read."""

    read: int
    norm: str


@dataclass(eq=False)
class _Output:
    """Outputs of linears, added to each other."""

    writers: tuple[str, ...]


_Tag = _State | _Normed | _Output


@dataclass(eq=False)
class _Read:
    """A read; ``entering`` are the writers of its states."""

    base: int | None
    entering: tuple[str, ...]
    norms: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Follows hidden states through a pass, and refuses what a rotation would change.

    Embeddings, norms and linears are followed as modules, and everything else as operations.
    """

    def __init__(self, size: int, forms: Mapping[str, NormForm]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._size = size
        self._forms = forms
        self._tags: dict[int, tuple[Tensor, _Tag]] = {}  # with the tensor: its id stays its own
        self._inside = 0
        self.called: list[str] = []  # names of linears and norms
        self.reads: list[_Read] = []
        self.norm_of: dict[str, str] = {}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  an operation of torch
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  its result
        del types
        kind = func.overloadpacket.__name__
        given = [] if self._inside else [self._tag(entry) for entry in _tensors((args, kwargs))]
        found = func(*args, **(kwargs or {}))
        if any(given) and isinstance(found, Tensor) and kind not in _NO_VALUES:
            tag = self._after(kind, given, args, found)
            if tag is not None:
                self._tags[id(found)] = (found, tag)
            else:
                self._tags.pop(id(found), None)
        elif any(isinstance(tag, _State | _Normed) for tag in given) and kind not in _NO_VALUES:
            raise _OddError(_misuse(kind))
        return found

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow the modules of a model during a ``with`` block."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    noted: list[bool] = []  # of the running call: whether it is one of ours
                    enter = partial(self._enter, name, noted)
                    stack.enter_context(module.register_forward_pre_hook(enter))
                    leave = partial(self._leave, name, noted)
                    stack.enter_context(module.register_forward_hook(leave))
            with self:
                yield

    def _tag(self, value: object) -> _Tag | None:
        found = self._tags.get(id(value))
        return None if found is None else found[1]

    def _enter(self, name: str, noted: list[bool], module: nn.Module, args: Any) -> None:  # noqa: ANN401  of every module
        tag = self._tag(args[0]) if args else None
        is_ours = not self._inside and (
            isinstance(module, DenseModule | nn.Embedding)
            or (isinstance(tag, _State) and name in self._forms)
        )
        noted.append(is_ours)
        self._inside += is_ours

    def _leave(
        self,
        name: str,
        noted: list[bool],
        module: nn.Module,
        args: Any,  # noqa: ANN401  of every module
        output: Any,  # noqa: ANN401  of every module
    ) -> None:
        if not (noted and noted.pop()):
            return
        self._inside -= 1
        if not isinstance(output, Tensor):  # the call failed
            return
        given = self._tag(args[0]) if args else None
        tag = self._of_module(name, module, given)
        if tag is not None:
            self._tags[id(output)] = (output, tag)

    def _of_module(self, name: str, module: nn.Module, given: _Tag | None) -> _Tag | None:
        if isinstance(module, nn.Embedding):
            return _State(None, (name,)) if module.weight.shape[1] == self._size else None
        if name in self.called:
            raise _OddError(f"{name} is called more than once")
        self.called.append(name)
        if isinstance(given, _State) and not isinstance(module, DenseModule):
            return _Normed(self._read(name, given), name)
        if isinstance(given, _State):
            raise _OddError(f"{name} reads them without a norm")
        assert isinstance(module, DenseModule)  # _enter lets nothing else through
        if isinstance(given, _Normed):
            self.reads[given.read].readers.append(name)
            self.norm_of[name] = given.norm
        return _Output((name,)) if dense_shape(module)[0] == self._size else None

    def _read(self, name: str, state: _State) -> int:
        if state.read is None:
            state.read = len(self.reads)
            self.reads.append(_Read(state.base, state.writers))
        self.reads[state.read].norms.append(name)
        return state.read

    def _after(
        self, kind: str, given: Sequence[_Tag | None], args: tuple[Any, ...], found: Tensor
    ) -> _Tag | None:
        """Return the tag of the result of an operation on tensors with tags."""
        tags = [tag for tag in given if tag is not None]
        keeps = found.ndim > 0 and found.shape[-1] == self._size
        if len(tags) == 1 and kind in _SAME_VALUES and keeps:
            return tags[0]
        if kind in _SUMS and len(given) == _BOTH and keeps:
            return self._sum(given)
        if all(isinstance(tag, _Output) for tag in tags):
            return None  # read as anything else
        is_start = isinstance(tags[0], _State) and tags[0].base is None and tags[0].read is None
        if kind in _SCALES and len(tags) == 1 and is_start and _is_number(args[1]):
            return tags[0]
        raise _OddError(_misuse(kind))

    def _sum(self, given: Sequence[_Tag | None]) -> _Tag | None:
        states = [tag for tag in given if isinstance(tag, _State)]
        outputs = [tag for tag in given if isinstance(tag, _Output)]
        if len(outputs) == _BOTH:
            return _Output(outputs[0].writers + outputs[1].writers)
        if len(states) == _BOTH and all(s.base is None and s.read is None for s in states):
            return _State(None, states[0].writers + states[1].writers)
        if len(states) == 1 and len(outputs) == 1:
            state, writers = states[0], outputs[0].writers
            if state.read is None:
                return _State(state.base, state.writers + writers)
            return _State(state.read, writers)
        if not states and not any(isinstance(tag, _Normed) for tag in given):
            return None
        raise _OddError(
            "something else than embeddings and outputs of linears is added to them, such as a "
            "normed or scaled output"
        )


def _misuse(kind: str) -> str:
    return (
        f"something else than norms and linears reads them, such as experts (operation "
        f"{kind.strip('_')})"
    )


def _tensors(value: object) -> Iterator[object]:
    """Yield the tensors and numbers in nested arguments; in a sum these are its two terms."""
    if isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, Tensor | int | float) and not isinstance(value, bool):
        yield value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _traced(view: DecoderView) -> Stream:
    if has_replaced(view.model) or len(view.layer_indices) < view.num_layers:
        raise _OddError("it is compressed already; use the original model")
    if any(key == "state_size" or key.startswith("mamba_") for key in vars(_text(view))):
        raise _OddError("its kernels for GPUs may read weights of linears without calling them")
    trial = DecoderView(rebuilt_empty(view.model))
    size: int = _text(trial).hidden_size
    named = [*trial.model.named_modules()]
    forms = {name: form for name, module in named if (form := norm_form(module, size))}
    tracer = _Tracer(size, forms)
    tokens = torch.zeros((1, 4), dtype=torch.int64, device="meta")
    trial.model.config.pad_token_id = None  # with one, some families look for it in the tokens
    # bfloat16 is the only dtype with products of experts on the meta device.
    run: Any = trial.model.to(torch.bfloat16)  # type: ignore[arg-type]  # Any: every family
    try:
        with frozen(trial.model), torch.no_grad(), tracer.watching(trial.model):
            run(input_ids=tokens, use_cache=True)  # without a cache, masks read values
    except RUN_ERRORS as error:
        raise _OddError(f"this cannot be checked without weights ({first_line(error)})") from error
    order = [*(name for name, _ in named if name not in tracer.called), *tracer.called]
    for read in tracer.reads:  # sums may name them in another order
        read.entering = tuple(sorted(read.entering, key=order.index))
    return _checked(trial, tracer, forms)


def _checked(view: DecoderView, tracer: _Tracer, forms: Mapping[str, NormForm]) -> Stream:
    """Return what was traced, if it is one chain from the embeddings to the head."""
    reads = tracer.reads
    head = next((n for n, m in view.model.named_modules() if m is _head(view)), None)
    if not reads or reads[-1].readers != [head]:
        raise _OddError("the head does not read them through a norm of its own")
    for number, read in enumerate(reads):
        if read.base != (number - 1 if number else None):
            raise _OddError("a block does not add its output to the hidden states that it reads")
    used = {name: forms[name] for read in reads for name in read.norms}
    if len({form.centers for form in used.values()}) > 1:
        raise _OddError("some norms subtract the mean and others do not")
    found = tuple(
        StreamRead(tuple(read.norms), tuple(read.readers), after.entering if after else ())
        for read, after in zip(reads, [*reads[1:], None], strict=True)
    )
    for block in found[:-1]:
        layers = {view.layer_of(name) for names in block for name in names}
        if len(layers) != 1 or None in layers:
            raise _OddError(f"{block.norms[0]} and what follows it are not in one decoder layer")
    first = [view.layer_of(block.norms[0]) for block in found]
    if list(dict.fromkeys(first)) != [*view.layer_indices, None]:
        raise _OddError("some decoder layers do not read them")
    return Stream(_text(view).hidden_size, reads[0].entering, found, used, tracer.norm_of)


def _text(view: DecoderView) -> PreTrainedConfig:
    config: PreTrainedConfig = view.model.config.get_text_config()
    return config


def _head(view: DecoderView) -> nn.Module | None:
    head: Callable[[], nn.Module | None] = view.model.get_output_embeddings
    return head()
