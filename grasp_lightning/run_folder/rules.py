"""The rules by which a run starts in a folder, resumes there, or is refused."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder import names
from grasp_lightning.run_folder.files import in_the_way, is_partial
from grasp_lightning.run_folder.lock import LOCK_NAME
from grasp_lightning.run_folder.manifest import Manifest

RunState = Literal["new", "unfinished", "finished"]

_ADVICE = "use another output_dir or --overwrite"
# Keys that only say where a run is written, or from where it may read what it would measure.
_NOT_COMPARED = {"output_dir", "overwrite", "dry_run", "push_to_hub", "statistics.shared"}
# Commands themselves compare what depends on the number of processes.
_NOT_COMPARED |= {"trainer.devices", "trainer.num_nodes", "trainer.strategy"}
# Keys that earlier versions did not have: unset, they count as absent.
_COMPARED_IF_SET = {"calibration.weights", "calibration.rows", "evaluation.rows", "method.fisher"}
_COMPARED_IF_SET |= {"compensate", "method.grouping"}


def classify(
    root: Path,
    config: Mapping[str, Any],  # Any: resolved configuration
    overwrite: bool,
) -> tuple[Manifest | None, RunState]:
    """Return what an output folder contains, which may be absent, without writing anything.

    Args:
        overwrite: Start again, whatever the configuration and state of the earlier run.

    Returns:
        The earlier run's manifest, or None, and the state. New with a manifest means that its files
        must be deleted.

    Raises:
        OutputError: If the folder has foreign files, or a run with a different configuration.
    """
    manifest = Manifest.read(root) if root.is_dir() else None
    if manifest is None:
        _refuse_foreign_folder(root, overwrite)
    if manifest is None or overwrite or not manifest.counts(root):
        _refuse_foreign_entries(root, manifest)
        return manifest, "new"
    if manifest.config_hash != config_hash(config):
        raise OutputError(
            f"{root} contains a run ({manifest.state}) with a different configuration: "
            f"{changed_key(config, root)}; {_ADVICE}"
        )
    if manifest.state == "finished":
        return manifest, "finished"
    for name in sorted(manifest.listed):
        refuse_foreign(root, manifest, name)
    return manifest, "unfinished"


def is_begun_by(
    job: str,
    output_dir: str | Path,
    config: Mapping[str, Any],  # Any: resolved configuration
) -> bool:
    """Return whether a folder holds a run of this configuration that the batch job has begun."""
    root = Path(output_dir).expanduser()
    manifest = Manifest.read(root) if job and root.is_dir() else None
    if manifest is None or not manifest.counts(root):
        return False
    return (manifest.job, manifest.config_hash) == (job, config_hash(config))


def _refuse_foreign_folder(root: Path, overwrite: bool) -> None:
    if overwrite or not root.is_dir():
        return
    with os.scandir(root) as entries:
        foreign = sorted(
            entry.name
            for entry in entries
            if not (entry.name == LOCK_NAME or is_partial(entry) or _is_first_stage(entry))
        )
    if foreign:
        raise OutputError(
            f"{root} is not empty and contains no run of this program (it has {foreign[0]}); "
            f"{_ADVICE}"
        )


def _is_first_stage(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is the compression whose model is to be trained in the folder."""
    is_named = entry.name == names.COMPRESSED and entry.is_dir(follow_symlinks=False)
    return is_named and Manifest.read(Path(entry.path)) is not None


def _refuse_foreign_entries(root: Path, manifest: Manifest | None) -> None:
    """Refuse a folder with foreign entries under names that a run may write."""
    found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    live = manifest.live if manifest is not None else set()
    for name in filter(names.is_reserved, found):
        # Foreign files in checkpoints are kept next to those of a run.
        as_whole = name in (names.MODEL, names.LOGS) and name not in live
        refuse_foreign(root, manifest, name, as_whole=as_whole)


def refuse_foreign(
    root: Path, manifest: Manifest | None, name: str, *, as_whole: bool = False
) -> None:
    """Refuse to write over something that no run wrote.

    Args:
        manifest: What the run wrote.
        name: Relative path that is going to be written.
        as_whole: Whether it is a folder that is going to be replaced with all its content.

    Raises:
        OutputError: If it exists and the manifest does not list it, or if it or a folder above it
            is a link, which runs never write.
    """
    path = root / name
    known = manifest.listed if manifest is not None else set()
    levels = [path, *path.parents][: len(PurePosixPath(name).parts)]
    foreign = [level for level in levels if level.is_symlink()]
    if path.exists() and name not in known:
        foreign.append(path)
    if as_whole and not foreign:
        foreign = [
            file
            for file in path.rglob("*")
            if file.is_symlink()
            or not (file.is_dir() or file.relative_to(root).as_posix() in known)
        ]
    if foreign:
        raise OutputError(in_the_way(foreign[0]))


def config_hash(config: Mapping[str, Any]) -> str:  # Any: resolved configuration
    """Return the sha256 of a configuration without the keys that say where a run is written."""
    text = json.dumps(dict(_leaves(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_key(config: Mapping[str, Any], root: Path) -> str:  # Any: resolved configuration
    """Return the first key that differs from the config.yaml in a run folder, with both values."""
    file = root / names.CONFIG
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, Mapping):
        return f"{file} is missing or damaged"
    here, there = dict(_leaves(config)), dict(_leaves(stored))
    for key in sorted(here.keys() | there.keys()):
        if (mine := _shown(here, key)) != (theirs := _shown(there, key)):
            return f"{key} is {mine} here and {theirs} in {file}"
    return f"{file} was changed after the run"


def _shown(leaves: Mapping[str, object], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "not set"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted keys and values; 1.0 equals 1, and a tuple equals a list."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in _NOT_COMPARED or (value is None and name in _COMPARED_IF_SET):
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, _plain(value)


def _plain(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
