"""The Python interface: the commands of the program as functions.

Heavy packages are imported when a function needs them, so importing ``grasp_lightning`` is quick.
"""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grasp_lightning.errors import ConfigError, Interrupted, OutputError

# These loggers announce devices and tips in every pass.
_ANNOUNCING = tuple(f"lightning.{part}.utilities.rank_zero" for part in ("pytorch", "fabric"))


@dataclass(frozen=True)
class Run:
    """A finished run of ``compress`` or ``compensate``; its folder holds all results.

    Attributes:
        folder: The run folder.
        device: Device of ``model``: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoint to load ``model``.
    """

    folder: Path
    _: KW_ONLY
    device: str = "auto"
    trust_remote_code: bool = False

    @property
    def model_folder(self) -> Path:
        """Folder of the saved model, for ``from_pretrained``."""
        return self.folder / "model"

    @property
    def report(self) -> Path:
        """Path of the report, an HTML page in one file."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> Mapping[str, Any]:  # Any: values of JSON
        """Content of metrics.json: parameters, perplexity, times, and later evaluations."""
        from grasp_lightning.reading.text import read_json  # noqa: PLC0415

        file = self.folder / "metrics.json"
        content: Mapping[str, Any] = read_json(file, OutputError)
        return content

    @property
    def model(self) -> Any:  # noqa: ANN401  a PreTrainedModel, which takes seconds to import
        """The saved model in eval mode; loaded on first use, then cached."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401  a PreTrainedTokenizerBase, as above
        """The saved tokenizer, loaded with the model."""
        return self._loaded.tokenizer

    @cached_property
    def _loaded(self) -> Any:  # noqa: ANN401  a LoadedModel, as above
        from grasp_lightning.config import ModelConfig  # noqa: PLC0415
        from grasp_lightning.models.loading import load_model  # noqa: PLC0415

        return load_model(
            ModelConfig(
                path=str(self.model_folder),
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        )


def compress(
    model: object = None,
    *,
    tokenizer: object = None,
    output_dir: str | Path | None = None,
    compensate: str | Path | Mapping[str, Any] | None = None,  # Any: as keys are
    **keys: Any,  # noqa: ANN401  checked when they are parsed
) -> Run:
    """Compress a model like the command ``compress``, and return the finished run.

    Every key of the configuration is a keyword; a section is a mapping. Keys of the section
    ``method`` can also be given directly. A name for a whole section sets its ``path``, ``name`` or
    ``source``::

        run = compress("smollm2", removed_ratio=0.2, output_dir="runs/x")
        run = compress(
            "smollm2",
            method="grasp",
            num_layers=8,
            calibration={"source": "pydoc", "num_samples": 16},
            evaluation="pydoc",
            output_dir="runs/y",
        )

    If the run is finished already, the same call only reads it; an interrupted run is resumed. To
    use several processes, start the script with torchrun or srun, and set ``trainer={"devices":
    ...}``.

    A wrong key, model, text or folder raises a ``GraspError`` with the line that the program would
    print, and a new run leaves nothing behind. Ctrl-C and SIGTERM first save the work so far, then
    raise ``KeyboardInterrupt`` or ``Interrupted``.

    Args:
        model: Folder, hub name, .gguf file or ``smollm2``; the section ``model`` as a mapping; or a
            ``PreTrainedModel``. The given object does not change: a copy on the same device is
            compressed. Its content identifies it instead of a path. With ``from_scores``, None is
            the model of that run.
        tokenizer: The tokenizer of a ``PreTrainedModel``.
        output_dir: Run folder to write.
        compensate: Training that follows in the same folder: the YAML file of a ``compensate``, or
            its keywords as a mapping. The run is then that of the trained model, and
            ``load(run.folder / "compressed")`` is the compression.
        **keys: Keys of the configuration; ``grasp-lightning compress --help`` lists them.

    Raises:
        ConfigError: If a tokenizer is given without a ``PreTrainedModel``.
    """
    from grasp_lightning.config import CompressConfig  # noqa: PLC0415
    from grasp_lightning.config.keywords import parse_keywords  # noqa: PLC0415
    from grasp_lightning.config.parsing import to_dict  # noqa: PLC0415

    given = None
    if not _is_named(model):
        from grasp_lightning.models.in_memory import ModelInMemory  # noqa: PLC0415

        given = ModelInMemory.checked(model, tokenizer)
        model = to_dict(given.settings)
    elif tokenizer is not None:
        raise ConfigError("compress: tokenizer has no effect with a path or name; leave it out")
    is_file = isinstance(compensate, str | Path)
    keys |= _set(model=model, output_dir=output_dir, compensate=compensate if is_file else None)
    config = parse_keywords(CompressConfig, keys, "compress")
    second = _second_stage(config, compensate, can_teach=given is None)
    with _among_processes(config.model.device):
        if second is None:
            from grasp_lightning.commands.compress import run_compress  # noqa: PLC0415

            return _run(run_compress(config, given).folder, config.model)
        from grasp_lightning.commands.two_stages import run_two_stages  # noqa: PLC0415

        return _run(run_two_stages(config, second, given).folder, config.model)


def _second_stage(config: Any, compensate: object, *, can_teach: bool) -> Any:  # noqa: ANN401  types of other modules
    """Return the configuration of the training that follows a compression, if any."""
    from grasp_lightning.config.second_stage import (  # noqa: PLC0415
        second_stage,
        second_stage_of_keywords,
    )

    if isinstance(compensate, Mapping):
        return second_stage_of_keywords(config, compensate, can_teach=can_teach)
    if compensate is not None and not isinstance(compensate, str | Path):
        raise ConfigError(
            "compress: compensate: expected a YAML file or the keywords of compensate, got "
            f"{type(compensate).__name__}"
        )
    return second_stage(config, can_teach=can_teach)


def compensate(
    model: object = None,
    *,
    output_dir: str | Path | None = None,
    **keys: Any,  # noqa: ANN401  checked when they are parsed
) -> Run:
    """Train a compressed model briefly like the command ``compensate``, and return the run.

    Keywords, errors and interruptions work as in ``compress``::

        trained = compensate(run, objective="text", text="pydoc", output_dir="runs/x-text")

    Args:
        model: A ``Run``; a folder, hub name or .gguf file; or the section ``model`` as a mapping.
            The model of a run is read from its folder and does not change.
        output_dir: Run folder to write.
        **keys: Keys of the configuration; ``grasp-lightning compensate --help`` lists them.
    """
    from grasp_lightning.config import CompensateConfig  # noqa: PLC0415
    from grasp_lightning.config.keywords import parse_keywords  # noqa: PLC0415

    _require_named(model, "compensate")
    keys |= _set(model=model, output_dir=output_dir)
    config = parse_keywords(CompensateConfig, keys, "compensate")
    from grasp_lightning.commands.compensate import run_compensate  # noqa: PLC0415

    with _among_processes(config.model.device):
        folder = run_compensate(config).folder
    return _run(folder, config.model)


def evaluate(
    *models: "str | Path | Run",
    corpora: str | Path | Sequence[str | Path] = (),
    tasks: str | Sequence[str] = (),
    output: str | Path | None = None,
    **keys: Any,  # noqa: ANN401  checked when they are parsed
) -> list[dict[str, Any]]:  # Any: values of JSON
    """Measure models side by side like the command ``evaluate``.

    Results are in the order of the models and have the keys of an ``output`` file::

        dense, small = evaluate("smollm2", run, corpora="pydoc")
        print(dense["corpora"]["pydoc"]["perplexity"], small["cost"]["parameters"])

    Results for the model of a run are also added to its ``metrics`` and report.

    Args:
        *models: Runs, folders, hub names, .gguf files or ``smollm2``.
        corpora: Texts for perplexity: wikitext2, ptb, c4, pydoc, or files.
        tasks: Names of lm-eval tasks; needs the extra ``eval``.
        output: JSON file for the results; results that it already has are not measured again.
        **keys: Keys of the configuration; ``grasp-lightning evaluate --help`` lists them.

    Returns:
        For each model: its ``cost``, its ``corpora`` by name, and its ``tasks`` by name.

    Raises:
        ConfigError: If no model is given, or not as a positional argument.
    """
    from grasp_lightning.config import EvaluateConfig  # noqa: PLC0415
    from grasp_lightning.config.keywords import parse_keywords  # noqa: PLC0415

    if not models or "model" in keys:
        raise ConfigError("evaluate: give models as positional arguments: evaluate('smollm2', run)")
    for model in models:
        _require_named(model, "evaluate")
    keys |= {"model": [_plain(model) for model in models], "tasks": tasks}
    keys |= {"corpora": [corpora] if isinstance(corpora, Path) else corpora, **_set(output=output)}
    config = parse_keywords(EvaluateConfig, keys, "evaluate")
    from grasp_lightning.commands.evaluate import run_evaluate  # noqa: PLC0415

    return [evaluation.to_dict() for evaluation in run_evaluate(config).evaluations]


def trim_vocabulary(
    model: object,
    *,
    corpora: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    **keys: Any,  # noqa: ANN401  checked when they are parsed
) -> dict[str, Any]:  # Any: values of JSON
    """Remove tokens that some texts never use, like the command ``trim``.

    The trimmed model, an ordinary folder, is ``model`` in ``output_dir``::

        facts = trim_vocabulary("smollm2", corpora="wikitext2,c4", output_dir="runs/trimmed")
        print(facts["tokens"], facts["parameters"])

    Args:
        model: A run, folder, hub name, .gguf file or ``smollm2``, or the section ``model`` as a
            mapping.
        corpora: Texts whose tokens stay: wikitext2, ptb, c4, pydoc, or files.
        output_dir: Run folder to write.
        **keys: Keys of the configuration; ``grasp-lightning trim --help`` lists them.

    Returns:
        The content of trim.json: what was removed, and tokens per byte before and after.
    """
    from grasp_lightning.config import TrimConfig  # noqa: PLC0415
    from grasp_lightning.config.keywords import parse_keywords  # noqa: PLC0415
    from grasp_lightning.reading.typed import to_plain  # noqa: PLC0415

    _require_named(model, "trim_vocabulary")
    keys |= _set(model=model, output_dir=output_dir)
    keys["corpora"] = [corpora] if isinstance(corpora, Path) else corpora
    config = parse_keywords(TrimConfig, keys, "trim_vocabulary")
    from grasp_lightning.commands.trim import run_trim  # noqa: PLC0415

    facts: dict[str, Any] = to_plain(run_trim(config).facts)  # Any: values of JSON
    return facts


def load(folder: str | Path, *, device: str = "auto", trust_remote_code: bool = False) -> Run:
    """Return the finished run of ``compress`` or ``compensate`` in a folder.

    Args:
        folder: The run folder, such as ``runs/x``.
        device: Device for the model: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        OutputError: If the folder holds no such run, or an unfinished one.
    """
    from grasp_lightning.reading.text import user_path  # noqa: PLC0415
    from grasp_lightning.run_folder.manifest import Manifest  # noqa: PLC0415

    root = user_path(str(folder), "load", OutputError)
    if not root.is_dir():
        raise OutputError(f"load: no such folder: {folder}")
    manifest = Manifest.read(root)
    if manifest is not None and manifest.state != "finished":
        raise OutputError(f"load: the run in {folder} is not finished; run it again to resume it")
    if manifest is None or "metrics.json" not in manifest.files:
        raise OutputError(
            f"load: {folder} contains no run of compress or compensate; expected its output_dir"
        )
    return Run(root, device=device, trust_remote_code=trust_remote_code)


def quantize(model: object, kind: str = "int8") -> None:
    """Quantize the weights of the linears of a loaded model in place.

    These are the dense and narrowed linears of its decoder layers, and both factors of low-rank
    ones; the model may be compressed or not. Embeddings and the language-model head stay as they
    are. ``model.save_pretrained`` then writes a folder that ``from_pretrained`` opens::

        run = load("runs/x")
        quantize(run.model, "int8")
        run.model.save_pretrained("runs/x-int8")

    Args:
        model: A ``PreTrainedModel`` with floating-point weights, on the device where it will run.
        kind: int8 or int4 (torchao), or nf4 (bitsandbytes); needs the extra ``quantize``.

    Raises:
        ConfigError: If the model is no ``PreTrainedModel``, or there is no such kind.
    """
    from transformers import PreTrainedModel  # noqa: PLC0415

    from grasp_lightning.models.quantization import KINDS, quantize_model  # noqa: PLC0415

    if not isinstance(model, PreTrainedModel):
        hint = "; give its model: quantize(run.model)" if isinstance(model, Run) else ""
        raise ConfigError(
            f"quantize: model: expected a model of transformers, got {type(model).__name__}{hint}"
        )
    if kind not in KINDS:
        raise ConfigError(f"quantize: kind: expected {', '.join(KINDS)}, got {kind!r}")
    quantize_model(model, kind)


def _is_named(model: object) -> bool:
    return model is None or isinstance(model, str | Path | Mapping | Run)


def _require_named(model: object, call: str) -> None:
    if not _is_named(model):
        raise ConfigError(
            f"{call}: model: expected a run, a path or a name, got {type(model).__name__}"
        )


def _set(**values: object) -> dict[str, Any]:  # Any: as keys are
    """Return the values that are set; a run becomes the folder of its model."""
    return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: object) -> object:
    value = value.model_folder if isinstance(value, Run) else value
    return str(value) if isinstance(value, Path) else value


def _run(folder: Path, model: Any) -> Run:  # noqa: ANN401  a ModelConfig, of another module
    return Run(folder.expanduser(), device=model.device, trust_remote_code=model.trust_remote_code)


@contextmanager
def _among_processes(device: str) -> Iterator[None]:
    """Run a block in all processes of the script, without announcements of Lightning.

    Raises:
        Interrupted: After another signal.
        KeyboardInterrupt: After Ctrl-C.
    """
    from grasp_lightning.launch import among_started  # noqa: PLC0415

    levels = {logger: logger.level for logger in map(logging.getLogger, _ANNOUNCING)}
    try:
        for logger in levels:
            logger.setLevel(logging.WARNING)
        with among_started(device):
            yield
    except Interrupted as stop:
        if stop.signal_number != signal.SIGINT:
            raise
        then = "it resumes from what was saved" if stop.has_saved else "nothing was saved"
        raise KeyboardInterrupt(f"call it again with the same arguments: {then}") from stop
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
