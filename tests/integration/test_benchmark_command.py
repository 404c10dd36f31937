"""``benchmark`` as a user configures it: what it measures, writes, and refuses."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lightning.cli import main
from grasp_lightning.commands.benchmark import BenchmarkRun, run_benchmark, variant_names
from grasp_lightning.config import BenchmarkConfig, ModelConfig
from grasp_lightning.config.parsing import parse
from grasp_lightning.errors import ConfigError, GraspError, ModelError, NumericsError, OutputError
from grasp_lightning.evaluation.own_process import measure_peak_memory
from grasp_lightning.evaluation.workload import Workload
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import VOCABULARY, byte_tokenizer, save_tiny, tiny_model
from tests.integration.forked import CONTEXT
from tests.unit.models.helpers import factorize_layers

QUICK = (
    "--prefill_lengths=[8,16]",
    "--decode_batch_sizes=[1,2]",
    "--prompt_length=4",
    "--new_tokens=3",
    "--rounds=2",
    "--threads=1",
)

WORKLOAD = Workload(
    prefill_lengths=(8,),
    decode_batch_sizes=(1,),
    prompt_length=4,
    new_tokens=100,
    num_rounds=1,
    seed=0,
    vocabulary=VOCABULARY,
)


def benchmark(*words: object) -> BenchmarkRun:
    return run_benchmark(parse(BenchmarkConfig, "benchmark", [str(word) for word in words]))


def save_compressed(folder: Path) -> Path:
    view = DecoderView(tiny_model())
    operations, tensors = factorize_layers(view, (1, 2), rank=5)
    apply_operations(view, operations, tensors)
    save_model(view.model, folder, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in forks of a process in which everything is imported."""
    forking = SimpleNamespace(get_context=lambda _: CONTEXT)
    monkeypatch.setattr("grasp_lightning.evaluation.own_process.multiprocessing", forking)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_models_are_compared_and_the_result_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    compressed = save_compressed(tmp_path / "run" / "model")
    other = save_tiny(tmp_path / "other", "gpt2", vocab_size=VOCABULARY + 40)
    output = tmp_path / "new" / "result.json"
    words = ["--model", tiny_folder, "--against", compressed, "--against", other]
    threads = torch.get_num_threads()
    run = benchmark(*words, *QUICK, "--output", output)
    assert torch.get_num_threads() == threads

    content = json.loads(output.read_text())
    assert content == run.result.to_dict()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["result.json", "result.png"]
    first, control, small, third = content["models"]
    names = [str(tiny_folder), f"{tiny_folder} (again)", str(compressed), str(other)]
    assert [model["name"] for model in content["models"]] == names
    assert control["is_control"]
    assert first["parameters"] == control["parameters"] > small["parameters"]
    assert {model["dtype"] for model in content["models"]} == {"float32"}
    assert content["machine"]["threads"] == 1
    assert content["workload"]["vocabulary"] == VOCABULARY  # the smallest
    for model in (control, small, third):
        assert all(t["ratio"]["median"] > 0 for t in (*model["prefill"], *model["decode"]))
    for model in content["models"]:
        assert [timing["num_rounds"] for timing in model["decode"]] == [2, 2]
        assert model["peak_memory"]["bytes"] > 4 * model["parameters"]

    with pytest.raises(OutputError, match=r"result\.json exists; name another output or use"):
        benchmark(*words, *QUICK, "--output", output)
    benchmark("--model", other, *QUICK, "--output", output, "--overwrite")
    assert [m["name"] for m in json.loads(output.read_text())["models"]] == names_alone(other)


def names_alone(folder: Path) -> list[str]:
    return [str(folder), f"{folder} (again)"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_process_that_measures_memory_reports_what_loading_refuses(
    tiny_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "result.json"
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        benchmark("--model", tiny_folder, *QUICK, "--output", output)
    assert not output.exists()


@pytest.mark.slow
def test_a_killed_process_is_one_line(tiny_folder: Path) -> None:
    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.05)
        assert children[0].pid is not None
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ModelError, match=r"memory of .* was killed \(signal 9\), probably"):
        measure_peak_memory(ModelConfig(path=str(tiny_folder)), WORKLOAD, 1)
    killer.join()


# Every new interpreter reads it: that of multiprocessing sends itself Ctrl-C when it imports torch.
INTERRUPTING = """
import os, signal, sys
def audit(event, arguments):
    if event == "import" and arguments[0] == "torch":
        os.kill(os.getpid(), signal.SIGINT)
if "--multiprocessing-fork" in sys.orig_argv:
    sys.addaudithook(audit)
"""


