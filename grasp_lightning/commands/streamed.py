"""What a run with ``model.loading: streamed`` can do; the rest is refused before it starts."""

from grasp_lightning.config import CompressConfig, MethodConfig
from grasp_lightning.data.mixture import SELF
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import METHODS, named_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.streamed_loading import check_streamable
from grasp_lightning.training.hidden_cache import pass_on_hidden_states_only


def check_streamed(config: CompressConfig) -> None:
    """Refuse what needs the whole model on the device; the method of ``config`` is resolved.

    Raises:
        ConfigError: If anything does.
    """
    reason = method_problem(config.method) or _other_problem(config)
    if reason is not None:
        raise ConfigError(f"model.loading is streamed, but {reason}; or set model.loading=whole")
    check_streamable(config.model)


def check_chain(view: DecoderView, method: MethodConfig) -> None:
    """Refuse a model whose decoder layers cannot be run, measured and narrowed one by one.

    Raises:
        ModelError: If they pass on more than hidden states, or if the method would narrow their
            experts.
    """
    check_runs_alone(view)
    experts = [name for index in view.layer_indices for name in experts_in(view, index)]
    if method.mlp == "channels" and experts:
        raise ModelError(
            f"method.mlp channels would narrow the experts of {experts[0]}, which are not "
            "streamed: set method.mlp=factors, which leaves them unchanged, or model.loading=whole"
        )


def check_runs_alone(view: DecoderView) -> None:
    """Refuse a model whose decoder layers cannot be run one by one.

    Raises:
        ModelError: If they pass on more than hidden states, such as keys and values.
    """
    if not pass_on_hidden_states_only(view):
        raise ModelError(
            f"decoder layers of {type(view.model).__name__} pass on more than hidden states, such "
            "as keys and values, so they cannot be streamed: set model.loading=whole"
        )


def method_problem(method: MethodConfig) -> str | None:
    """Return why a method, resolved, needs the whole model; None if it can be streamed."""
    obstacle = named_method(method.name).obstacle
    if obstacle is not None:
        return obstacle(method)
    names = [name for name, registered in METHODS.items() if registered.obstacle is not None]
    return f"method {method.name} needs the whole model; expected one of {', '.join(names)}"


def _other_problem(config: CompressConfig) -> str | None:
    trainer, sources = config.trainer, config.calibration.source
    measures_cuts = config.method.weighting == "kfac" and config.statistics.measured_windows > 0
    problems = {
        "cuts are measured in the whole model: set statistics.measured_windows=0": measures_cuts,
        "no layer is split over processes: set trainer.strategy=auto": (
            trainer.strategy not in ("auto", "ddp")
        ),
        "its processes share temporary files: set trainer.num_nodes=1": trainer.num_nodes > 1,
        "layers compute in their own dtype: set trainer.precision=32-true, and model.dtype": (
            trainer.precision != "32-true"
        ),
        "the whole model would generate text: leave self out of calibration.source": (
            SELF in ((sources,) if isinstance(sources, str) else sources)
        ),
        "rows are removed in the whole model: set method.vocabulary=keep, or trim first": (
            config.method.vocabulary == "corpus"
        ),
        "its measurements are not shared: leave statistics.shared unset": (
            config.statistics.shared is not None
        ),
        "stored scores are cut again in the whole model: leave from_scores unset": (
            config.from_scores is not None
        ),
    }
    return next((reason for reason, applies in problems.items() if applies), None)
