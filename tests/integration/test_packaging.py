import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "lightning_logs"
)
HEAVY = ("datasets", "deepspeed", "lightning", "lm_eval", "matplotlib", "peft")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def pip(*arguments: str | Path, cwd: Path) -> None:
    done = run(sys.executable, "-m", "pip", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def source_files() -> set[str]:
    """Every file of the package, by its place in the wheel."""
    places = {"callbacks": "grasp_lightning/callbacks", "grasp_lightning": "grasp_lightning"}
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: a build leaves files next to its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "tree", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A user's folder that has a ``callbacks`` package of its own."""
    package = tmp_path / "callbacks"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the callbacks of the user')\n")
    return tmp_path


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_file_of_the_package_and_no_other_name(wheel: Path) -> None:
    held = {name for name in names_in(wheel) if ".dist-info/" not in name}
    assert held == source_files()
    assert {"grasp_lightning/py.typed", "grasp_lightning/callbacks/__init__.py"} <= held


def test_wheel_carries_the_licence(wheel: Path) -> None:
    (licence,) = (name for name in names_in(wheel) if name.endswith("/licenses/LICENSE"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("compress", "--help")], ids=" ".join)
def test_installed_program_ignores_a_callbacks_package_of_the_working_directory(
    arguments: tuple[str, ...], installed: Path, hostile_folder: Path
) -> None:
    program = installed / "bin" / "grasp-lightning"
    done = run(sys.executable, program, *arguments, cwd=hostile_folder, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_installed_library_works_next_to_a_callbacks_package_of_the_user(
    installed: Path, hostile_folder: Path
) -> None:
    # What python -c and notebooks do: the working directory is searched first.
    code = (
        "from grasp_lightning.callbacks import LayerSimilarity; print(LayerSimilarity.__module__)"
    )
    done = run(sys.executable, "-c", code, cwd=hostile_folder, PYTHONPATH=str(installed))
    assert done.stdout.strip() == "grasp_lightning.callbacks.similarity", done.stderr


@pytest.mark.parametrize("module", ["", ".similarity", ".stop_request"])
def test_both_names_of_callbacks_in_a_checkout_are_one_module(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    found = import_module(f"callbacks{module}")
    assert found is import_module(f"grasp_lightning.callbacks{module}")
    assert found.__name__ == f"grasp_lightning.callbacks{module}"


def test_importing_the_library_loads_no_heavy_package() -> None:
    code = f"import sys, grasp_lightning; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
