from dataclasses import replace
from pathlib import Path

import pytest

from grasp_lightning.comparison.folder import GridFolder
from grasp_lightning.comparison.grid import Cell, grid_cells, share_of
from grasp_lightning.comparison.paper import paper_columns, read_paper
from grasp_lightning.config import (
    CompareConfig,
    CompensateConfig,
    EvaluationConfig,
    GridRecipe,
    MethodConfig,
    ModelConfig,
    PaperConfig,
)
from grasp_lightning.config.compare import with_variables
from grasp_lightning.errors import ConfigError


def config(**changes: object) -> CompareConfig:
    keys: dict[str, object] = {
        "output_dir": "out",
        "removed_ratios": (0.1, 0.2),
        "seeds": (0, 1),
        "models": {"a": ModelConfig(path="x"), "b": ModelConfig(path="y")},
        "methods": {
            "drop": MethodConfig(name="drop"),
            "eight": MethodConfig(name="drop", num_layers=8),
            "half": MethodConfig(name="low_rank", preset="svd_llm", keep_ratio=0.5),
            "grasp": MethodConfig(name="grasp", keep_ratio=0.1),
        },
        "compensations": {"short": GridRecipe()},
        "texts": {"Python": EvaluationConfig(source="pydoc")},
    }
    return CompareConfig(**{**keys, **changes})  # type: ignore[arg-type]


def test_a_method_with_a_size_of_its_own_has_one_cell_per_seed() -> None:
    cells = grid_cells(config(compensations={}))
    of_a = [cell for cell in cells if cell.model == "a"]
    assert of_a[0] == Cell(model="a")
    found = {(cell.method, cell.removed_ratio, cell.seed) for cell in of_a[1:]}
    sized = {(m, r, s) for m in ("drop", "grasp") for r in (0.1, 0.2) for s in (0, 1)}
    assert found == sized | {(m, None, s) for m in ("eight", "half") for s in (0, 1)}
    assert len(cells) == 2 * (1 + len(found))


def test_a_pattern_of_zeros_is_a_size_of_its_own() -> None:
    methods = {
        "any": MethodConfig(name="wanda"),
        "half": MethodConfig(name="wanda", pattern="2:4"),
    }
    cells = grid_cells(config(methods=methods, compensations={}))
    assert {(c.method, c.removed_ratio) for c in cells if not c.is_dense} == {
        ("any", 0.1),
        ("any", 0.2),
        ("half", None),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_parts_have_every_cell_once_and_a_trained_one_with_its_base(count: int) -> None:
    cells = grid_cells(config())
    parts = [share_of(cells, f"{index}/{count}") for index in range(1, count + 1)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(c.name for c in cells)
    for part in parts:
        assert all(cell.base in part for cell in part)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_a_wrong_part_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match="cells: expected a part such as 3/16"):
        share_of(grid_cells(config()), part)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": {"x": MethodConfig(name="drup")}}, "methods.x.name: expected one of"),
        ({"methods": {"dense": MethodConfig(name="drop")}}, "methods.dense: this name"),
        ({"methods": {"x": MethodConfig(name="grasp")}}, "methods.x.removed_ratio also needs"),
        ({"methods": {"x": MethodConfig(name="drop", refit="none")}}, "methods.x.refit would be"),
        ({"methods": {"x": MethodConfig(vocabulary="corpus")}}, "methods.x.vocabulary is corpus"),
        ({"methods": {}}, "methods is empty"),
        ({"models": {"..": ModelConfig(path="x")}}, "models: expected names that begin with"),
        ({"seeds": (1, 1)}, "seeds contains a value more than once"),
        ({"models": {"a b": ModelConfig(path="x"), "a-b": ModelConfig(path="x")}}, "named a-b"),
    ],
)
def test_what_no_cell_can_use_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grid_cells(config(**changes))


def test_unknown_methods_are_skipped_if_asked() -> None:
    methods = {"x": MethodConfig(name="of_next_year"), "drop": MethodConfig(name="drop")}
    cells = grid_cells(config(methods=methods, skip_unknown=True))
    assert {cell.method for cell in cells} == {"dense", "drop"}