@pytest.mark.slow
def test_ctrl_c_is_not_for_the_process_that_measures_memory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert measure_peak_memory(ModelConfig(path=str(tiny_folder)), WORKLOAD, 1).bytes > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefill_lengths=[]"], "prefill_lengths is empty; expected a list of numbers"),
        (["--decode_batch_sizes=[]"], "decode_batch_sizes is empty"),
        (
            ["--decode_batch_sizes=[2,0]"],
            "decode_batch_sizes must hold numbers of at least 1, got 0",
        ),
        (["--prefill_lengths=[8,8]"], "prefill_lengths contains 8 more than once"),
        (["--prompt_length=0"], "prompt_length must be at least 1, got 0"),
        (["--new_tokens=-1"], "new_tokens must be at least 1, got -1"),
        (["--rounds=0"], "rounds must be at least 1, got 0"),
        (["--threads=0"], "threads must be at least 1, got 0"),
        (["--threads=100000"], "threads is 100000, but this machine has"),
        (["--seed=-1"], "seed must be from 0 to"),
        (["--revision=main"], "revision has no effect: no model comes from the hub"),
        (["--device=abacus"], "device: unknown device 'abacus'"),
        (["--prefill_lengths=[8,129]"], "prefill_lengths has 129, but .* has only 128 positions"),
        (
            ["--prefill_lengths=[8]", "--prompt_length=100"],
            "prompt_length 100 and new_tokens 32 need 132 positions, but .* has 128",
        ),
        (["--output=result.txt"], r"output: expected a file name that ends in \.json"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_measured(
    tiny_folder: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        benchmark("--model", tiny_folder, *words)


def test_a_folder_that_is_not_a_model_is_named_with_its_key(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^against: .*empty is not a model folder"):
        benchmark("--model", tiny_folder, "--against", tmp_path / "empty", *QUICK)
    with pytest.raises(ModelError, match=r"^model: no such file or folder: .*nowhere"):
        benchmark("--model", tmp_path / "nowhere", *QUICK)


def test_a_model_given_twice_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^against: .* is given more than once; the first model"):
        benchmark("--model", tiny_folder, "--against", tiny_folder, *QUICK)


def test_positions_are_those_of_every_model(tiny_folder: Path, tmp_path: Path) -> None:
    short = save_tiny(tmp_path / "short", max_position_embeddings=12)
    with pytest.raises(
        ConfigError, match=r"prefill_lengths has 16, but .*short has only 12 positions"
    ):
        benchmark("--model", tiny_folder, "--against", short, *QUICK)


@pytest.mark.parametrize("name", ["folder.json", "file/result.json", "locked/result.json"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    if name.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match=r"^output: .*(is a folder|is a file|permission denied)"):
        benchmark("--model", tiny_folder, *QUICK, "--output", tmp_path / name)


@pytest.mark.parametrize("existing", ["result.json", "result.png"])
def test_an_output_that_exists_is_kept(tiny_folder: Path, tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(OutputError, match=f"{existing} exists"):
        benchmark("--model", tiny_folder, *QUICK, "--output", tmp_path / "result.json")
    assert (tmp_path / existing).read_text() == "mine"


def test_overwrite_replaces_results_only(tiny_folder: Path) -> None:
    config = tiny_folder / "config.json"
    before = config.read_bytes()
    with pytest.raises(GraspError, match=r"config\.json exists and is not a result of benchmark"):
        benchmark("--model", tiny_folder, *QUICK, "--output", config, "--overwrite")
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["smollm2", "runs/x/model"], ["smollm2", "runs/x/model"]),
        (["smollm2", "runs/x/model", "runs/y/model"], ["smollm2", "x", "y"]),
        (["runs/x/model", "runs/y/z/model"], ["x", "y/z"]),
        (["/a/runs/x/model", "/b/runs/x/model"], ["a", "b"]),
        (["model", "runs/model"], ["model", "runs/model"]),
        (["x", "runs/x/model", "runs/y/model"], ["x", "runs/x/model", "runs/y/model"]),
        (["org/model", "other-org/model"], ["org", "other-org"]),
    ],
)
def test_models_are_called_as_given_or_by_what_differs(paths: list[str], names: list[str]) -> None:
    assert variant_names(paths) == names


@pytest.mark.slow
def test_the_program_prints_the_table_and_adds_to_the_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [f"--model.path={tiny_folder}", f"--output_dir={run}", "--method.name=drop"]
    words += ["--method.num_layers=1", "--calibration.source=pydoc", "--calibration.num_samples=2"]
    words += ["--calibration.seqlen=32", "--evaluation.source=pydoc", "--evaluation.seqlen=32"]
    words += ["--evaluation.num_samples=2"]
    assert main(["compress", *words]) == 0
    program = str(Path(__file__).parents[2] / "cli.py")
    command = [sys.executable, program, "benchmark", f"--model={tiny_folder}"]
    command += [f"--against={run / 'model'}", *QUICK]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "A (again)" in done.stdout
    assert f"results: {run / 'metrics.json'}" in done.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["throughput"]["model"] == str(run / "model")
    assert len(metrics["throughput"]["models"]) == 3
    report = (run / "report.html").read_text()
    assert "prefill, 8 tokens" in report
    assert "decode, 2 sequences" in report
