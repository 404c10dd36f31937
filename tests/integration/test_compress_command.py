"""``compress`` and ``plan`` as a user runs them: files, table, and one line for every mistake."""

import csv
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from tests.conftest import FAMILIES, save_tiny, tiny_model

Run = Callable[..., Path]
_ROW = '{"text": "One of the documents, and a few words more."}\n'
TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why. " * 60


def words_of(model: Path, run: Path) -> list[str]:
    return [
        f"--model.path={model}",
        f"--output_dir={run}",
        "--method.name=grasp",
        "--method.num_layers=2",
        "--method.keep_ratio=0.3",
        "--calibration.source=pydoc",
        "--calibration.num_samples=4",
        "--calibration.seqlen=48",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=3",
        "--evaluation.seqlen=48",
    ]


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return words_of(tiny_folder, tmp_path / "run")


class Finished(NamedTuple):
    """A finished run of the settings, which tests only read, and what it printed."""

    settings: list[str]
    folder: Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    settings = words_of(save_tiny(folder / "tiny-llama"), folder / "run")
    with redirect_stdout(StringIO()) as output:
        assert main(["compress", *settings]) == 0
    return Finished(settings, folder / "run", output.getvalue())


def read_metrics(folder: Path) -> dict:
    metrics: dict = json.loads((folder / "metrics.json").read_text())
    return metrics


def test_a_run_writes_what_the_design_names(finished: Finished) -> None:
    folder = finished.folder
    written = {path.name for path in folder.iterdir()}
    assert written == {
        *("config.yaml", "plan.json", "scores.safetensors", "factors.safetensors"),
        *("metrics.json", "report.html", "model", "logs", "manifest.json"),
    }
    metrics = read_metrics(folder)
    parameters = metrics["parameters"]
    assert parameters["dense"] == sum(p.numel() for p in tiny_model().parameters())
    assert metrics["bytes"]["compressed"] == 4 * parameters["compressed"]
    assert metrics["removed_ratio"] == pytest.approx(
        1 - parameters["compressed"] / parameters["dense"]
    )
    phases = ("load", "similarity", "attribution", "factorize", "save", "evaluate", "total")
    assert all(metrics["seconds"][phase] >= 0 for phase in phases)
    parts = sum(metrics["seconds"][phase] for phase in phases if phase != "total")
    assert parts <= metrics["seconds"]["total"] * 1.01
    assert metrics["perplexity_tokens"] == 3 * 47 - seams(folder)
    assert len(metrics["layers"]) == 2
    assert {"torch", "lightning", "transformers", "python"} <= metrics["versions"].keys()


def seams(folder: Path) -> int:
    """Predicted tokens that are missing since a document begins there; pydoc has several."""
    missing = 3 * 47 - int(read_metrics(folder)["perplexity_tokens"])
    assert 0 <= missing < 5
    return missing


def test_terminal_report_and_card_show_the_same_numbers(finished: Finished) -> None:
    terminal = [
        [cell.strip() for cell in line.strip("\u2502").split("\u2502")]
        for line in finished.output.splitlines()
        if line.startswith("\u2502")
    ]
    card = (finished.folder / "model" / "README.md").read_text()
    in_card = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", card, re.MULTILINE)
    report = (finished.folder / "report.html").read_text()
    in_report = re.findall(
        r"<tr>\s*<t[hd][^>]*>([^<]+)</t[hd]>" + 3 * r"\s*<td[^>]*>([^<]+)</td>" + r"\s*</tr>",
        report,
    )
    assert len(terminal) == 5
    assert [list(row) for row in in_card] == terminal
    assert [list(row) for row in in_report[:5]] == terminal
    assert "| vLLM | `vllm serve .`, with the plugin of grasp_lightning (`plugins/vllm`) |" in card


def test_the_saved_model_is_the_measured_one(finished: Finished) -> None:
    folder = finished.folder
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (
        sum(p.numel() for p in model.parameters())
        == read_metrics(folder)["parameters"]["compressed"]
    )
    replayed = tiny_model()
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert plan.complete
    tensors = load_file(folder / "factors.safetensors")
    apply_operations(DecoderView(replayed), plan.operations, tensors)
    ids = torch.arange(30)[None]
    assert torch.equal(model(ids).logits, replayed(ids).logits)


