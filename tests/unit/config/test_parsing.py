import re
import shlex
from pathlib import Path

import pytest
import yaml

from grasp_lightning.commands.training_inputs import check_steps
from grasp_lightning.config import (
    CompareConfig,
    CompensateConfig,
    CompressConfig,
    EvaluateConfig,
    MethodConfig,
    ModelConfig,
    PlanConfig,
    TrainerConfig,
)
from grasp_lightning.config.compensate_settings import check_settings, uses_instructions
from grasp_lightning.config.parsing import parse, to_dict, with_run_config
from grasp_lightning.config.second_stage import second_stage
from grasp_lightning.errors import ConfigError

CONFIGS_FOLDER = Path(__file__).parents[3] / "configs"
CONFIGS = sorted(CONFIGS_FOLDER.rglob("*.yaml"))
CONFIGS = [file for file in CONFIGS if file.name != "paper_numbers.yaml"]  # numbers, no keys


def parsed(*argv: str) -> CompressConfig:
    return parse(CompressConfig, "cli.py compress", argv)


def write(path: Path, text: str) -> str:
    file = path / "run.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_parses(file: Path) -> None:
    if file.parent.name == "evaluate":
        argv = [f"--config={file}", "--model=a"]
        assert parse(EvaluateConfig, "cli.py evaluate", argv).tasks
    elif file.parent.name == "compare":
        compared = parse(CompareConfig, "cli.py compare", [f"--config={file}"])
        assert compared.methods
    elif file.parent.name == "compensate":
        config = parse(CompensateConfig, "cli.py compensate", [f"--config={file}"])
        assert config.output_dir
        # Checked as the second stage of a compression, whose model teaches if the file names none.
        second = second_stage(
            CompressConfig(
                model=ModelConfig(path="dense"),
                trainer=TrainerConfig(devices=config.trainer.devices),
                compensate=str(file),
                output_dir="runs/x",
            )
        )
        assert second is not None
        assert second_stage(PlanConfig(model=ModelConfig(path="dense"), compensate=str(file)))
        if config.objective == "distill":
            assert second.distillation.teacher == (config.distillation.teacher or "dense")
    else:
        assert parsed(f"--config={file}").output_dir


@pytest.mark.parametrize(
    "file", [f for f in CONFIGS if f.parent.name == "compensate"], ids=lambda file: file.name
)
def test_trainings_in_the_comments_of_a_config_can_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS_FOLDER.parent)
    lines = file.read_text().splitlines()
    comments = "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    commands = re.findall(r"python cli\.py compensate (.*)", comments.replace("\\\n", ""))
    assert commands
    for command in commands:
        config = parse(CompensateConfig, "cli.py compensate", shlex.split(command))
        check_settings(config)
        samples = config.data.num_train if uses_instructions(config) else config.text.num_samples
        steps = -(-(samples or 50_000) // config.training.batch_size) * config.training.epochs
        check_steps(config, min(steps, config.training.max_steps or steps))


@pytest.mark.parametrize(
    "argv",
    [
        ["--model=a,b"],
        ["--model", "a,b"],
        ["--model=a", "--limit=3", "--model", "b"],
        ["--model=[a, b]"],
        ["--model=['a','b']"],
    ],
)
def test_names_are_listed_with_commas_or_by_repeating_the_flag(argv: list[str]) -> None:
    assert parse(EvaluateConfig, "cli.py evaluate", argv).model == ("a", "b")


def test_a_flag_replaces_the_names_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, "model: [a]\ntasks: [piqa, mathqa]\n")
    config = parse(EvaluateConfig, "cli.py evaluate", [f"--config={file}", "--tasks=gsm8k"])
    assert (config.model, config.tasks) == (("a",), ("gsm8k",))