def test_a_distillation_without_a_teacher_learns_from_the_dense_model(tiny_folder: Path) -> None:
    grid = config(
        models={"a": ModelConfig(path=str(tiny_folder))},
        compensations={"teach": GridRecipe(objective="distill")},
    )
    cell = Cell(model="a", method="drop", removed_ratio=0.1, compensation="teach")
    settings = GridFolder(grid).settings(cell)
    assert isinstance(settings, CompensateConfig)
    assert settings.distillation.teacher == str(tiny_folder)
    assert settings.model.path == f"out/cells/{cell.base.name}/model"


def test_the_key_of_a_trained_model_changes_with_its_base(tiny_folder: Path) -> None:
    cell = Cell(model="a", method="x", removed_ratio=0.1, compensation="short")
    models = {"a": ModelConfig(path=str(tiny_folder))}
    first, other = (
        GridFolder(config(models=models, methods={"x": MethodConfig(name="drop", layer_metric=m)}))
        for m in ("similarity", "angular")
    )
    assert first.settings(cell) == other.settings(cell)
    assert first.key(cell) != other.key(cell)


def test_a_training_starts_from_the_model_of_an_earlier_one(tiny_folder: Path) -> None:
    models = {"a": ModelConfig(path=str(tiny_folder))}
    chain = {
        "three": GridRecipe(after="two"),
        "two": GridRecipe(after="one"),
        "one": GridRecipe(),
    }
    grid = config(models=models, compensations=chain)
    cells = grid_cells(grid)
    cell = next(cell for cell in cells if cell.compensation == "three")
    assert cell.after == ("one", "two")
    assert cells.index(cell.start.start) < cells.index(cell.start) < cells.index(cell)
    assert [cell.start.compensation, cell.start.start.compensation] == ["two", "one"]
    assert {cell.start, cell.base} <= set(cells)
    folder = GridFolder(grid)
    assert folder.settings(cell).model.path == f"out/cells/{cell.start.name}/model"
    changed = GridFolder(replace(grid, compensations={**chain, "one": GridRecipe(train="all")}))
    assert changed.key(cell) != folder.key(cell)
    for after in ("two", "three", "none"):
        with pytest.raises(ConfigError, match=r"compensations\.\w+\.after: expected the name of"):
            grid_cells(config(compensations={**chain, "two": GridRecipe(after=after)}))


def test_variables_are_expanded_in_paths_only() -> None:
    texts = {"x": EvaluationConfig(source="file", path="${DATA}/x.txt", field="${DATA}")}
    found = with_variables(config(texts=texts), {"DATA": "/d"})
    assert found.texts["x"].path == "/d/x.txt"
    assert found.texts["x"].field == "${DATA}"
    with pytest.raises(ConfigError, match=r"texts\.x\.path: the environment variable DATA is not"):
        with_variables(config(texts=texts), {})


def test_numbers_of_a_paper_belong_to_their_cells(tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text(
        'table1: {a: {dense: {C4: 7}, grasp: {"0.2": {C4: 9.5}}, grasp+short: {"0.2": {C4: 8}},'
        " eight: {C4: 20}}}"
    )
    numbers = read_paper(PaperConfig(numbers=str(file), table="table1"))
    grasp = Cell(model="a", method="grasp", removed_ratio=0.2)
    assert paper_columns(numbers, Cell(model="a")) == {"C4": 7.0}
    assert paper_columns(numbers, grasp) == {"C4": 9.5}
    trained = Cell(model="a", method="grasp", removed_ratio=0.2, compensation="short")
    assert paper_columns(numbers, trained) == {"C4": 8.0}
    assert paper_columns(numbers, Cell(model="a", method="eight", seed=1)) == {"C4": 20.0}
    assert paper_columns(numbers, Cell(model="b")) == {}
    with pytest.raises(ConfigError, match="has no table table2; it has: table1"):
        read_paper(PaperConfig(numbers=str(file), table="table2"))
