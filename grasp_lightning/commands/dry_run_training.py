"""``--dry_run`` of a compensation, alone or after a compression."""

from pathlib import Path

from grasp_lightning.commands.compensate import check_cache_folder, protected_folders
from grasp_lightning.commands.compress import resolved
from grasp_lightning.commands.dry_run import (
    check_compression,
    check_held_out,
    check_processes,
    finished_lines,
    folder_lines,
    unchecked_line,
)
from grasp_lightning.commands.teacher import teacher_settings
from grasp_lightning.commands.training_checks import check_training, training_bytes
from grasp_lightning.commands.training_inputs import (
    plan_beside,
    rewritten_by_plan,
    trained_bound,
)
from grasp_lightning.commands.two_stages import check_second_stage, look_up, stages
from grasp_lightning.commands.workflow import output_folder
from grasp_lightning.config import CompensateConfig, CompressConfig
from grasp_lightning.config.compensate_settings import check_settings
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.errors import ModelError
from grasp_lightning.memory.forecast import compensation_plan
from grasp_lightning.memory.model_shape import model_shape
from grasp_lightning.memory.shapes import ModelShape
from grasp_lightning.memory.text import memory_lines
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_meta_model, load_without_weights
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.size import count_parameters
from grasp_lightning.run_folder import RunFolder, check_free_space
from grasp_lightning.run_folder.folder import RunState


def dry_run_two_stages(config: CompressConfig, second: CompensateConfig) -> list[str]:
    """Make the quick checks of ``run_two_stages``, and write nothing.

    As ``dry_run_compress``, for both stages.

    Args:
        config: The compression.
        second: The compensation after it, from ``second_stage``.
    """
    first, second = stages(config, second)
    first, _ = resolved(first)
    compressed, state = look_up(first, second)
    root = Path(str(second.output_dir)).expanduser().resolve()
    if state == "finished":
        return finished_lines(root)
    checked = check_compression(first, second, config.compensate)
    unread, needed = check_second_stage(
        checked.config, second, checked.view, checked.tokenizer, reads_hub=False
    )
    check_free_space(root, needed)
    done = [f"The compression in {first.output_dir} is finished."] * (compressed == "finished")
    begun: RunState = "unfinished" if "unfinished" in (compressed, state) else "new"
    folder = folder_lines(root, begun, needed, overwrite=config.overwrite)
    return [*checked.lines, "", *done, *folder, unchecked_line([*checked.unread, *unread])]


def dry_run_compensate(config: CompensateConfig) -> list[str]:
    """Make the quick checks of ``run_compensate``, and write nothing.

    A wrong configuration, model, corpus or output folder raises the ``GraspError`` of the run. The
    values of the weights, text on the hub, and whatever needs a forward pass are not checked.

    Returns:
        Lines for the user: the memory, the run folder, and what was not checked.
    """
    check_processes(config.trainer)
    output_dir = output_folder(config, "runs/second")
    check_settings(config)
    check_cache_folder(config)
    root, state = RunFolder.look_up(
        output_dir,
        to_dict(config),
        overwrite=config.overwrite,
        protected=protected_folders(config, follows_compression=False),
    )
    if state == "finished":
        return finished_lines(root)
    model, tokenizer = load_without_weights(config.model)
    check_not_quantized(model, ModelError)
    view = DecoderView(model)
    plan = plan_beside(config)
    trained = trained_bound(config, view, rewritten_by_plan(config, view, plan))
    unread = check_training(config, view, tokenizer, reads_hub=False, plan=plan)
    unread += check_held_out(config.evaluation, view, tokenizer)
    needed = training_bytes(config, view, count_parameters(model), trained)
    check_free_space(root, needed)
    shape = model_shape(view)
    forecast = compensation_plan(config, _teacher_shape(config) or shape, shape)
    folder = folder_lines(root, state, needed, overwrite=config.overwrite)
    return [*memory_lines(None, forecast), "", *folder, unchecked_line(unread)]


def _teacher_shape(config: CompensateConfig) -> ModelShape | None:
    if config.distillation.teacher is None:
        return None
    with named_by("distillation.teacher"):
        return model_shape(DecoderView(load_meta_model(teacher_settings(config))))