def test_scores_are_stored_for_every_component_and_layer(finished: Finished) -> None:
    scores = load_file(finished.folder / "scores.safetensors")
    plan = Plan.from_json((finished.folder / "plan.json").read_text())
    assert scores["layer_similarity"].shape == (4,)
    best = scores["layer_similarity"].topk(2).indices.sort().values.tolist()
    assert list(plan.selected_layers or ()) == best
    for module, rank in plan.ranks.items():
        values = scores[f"{module}.scores"]
        kept = next(op for op in plan.operations if getattr(op, "module", "") == module)
        top = values.topk(rank).indices.sort().values.tolist()
        assert list(getattr(kept, "components", ())) == top
        assert scores[f"{module}.singular_values"].shape == values.shape


@pytest.mark.slow
def test_two_runs_give_the_same_plan_bytes(finished: Finished, tmp_path: Path) -> None:
    again = [*finished.settings, f"--output_dir={tmp_path / 'again'}"]
    assert main(["compress", *again]) == 0
    first, second = (folder / "plan.json" for folder in (finished.folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_the_batch_size_changes_no_decision(finished: Finished, tmp_path: Path) -> None:
    more = [f"--output_dir={tmp_path / 'again'}", "--calibration.batch_size=3"]
    assert main(["compress", *finished.settings, *more]) == 0
    first, second = (folder / "plan.json" for folder in (finished.folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_finished_run_is_only_read(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    assert main(["compress", *finished.settings]) == 0
    again, first = capsys.readouterr().out, finished.output
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    assert again == first[first.index(again[:20]) :]
    assert "parameters" in again


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        if family == "llama" or (family, method) == ("opt", "grasp_plus")
        else pytest.param(family, method, marks=pytest.mark.slow)
        for family in FAMILIES
        for method in ("grasp", "grasp_plus", "drop")
    ],
)
def test_every_family_and_method_reloads_with_the_measured_perplexity(
    family: str, method: str, settings: list[str], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / family, family)
    keep = ["--method.keep_ratio=null"] if method == "drop" else []
    chosen = [*settings, f"--model.path={source}", f"--method.name={method}", *keep]
    assert main(["compress", *chosen]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics["method"] == method
    assert metrics["parameters"]["compressed"] < metrics["parameters"]["dense"]
    second = [
        f"--model.path={tmp_path / 'run' / 'model'}",
        f"--output_dir={tmp_path / 'second'}",
        *("--method.name=drop", "--method.layers=[0]"),
        *[s for s in settings if "calibration" in s or "evaluation" in s],
    ]
    assert main(["compress", *second]) == 0
    reloaded = read_metrics(tmp_path / "second")
    assert reloaded["parameters"]["dense"] == metrics["parameters"]["compressed"]
    assert reloaded["perplexity"]["dense"] == pytest.approx(
        metrics["perplexity"]["compressed"], rel=1e-6
    )


def test_layers_and_a_ratio_alone_are_a_budget_of_these_layers(
    settings: list[str], tmp_path: Path
) -> None:
    chosen = [word for word in settings if not word.startswith("--method.name=")]
    assert main(["compress", *chosen]) == 0
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.method == "grasp_plus"
    assert len(plan.selected_layers or ()) == 2
    parameters = read_metrics(tmp_path / "run")["parameters"]
    layer = count_parameters(tiny_model().get_submodule("model.layers.0"))
    removed = parameters["dense"] - parameters["compressed"]
    assert removed == pytest.approx(2 * 0.7 * layer, rel=0.05)


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--method.preset=paper", "method.preset"),
        ("--method.score=taylor", "method.score"),
        ("--method.terms=full", "method.terms"),
        ("--method.schedule=iterative", "method.schedule"),
    ],
)
def test_options_of_grasp_without_its_name_are_one_line(
    option: str,
    key: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [word for word in settings if not word.startswith("--method.name=")]
    assert main(["compress", *chosen, option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{key} would be ignored: " in line
    assert "set method.name=grasp, or leave it unset" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bfloat16_models_stay_bfloat16(settings: list[str], tmp_path: Path) -> None:
    assert main(["compress", *settings, "--model.dtype=bfloat16"]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics["dtype"] == "bfloat16"
    assert metrics["bytes"]["dense"] == 2 * metrics["parameters"]["dense"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    factors = load_file(tmp_path / "run" / "factors.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}


def test_the_calibration_loss_is_logged(finished: Finished) -> None:
    with (finished.folder / "logs" / "pass_1" / "metrics.csv").open() as file:
        losses = [float(row["calibration_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


def test_the_model_folder_names_no_path_of_this_machine(finished: Finished) -> None:
    for name in ("README.md", "config.json", "tokenizer_config.json"):
        text = (finished.folder / "model" / name).read_text()
        assert str(finished.folder.parent) not in text


def broken_json(folder: Path) -> str:
    file = folder / "broken.jsonl"
    file.write_text('{"text": "fine"}\n{"text": \n')
    return str(file)


def fieldless_json(folder: Path) -> str:
    file = folder / "fieldless.jsonl"
    file.write_text('{"text": "fine"}\n{"body": "no text"}\n')
    return str(file)


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


UNSET = ("--method.num_layers=null", "--method.keep_ratio=null")

MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown key": (lambda _: ["--method.bogus=1"], "unknown option --method.bogus"),
    "wrong type": (lambda _: ["--method.keep_ratio=x"], "method.keep_ratio: expected a number"),
    "keep_ratio": (lambda _: ["--method.keep_ratio=1.0"], "at least 0 and below 1, got 1.0"),
    "negative keep_ratio": (lambda _: ["--method.keep_ratio=-0.5"], "got -0.5"),
    "too many layers": (
        lambda _: ["--method.num_layers=5"],
        "method.num_layers is 5, but the model has 4 decoder layers",
    ),
    "all layers dropped": (
        lambda _: ["--method.num_layers=4", "--method.keep_ratio=0"],
        "all 4 decoder layers would be deleted",
    ),
    "negative layer": (
        lambda _: ["--method.num_layers=null", "--method.layers=[-1]"],
        "cannot be negative, got -1",
    ),
    "repeated layer": (
        lambda _: ["--method.num_layers=null", "--method.layers=[1,1]"],
        "names layer 1 more than once",
    ),
    "layer beyond the model": (
        lambda _: ["--method.num_layers=null", "--method.layers=[7]"],
        "the model has layers 0 to 3",
    ),
    "too many budgets": (
        lambda _: ["--method.removed_ratio=0.1"],
        "method.removed_ratio, method.keep_ratio and method.num_layers cannot all be set",
    ),
    "a budget of everything": (
        lambda _: ["--method.removed_ratio=1", "--method.keep_ratio=null"],
        "method.removed_ratio must be above 0 and below 1, got 1",
    ),
    "a budget alone": (
        lambda _: [*UNSET, "--method.removed_ratio=0.1"],
        "method.removed_ratio also needs one of method.num_layers",
    ),
    "a budget out of reach of two layers": (
        lambda _: ["--method.removed_ratio=0.9", "--method.keep_ratio=null"],
        "method.removed_ratio 0.9 is out of reach: the feasible range",
    ),
    "a budget out of reach at a keep_ratio": (
        lambda _: ["--method.removed_ratio=0.9", "--method.num_layers=null"],
        "method.removed_ratio 0.9 is out of reach at method.keep_ratio 0.3: the feasible range",
    ),
    "a budget out of reach of deletion": (
        lambda _: [*UNSET, "--method.name=drop", "--method.removed_ratio=0.01"],
        "method.removed_ratio 0.01 is out of reach: the feasible range",
    ),
    "drop with two budgets": (
        lambda _: ["--method.name=drop", "--method.removed_ratio=0.2", "--method.keep_ratio=null"],
        "method drop takes method.removed_ratio or method.num_layers, not both",
    ),
    "all layers scored iteratively": (
        lambda _: ["--method.schedule=iterative", "--method.score_all_layers=true"],
        "method.score_all_layers would be ignored",
    ),
    "ignored key": (
        lambda _: ["--method.name=drop"],
        "method.keep_ratio would be ignored",
    ),
    "no such model": (
        lambda folder: [f"--model.path={folder / 'nowhere'}"],
        "no such file or folder",
    ),
    "no model in the folder": (
        lambda folder: [f"--model.path={folder}"],
        "is not a model folder: it has no config.json",
    ),
    "no such corpus": (
        lambda folder: [
            "--calibration.source=file",
            f"--calibration.path={folder / 'nowhere.txt'}",
        ],
        "nowhere.txt",
    ),
    "empty corpus": (
        lambda folder: [
            "--calibration.source=file",
            f"--calibration.path={written(folder, 'empty.txt', '')}",
        ],
        "empty",
    ),
    "short corpus": (
        lambda folder: [
            "--calibration.source=file",
            f"--calibration.path={written(folder, 'short.txt', TEXT[:90])}",
        ],
        "gives 1 windows of 48 tokens",
    ),
    "broken JSON": (
        lambda folder: ["--calibration.source=file", f"--calibration.path={broken_json(folder)}"],
        "broken.jsonl, line 2",
    ),
    "JSON without the field": (
        lambda folder: [
            "--evaluation.source=file",
            f"--evaluation.path={fieldless_json(folder)}",
        ],
        "fieldless.jsonl, line 2",
    ),
    "unknown source": (lambda _: ["--calibration.source=moon"], "moon"),
    "unknown source in a list": (
        lambda _: ["--calibration.source=[pydoc,moon]"],
        "calibration.source 'moon' is unknown; expected one of pydoc, wikitext2, c4, ptb, file,",
    ),
    "no source": (lambda _: ["--calibration.source=[]"], "calibration.source is an empty list"),
    "weights of one source": (
        lambda _: ["--calibration.weights=[1]"],
        "calibration.weights has no effect with one calibration.source",
    ),
    "negative weight": (
        lambda _: ["--calibration.source=[pydoc,self]", "--calibration.weights=[1,-1]"],
        "calibration.weights must be above 0, got -1.0",
    ),
    "more sources than windows": (
        lambda _: ["--calibration.source=[pydoc,self]", "--calibration.num_samples=1"],
        "calibration.num_samples is 1, fewer than the 2 names in calibration.source",
    ),
    "a path too few": (
        lambda _: ["--calibration.source=[file,instructions]", "--calibration.path=a.jsonl"],
        "in calibration.source, in their order: 2, got 1",
    ),
    "rows out of range": (
        lambda folder: [
            "--evaluation.source=file",
            f"--evaluation.path={written(folder, 'a.jsonl', _ROW * 10)}",
            "--evaluation.rows=5-10",
        ],
        "evaluation.rows 5-10 is out of range",
    ),
    "not a range of rows": (
        lambda folder: [
            "--calibration.source=file",
            f"--calibration.path={written(folder, 'a.jsonl', _ROW * 10)}",
            "--calibration.rows=[5]",
        ],
        "calibration.rows '5' is not a range of rows",
    ),
    "home as output": (lambda _: [f"--output_dir={Path.home()}"], str(Path.home())),
}


@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_line_and_leaves_nothing(
    mistake: str,
    options: list[str],
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, message = MISTAKES[mistake]
    work = tmp_path / "work"
    work.mkdir()
    assert main(["compress", *settings, *change(work), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert sum(line.startswith("error") for line in lines) == 1
    assert not (tmp_path / "run").exists()


def test_nan_in_a_weight_is_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "tiny-llama")
    assert main(["compress", *settings]) == 2
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_nan_in_the_loss_is_named_by_layer(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    for name in ("gate_proj", "up_proj", "down_proj"):  # finite, but products overflow
        model.get_parameter(f"model.layers.2.mlp.{name}.weight").data.fill_(1e20)
    model.save_pretrained(tmp_path / "tiny-llama")
    assert main(["compress", *settings]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "decoder layer 2" in last
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_not_touched(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert main(["compress", *settings]) == 2
    assert "contains no run of this program" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_another_configuration_is_named_by_its_key(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *settings]) == 0
    assert main(["compress", *settings, "--method.keep_ratio=0.2"]) == 2
    assert "method.keep_ratio" in capsys.readouterr().err
    assert main(["compress", *settings, "--method.keep_ratio=0.2", "--overwrite"]) == 0


def test_output_into_the_model_is_refused(
    settings: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tiny_folder.iterdir())
    assert main(["compress", *settings, f"--output_dir={tiny_folder / 'run'}"]) == 2
    assert "error: " in capsys.readouterr().err
    assert sorted(path.name for path in tiny_folder.iterdir()) == before


LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


@pytest.mark.parametrize(
    ("keep_ratio", "percent"),
    [("0", "24.0"), (".05", "22.8"), (".10", "21.6"), (".15", "20.4"), (".20", "19.2")],
)
def test_plan_reproduces_the_paper_s_table_6(
    keep_ratio: str, percent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    argv = [
        f"--model.path={tmp_path}",
        "--method.name=grasp",
        "--method.num_layers=8",
        f"--method.keep_ratio={keep_ratio}",
    ]
    assert main(["plan", *argv]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{percent}%")
    assert "6,738,415,616" in first


def test_plan_predicts_what_compress_does(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *finished.settings]) == 0
    predicted = capsys.readouterr().out.splitlines()[0]
    counted = read_metrics(finished.folder)["parameters"]["compressed"]
    assert f"{counted:,} remain" in predicted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        (["--method.num_layers=2", "--method.removed_ratio=0.16"], "float32"),
        (["--method.layers=[0, 2, 3]", "--method.removed_ratio=0.2"], "bfloat16"),
        (["--method.keep_ratio=0.25", "--method.removed_ratio=0.2"], "bfloat16"),
        (
            [
                *("--method.num_layers=3", "--method.removed_ratio=0.24"),
                "--method.preset=released",
            ],
            "float32",
        ),
    ],
)
def test_a_share_of_the_model_is_removed_as_asked_and_as_planned(
    keys: list[str],
    dtype: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [*settings, *UNSET, f"--model.dtype={dtype}", *keys]
    assert main(["plan", *chosen]) == 0
    predicted = capsys.readouterr().out.splitlines()[0]
    assert main(["compress", *chosen]) == 0
    metrics = read_metrics(tmp_path / "run")
    asked = float(next(key for key in keys if "removed_ratio" in key).partition("=")[2])
    parameters = metrics["parameters"]
    # One rank of the widest linears, 32 x 48; it is more than 0.1 % of this model.
    assert 0 <= metrics["removed_ratio"] - asked <= 80 / parameters["dense"]
    assert f"{parameters['compressed']:,} remain" in predicted
    assert predicted.startswith(f"{metrics['removed_ratio']:.1%} of")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum(p.numel() for p in model.parameters()) == parameters["compressed"]
    assert model.dtype == getattr(torch, dtype)


def test_deletion_by_share_removes_the_nearest_number_of_layers(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*settings, *UNSET, "--method.name=drop", "--method.removed_ratio=0.4"]
    assert main(["plan", *chosen]) == 0
    predicted = capsys.readouterr().out.splitlines()[0]
    assert main(["compress", *chosen]) == 0
    metrics = read_metrics(tmp_path / "run")
    dense, layer = tiny_model(), count_parameters(tiny_model().get_submodule("model.layers.0"))
    expected = min(range(5), key=lambda n: abs(n * layer - 0.4 * count_parameters(dense)))
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert len(plan.dropped_layers) == expected
    assert f"{metrics['parameters']['compressed']:,} remain" in predicted


@pytest.mark.slow
def test_the_iterative_schedule_replaces_from_the_last_block_on(
    settings: list[str], tmp_path: Path
) -> None:
    chosen = [*settings, "--method.num_layers=null", "--method.layers=[1, 2]"]
    assert main(["compress", *chosen, "--method.schedule=iterative"]) == 0
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.options["schedule"] == "iterative"
    blocks = [".".join(module.split(".")[2:4]) for module in plan.ranks]
    assert list(dict.fromkeys(blocks)) == ["2.mlp", "2.self_attn", "1.mlp", "1.self_attn"]
    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert {f"{module}.scores" for module in plan.ranks} <= scores.keys()
    replayed = tiny_model()
    factors = load_file(tmp_path / "run" / "factors.safetensors")
    apply_operations(DecoderView(replayed), plan.operations, factors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.arange(30)[None]
    assert torch.equal(model(ids).logits, replayed(ids).logits)


def test_plan_solves_a_share_of_llama_2_7b(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    keys = ["--method.name=grasp", "--method.num_layers=8", "--method.removed_ratio=0.216"]
    assert main(["plan", f"--model.path={tmp_path}", *keys]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("21.6% of 6,738,415,616")


def memory_rows(lines: list[str]) -> dict[str, list[float]]:
    """Return the numbers of every strategy; names may hold spaces, numbers come at the end."""
    rows = {}
    for line in lines:
        cells = re.split(r"  +", line.strip())
        if line.startswith("  ") and re.fullmatch(r"\d+\.\d\d", cells[-1]):
            rows[cells[0]] = [float(cell) for cell in cells[1:]]
    return rows


def test_plan_shows_the_memory_of_llama_2_7b(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    argv = [f"--model.path={tmp_path}", "--method.name=grasp", "--method.num_layers=8"]
    assert main(["plan", *argv, "--trainer.devices=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("21.6%")
    assert "Memory per process, in GB" in "\n".join(lines)
    rows = memory_rows(lines)
    assert list(rows) == [
        *("auto", "ddp, 4 processes", "fsdp, 4 processes", "streamed"),
        *("auto, 1 process", "ddp", "fsdp"),
        *("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
        *("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"),
        *("lora", "factors", "lora_on_factors", "replaced", "all"),
    ]
    # U, s and V of q, k, v, o (4096 x 4096) and gate, up, down (4096 x 11008), float32.
    square, wide = 4096 * 8193, 4096 * (4096 + 1 + 11008)
    assert rows["auto"][:2] == [13.48, round(8 * 4 * (4 * square + 3 * wide) / 1e9, 2)]
    assert rows["fsdp, 4 processes"][0] == round((13.4768 / 4) + 2 * 32000 * 4096 * 2 / 1e9, 2)
    assert all(abs(sum(row[:-1]) - row[-1]) < 0.03 for row in list(rows.values())[:3])


def test_plan_shows_the_memory_of_a_model_that_generates_text(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = "text that the model generates, "
    assert main(["plan", *settings]) == 0
    assert said not in capsys.readouterr().out
    more = ["--calibration.source=[pydoc,self]", "--calibration.num_samples=12"]
    assert main(["plan", *settings, *more, "--calibration.seqlen=24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith(said)]
    # Keys and values of 4 layers, 16 wide, in addition to the weights, in float32.
    size = sum(parameter.nbytes for parameter in tiny_model().parameters())
    size += 2 * 4 * 16 * (6 * 24) * 4
    assert line == f"{said}6 x 24 tokens: {size / 1e6:.2f} MB, weights included"


def test_plan_shows_the_memory_of_a_compensation_file(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compensate.yaml"
    file.write_text(
        "train: factors\nobjective: text\ntext: {seqlen: 16}\ntraining: {micro_batch_size: 3}\n"
    )
    assert main(["plan", *finished.settings, f"--compensate={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"compensation with {file}, 8 processes, 3 x 16 tokens at a time," in lines
    (alone, together) = [line.split() for line in lines if line.startswith(("  auto, 1", "  ddp "))]
    assert 2 * float(alone[4]) == pytest.approx(float(together[2]), abs=0.02)  # gradients
    (trained,) = [line for line in lines if line.startswith("train: factors, ")]
    factors = load_file(finished.folder / "factors.safetensors")
    expected = sum(factor.numel() for factor in factors.values())
    assert trained == f"train: factors, {expected:,} parameters trained"


def test_plan_shows_the_cache_of_a_schedule_and_that_deletion_has_no_statistics(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    many = [*settings, "--calibration.num_samples=2000"]
    assert main(["plan", *many, "--method.schedule=iterative"]) == 0
    auto = memory_rows(capsys.readouterr().out.splitlines())["auto"]
    assert auto[4] == round(2 * 2000 * 48 * 32 * 4 / 1e6, 2)
    assert main(["plan", *settings, "--method.keep_ratio=0"]) == 0
    printed = capsys.readouterr().out
    assert "no backward pass" in printed
    assert memory_rows(printed.splitlines())["auto"][1:3] == [0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--compensate {file}: no such file"),
        ("lora: {rank: 0}", "lora.rank must be at least 1, got 0"),
        ("lora: {size: 3}", "{file}: unknown key lora.size"),
    ],
)
def test_a_wrong_compensation_file_is_one_line(
    content: str | None,
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "compensate.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["plan", *settings, f"--compensate={file}"]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_the_resolved_configuration_is_written(finished: Finished) -> None:
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert config["method"]["terms"] == "full"
    assert config["method"]["preset"] == "paper"
    assert main(["compress", f"--config={finished.folder / 'config.yaml'}"]) == 0


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "compress"),
        (["--version"], 0, "grasp-lightning"),
        (["compress", "--help"], 0, "--method.keep_ratio"),
        ([], 2, "no command; expected one of compress, compensate, plan"),
        (["shrink"], 2, "unknown command 'shrink'"),
    ],
)
def test_help_version_and_unknown_commands(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


@pytest.mark.slow
@pytest.mark.parametrize("score", ["taylor", "gradient", "magnitude"])
def test_every_score_ends_in_a_model(score: str, settings: list[str], tmp_path: Path) -> None:
    assert main(["compress", *settings, f"--method.score={score}"]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics["parameters"]["compressed"] < metrics["parameters"]["dense"]
    assert (metrics["seconds"]["attribution"] is not None) or score == "magnitude"


@pytest.mark.slow
def test_mixed_precision_keeps_the_model_s_dtype(settings: list[str], tmp_path: Path) -> None:
    assert main(["compress", *settings, "--trainer.precision=bf16-mixed"]) == 0
    assert read_metrics(tmp_path / "run")["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


LATER_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no device": (["--trainer.devices=0"], "trainer.devices must be at least 1, got 0"),
    "two nodes": (["--trainer.num_nodes=2"], "start the command on every node"),
    "no node": (["--trainer.num_nodes=0"], "trainer.num_nodes must be at least 1, got 0"),
    "other accelerator": (["--trainer.accelerator=cuda"], "the model is on cpu"),
    "null": (
        ["--calibration.seqlen=null"],
        "calibration.seqlen: expected a whole number",
    ),
    "null seed": (["--seed=null"], "seed: expected a whole number"),
    "negative seed": (["--seed=-1"], "seed must be from 0"),
    "huge seed": (["--seed=99999999999999999999999"], "seed must be from 0"),
    "huge batch": (["--calibration.batch_size=100000000000000"], "must be at most"),
    "no samples": (["--calibration.num_samples=0"], "calibration.num_samples must be at least 1"),
    "long windows": (["--evaluation.seqlen=300"], "but the model has 128 positions"),
    "long calibration": (["--calibration.seqlen=300"], "but the model has 128 positions"),
    "unknown precision": (["--trainer.precision=16-mixed"], "one of 32-true, bf16-mixed"),
}


@pytest.mark.parametrize("mistake", LATER_MISTAKES)
def test_values_out_of_range_are_one_line_and_leave_nothing(
    mistake: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = LATER_MISTAKES[mistake]
    assert main(["compress", *settings, *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_nan_in_text_that_the_model_writes_is_named_by_layer(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    for name in ("gate_proj", "up_proj", "down_proj"):  # finite, but products overflow
        model.get_parameter(f"model.layers.2.mlp.{name}.weight").data.fill_(1e20)
    model.save_pretrained(tmp_path / "tiny-llama")
    assert main(["compress", *settings, "--calibration.source=self"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "so it cannot generate text" in last
    assert "decoder layer 2" in last
    assert not (tmp_path / "run").exists()


def test_overwrite_deletes_nothing_for_a_mistake(finished: Finished) -> None:
    before = sorted(path for path in finished.folder.rglob("*"))
    assert main(["compress", *finished.settings, "--overwrite", "--method.num_layers=99"]) == 2
    assert before == sorted(path for path in finished.folder.rglob("*"))


def test_a_crash_before_anything_is_measured_leaves_nothing(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr("grasp_lightning.commands.compress.measure_size", fail)
    with pytest.raises(RuntimeError, match="crash"):
        main(["compress", *settings])
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(
        tmp_path / "tiny-llama", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    assert main(["compress", *settings]) == 2
    assert "but the model has only 100 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_without_its_metrics_is_explained(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *settings]) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert main(["compress", *settings]) == 2
    assert "has no readable metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_the_last_attention_of_a_hybrid_is_refused_before_anything_is_measured(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = save_tiny(tmp_path / "hybrid", "qwen3_5_text"), tmp_path / "run"
    options = [f"--model.path={source}", "--method.name=drop", "--method.layers=[3]"]
    output = [f"--output_dir={run}"] if command == "compress" else []
    assert main([command, *options, *output]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: method.layers=[3] cannot be deleted: without layers [3], the ")
    assert not run.exists()
