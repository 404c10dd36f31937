"""Slicing of the hidden states: all linears, embeddings and the head become smaller.

Legend: D hidden size, d kept directions.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Final

from grasp_lightning.config import DirectionsOf, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.options import check_share, refuse_ignored
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations.slice import basis_key
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.stream import stream_of
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import OptionValue, Plan, SliceStream
from grasp_lightning.stats.base import Needs, Statistics, Step, StreamBases

SLICE: Final = "slice"
_NAME: Final = "slicegpt"
_ELSE = "use another method"


class SliceGpt(CompressionMethod):
    """Rotate the hidden states so that few directions hold most of them, and remove the others.

    An RMS norm without a gain commutes with rotations. So gains, biases and means of the norms are
    fused into the linears around them. For the states X that enter a block, Q holds the leading
    eigenvectors of ``X^T X``. Each linear that reads them gets the weight ``W Q``, each linear that
    writes them ``Q^T W``, embeddings ``E Q``. Blocks have bases of their own, so the residual
    connection from one to the next is multiplied by ``Q_k^T Q_k+1``. The bases are found block
    after block, on the hidden states of the model that is sliced up to there.

    Source: Ashkboos et al., "SliceGPT", arXiv:2401.15024. Differences from the text (t) and the
    public code (c):

    - The mean is subtracted only where the norms subtract it. (c) also subtracts it from the
      embeddings of models with RMS norms.
    - Norms keep their eps; in (c) it is always 1e-5. They divide by D, as in (c).
    - ``directions_of: input`` takes X before the norm, as (c) does; ``normed`` after it, as (t).
    - (c) adds a damping of 0.01 to ``X^T X`` and rotates the last states at random, which changes
      nothing.
    - The head is sliced too. In (c) the last states and the head keep D directions; for models with
      a large vocabulary this leaves far fewer directions at the same size.
    - The bases are turned inside their subspaces so that each residual connection is as near to the
      identity as it can be. In exact arithmetic this changes nothing.
    - ``removed_ratio`` counts all parameters, also those of the residual connections and of the
      head, which tied models get in addition. In (t) and (c) it is a share of directions.
    - d is not rounded; ``multiple_of=8`` rounds as (c) does.

    Args:
        width: d.
        directions_of: What X is.
        multiple_of: What d is a multiple of.
    """

    name = _NAME
    reference = "https://arxiv.org/abs/2401.15024"
    skips_parts = True

    def __init__(self, width: int, directions_of: DirectionsOf, multiple_of: int) -> None:
        self._width = width
        self._directions_of = directions_of
        self._multiple_of = multiple_of

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        return {
            "directions": self._width,
            "directions_of": self._directions_of,
            "multiple_of": self._multiple_of,
        }

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Request all bases, once."""
        del model
        if plan.operations:
            return None
        bases = StreamBases(width=self._width, directions_of=self._directions_of)
        return Step(name=SLICE, needs=Needs(stream=bases))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Slice the whole model with the bases."""
        del step
        operation = _operation(model, self._width)
        names = {basis_key(read): read.norms[0] for read in operation.reads}
        return Decision(
            operations=(operation,),
            tensors={key: stats.stream[name].basis for key, name in names.items()},
            scores={f"{name}.variances": stats.stream[name].variances for name in names.values()},
        )

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes before and after; the data decides on the bases only."""
        operation = _operation(view, self._width)
        size = parameters_after(view, (operation,))
        hidden = stream_of(view).size
        return Prediction(
            dense=count_parameters(view.model),
            most=size,
            least=size,
            num_layers=view.num_layers,
            ranks={},
            factors=len(operation.reads) * hidden * self._width,
            layers=view.layer_indices,
            operations=(operation,),
            directions=(self._width, hidden),
        )


def _operation(view: DecoderView, width: int) -> SliceStream:
    stream = stream_of(view)
    return SliceStream(width=width, embeddings=stream.embeddings, reads=stream.reads)