def test_a_name_where_a_list_belongs_is_explained(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\n")
    with pytest.raises(ConfigError, match="model: expected a list of names, got 'a'"):
        parse(EvaluateConfig, "cli.py evaluate", [f"--config={file}"])


def test_flags_override_files(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {path: a}\nmethod: {num_layers: 3, keep_ratio: 0.2}\n")
    config = parsed("--config", file, "--method.keep_ratio=0.3", "--model.path", "b")
    assert (config.model.path, config.method.num_layers, config.method.keep_ratio) == ("b", 3, 0.3)


def test_lists_become_tuples() -> None:
    assert parsed("--model.path=a", "--method.layers=[3,1]").method.layers == (3, 1)


@pytest.mark.parametrize("text", ["[wikitext2,c4]", "[wikitext2, c4]", "['wikitext2', \"c4\"]"])
def test_a_source_is_one_name_or_a_list(text: str, tmp_path: Path) -> None:
    for argv in ([f"--calibration.source={text}"], ["--calibration.source", text]):
        assert parsed("--model.path=a", *argv).calibration.source == ("wikitext2", "c4")
    file = write(tmp_path, f"model: {{path: a}}\ncalibration: {{source: {text}}}\n")
    assert parsed(f"--config={file}").calibration.source == ("wikitext2", "c4")
    one = parsed(f"--config={file}", "--calibration.source=wikitext2").calibration
    assert one.source == "wikitext2"


def test_the_keys_of_a_mixture_survive_yaml(tmp_path: Path) -> None:
    config = parsed(
        "--model.path=a",
        "--calibration.source=[file,file,pydoc]",
        "--calibration.path=[a b.jsonl, c.parquet]",
        "--calibration.rows=[0-259,260-]",
        "--calibration.weights=[2, 1, 0.5]",
        "--evaluation.rows=260-519",
    )
    calibration = config.calibration
    assert calibration.path == ("a b.jsonl", "c.parquet")
    assert calibration.rows == ("0-259", "260-")
    assert calibration.weights == (2.0, 1.0, 0.5)
    assert config.evaluation.rows == "260-519"
    file = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert parsed(f"--config={file}") == config


@pytest.mark.parametrize("argv", [["--overwrite"], ["--overwrite=true"], ["--overwrite", "true"]])
def test_a_flag_needs_no_value(argv: list[str]) -> None:
    assert parsed("--model.path=a", *argv).overwrite is True
    assert parsed(*argv, "--model.path=a").overwrite is True


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = parsed("--model.path=a", "--method.layers=[3,1]", "--output_dir=x")
    file = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert parsed(f"--config={file}") == config


def test_print_config_shows_yaml_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--model.path=a", "--print_config")
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {bogus: 1}", "run.yaml: unknown key method.bogus; allowed: method.name, method."),
        ("methods: {name: grasp}", "run.yaml: unknown key methods; did you mean method?"),
        ("method: {keep_ration: 0.1}", "did you mean method.keep_ratio?"),
        (
            "method: {num_layers: many}",
            "method.num_layers: expected a whole number or null, got 'many'",
        ),
        ("method: {keep_ratio: much}", "method.keep_ratio: expected a number or null, got 'much'"),
        ("method: {terms: some}", "method.terms: expected one of full, sigma or null, got 'some'"),
        ("method: {layers: [1, x]}", "method.layers: expected a list such as [20, 21] or null"),
        ("method: 3", "run.yaml: method: expected a section of keys, got 3"),
        (
            "calibration: {source: {a: 1}}",
            "calibration.source: expected text or a list of names, got",
        ),
        ("calibration: {source: [1]}", "calibration.source: expected text or a list of names"),
        (
            "calibration: {weights: [a]}",
            "calibration.weights: expected a list such as [0.1, 0.2] or null, got 'a'",
        ),
        ("calibration: {rows: 260}", "calibration.rows: expected text or a list of names or null"),
        ("overwrite: maybe", "overwrite: expected true or false, got 'maybe'"),
        ("model: [", "run.yaml: not valid YAML"),
        ("seed: 1\nmethod:\n  layers: [1]\n  layers: [2]", "line 4: the key layers is given twice"),
        ("seed: " + "[" * 100_000, "run.yaml: not valid YAML: nested more than 100 levels"),
        ("- a\n- b", "run.yaml: expected keys and values, got list"),
    ],
)
def test_mistakes_in_a_file_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parsed(f"--config={file}")
    assert message in str(error.value)
    assert str(error.value).startswith(file)
    assert "\n" not in str(error.value)