def _saved(view: DecoderView, width: int) -> int:
    """Return how many parameters slicing removes; negative if the shortcuts take more."""
    return count_parameters(view.model) - parameters_after(view, (_operation(view, width),))


def _solved_width(config: MethodConfig, view: DecoderView, multiple_of: int) -> int:
    """Return the largest width at which the requested share of all parameters is removed.

    Raises:
        ConfigError: If none is narrow enough, with the feasible range.
    """
    assert config.removed_ratio is not None  # _resolved has checked it
    dense = count_parameters(view.model)
    # Rounded to whole parameters, so that the share reported by a run can be requested again.
    target = round(config.removed_ratio * dense)
    # Sizes grow with the width.
    low, high = 0, (stream_of(view).size - 1) // multiple_of
    while low < high:
        middle = (low + high + 1) // 2
        if _saved(view, middle * multiple_of) >= target:
            low = middle
        else:
            high = middle - 1
    if not low:
        most = max(_saved(view, min(multiple_of, stream_of(view).size)), 0)
        raise ConfigError(
            f"method.removed_ratio {config.removed_ratio} is out of reach: the feasible range is 0 "
            f"to {most / dense:.4f}, the latter with {multiple_of} of {stream_of(view).size} "
            "directions of the hidden states kept"
        )
    return low * multiple_of


def _kept_width(config: MethodConfig, view: DecoderView, multiple_of: int) -> int:
    """Return the width of a share of directions, rounded down.

    Raises:
        ConfigError: If the model would not become smaller, or nothing is kept.
    """
    size = stream_of(view).size
    share = Fraction(str(config.keep_ratio))  # the decimal number, not its neighbor
    width = int(share * size) // multiple_of * multiple_of
    if width < 1:
        raise ConfigError(
            f"method.keep_ratio {config.keep_ratio} keeps none of the {size} directions of the "
            f"hidden states, at method.multiple_of {multiple_of}"
        )
    if _saved(view, width) <= 0:
        raise ConfigError(
            f"method.keep_ratio {config.keep_ratio} keeps {width} of {size} directions of the "
            "hidden states, but with the matrices in the residual connections and a head of its own"
            f" the model would grow by {-_saved(view, width):,} parameters: set a lower one, or "
            "method.removed_ratio"
        )
    return width


def _resolved(config: MethodConfig) -> MethodConfig:
    refuse_ignored(config, ("num_layers",), "the hidden states of all decoder layers are sliced")
    check_share(config.removed_ratio)
    if (config.removed_ratio is None) == (config.keep_ratio is None):
        state = "neither is set" if config.keep_ratio is None else "both are set"
        raise ConfigError(
            f"method {_NAME} takes method.removed_ratio, the share of all parameters to remove, or "
            f"method.keep_ratio, the share of directions to keep ({state})"
        )
    if config.keep_ratio is not None and not 0 < config.keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be above 0 and below 1 for method {_NAME}, got "
            f"{config.keep_ratio}"
        )
    multiple_of = 1 if config.multiple_of is None else config.multiple_of
    if multiple_of < 1:
        raise ConfigError(f"method.multiple_of must be at least 1, got {multiple_of}")
    directions_of = config.directions_of or "input"
    return replace(config, multiple_of=multiple_of, directions_of=directions_of)


def _built(config: MethodConfig, view: DecoderView, track: Track) -> SliceGpt:
    del track
    try:
        stream_of(view)
    except ModelError as error:
        raise ModelError(f"method {_NAME}: {error}; {_ELSE}") from error
    multiple_of = config.multiple_of or 1
    solve = _kept_width if config.removed_ratio is None else _solved_width
    width = solve(config, view, multiple_of)
    return SliceGpt(width, config.directions_of or "input", multiple_of)


SLICEGPT_METHOD: Final = Registered(
    name=_NAME,
    ignores="slices the hidden states, and scores no layers or components",
    resolve=_resolved,
    build=_built,
)