def test_flags_override_the_file_of_a_grid() -> None:
    flags = ["--calibration.source=[file]", "--calibration.path=[a.txt]", "--calibration.rows=null"]
    flags += ["--seeds=[0,1,2]", "--tasks.names=[]", "--methods={a: {name: drop, unit: mlp}}"]
    file = next(file for file in CONFIGS if file.name == "smollm2.yaml")
    grid = parse(CompareConfig, "cli.py compare", [f"--config={file}", *flags])
    assert (grid.calibration.source, grid.calibration.path) == (("file",), ("a.txt",))
    assert (grid.calibration.rows, grid.calibration.num_samples) == (None, 64)
    assert (grid.seeds, grid.tasks.names, grid.tasks.limit) == ((0, 1, 2), (), 200)
    assert grid.methods == {"a": MethodConfig(name="drop", unit="mlp")}
    with pytest.raises(ConfigError, match=r"methods.a.unit; set all entries at once, as in --meth"):
        parse(CompareConfig, "cli.py compare", [f"--config={file}", "--methods.a.unit=mlp"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model.path=a", "--method.bogus=1"],
            "command line: unknown option --method.bogus; allowed:",
        ),
        (
            ["--model.path=a", "--method.num_layers=x"],
            "command line: method.num_layers: expected a whole",
        ),
        (
            ["--model.path=a", "--seed=1.5"],
            "command line: seed: expected a whole number, got '1.5'",
        ),
        (["--config=nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--model.path=a", "stray"], "stray"),
        (["--model.path=a", "--method.layers=" + "[" * 100_000], "has 100016 characters"),
        (["--model.path=a", "--method.layers=" + "[" * 9000], "method.layers: expected a list"),
        (["--model.path=a", "--seed=" + "1" * 5000], "command line: seed: expected a whole"),
        ([], "model.path is not set"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["seed: null", "calibration: {seqlen: null}", "overwrite:"])
def test_null_is_refused_where_a_value_is_needed(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, f"model: {{path: a}}\n{text}\n")
    with pytest.raises(ConfigError, match="got null"):
        parsed(f"--config={file}")


OF_GRASP = {"num_layers": 8, "keep_ratio": 0.2, "score": "taylor", "score_all_layers": True}
OF_PLUS = {"removed_ratio": 0.3, "weighting": "kfac", "removable": "layers", "mlp": "channels"}


@pytest.mark.parametrize(
    ("run", "words", "text", "expected"),
    [
        ("grasp", [], "", OF_GRASP),
        ("grasp", ["--method.name=low_rank"], "", {"num_layers": 8, "keep_ratio": 0.2}),
        ("grasp", ["--method.name", "drop"], "", {"num_layers": 8}),
        ("grasp", [], "method: {name: drop}", {"num_layers": 8}),
        (
            "grasp",
            ["--method.preset=released"],
            "",
            {"num_layers": 8, "keep_ratio": 0.2, "preset": "released"},
        ),
        ("grasp_plus", ["--method.name=grasp"], "", {"removed_ratio": 0.3}),
        (
            "grasp_plus",
            ["--method.name=low_rank", "--method.mlp=factors"],
            "",
            {"removed_ratio": 0.3, "mlp": "factors"},
        ),
    ],
)
def test_another_method_takes_over_from_a_run_what_it_reads_but_for_parts(
    tmp_path: Path, run: str, words: list[str], text: str, expected: dict[str, object]
) -> None:
    options = {"name": run, **(OF_GRASP if run == "grasp" else OF_PLUS)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": options}))
    file = [f"--config={write(tmp_path, text)}"] if text else []
    argv = with_run_config([f"--from_scores={tmp_path}", "--model.path=a", *words, *file])
    method = {key: value for key, value in vars(parsed(*argv).method).items() if key != "name"}
    assert {key: value for key, value in method.items() if value is not None} == expected
