import shlex

from torch import nn

from grasp_lightning.config import ExportConfig
from grasp_lightning.config.parsing import parse
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import LowRankLinear, NarrowedLinear
from grasp_lightning.reporting.servers import Servers
from tests.conftest import tiny_model
from tests.unit.reporting.test_card import card

QUERY, GATE = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
LOW_RANK, NARROWED = LowRankLinear(32, 32, 4), NarrowedLinear(32, 40, bias=False)
TORCHAO = "`grasp-lightning export --model . --format torchao --type int8 --output_dir ../torchao`"
WITH_PLUGIN = "`vllm serve .`, with the plugin of grasp_lightning (`plugins/vllm`)"
GGUF = "`grasp-lightning export --model . --format gguf --output_dir ../gguf`"


def servers(*replaced: tuple[str, nn.Module], family: str = "llama") -> Servers:
    view = DecoderView(tiny_model(family))
    for name, linear in replaced:
        view.set_module(name, linear)
    return Servers.of(view.model)


def how(found: Servers, program: str, num_removed: int | None = None) -> str:
    return dict(found.rows(num_removed))[program]


def test_an_ordinary_model_needs_no_plugin() -> None:
    assert servers().special is None
    assert [tuple(row) for row in servers().rows()] == [
        ("transformers", "as above"),
        ("vLLM", "`vllm serve .`"),
        ("llama.cpp, Ollama", GGUF),
        ("torchao, 8 bits", TORCHAO),
    ]


def test_the_program_accepts_the_commands() -> None:
    commands = [
        how(servers(), program).strip("`") for program in ("llama.cpp, Ollama", "torchao, 8 bits")
    ]
    configs = [parse(ExportConfig, "export", shlex.split(command)[2:]) for command in commands]
    assert [(config.format, config.model, config.type) for config in configs] == [
        ("gguf", ".", None),
        ("torchao", ".", "int8"),
    ]


def test_a_narrowed_model_needs_the_plugin_and_loses_nothing_in_llama_cpp() -> None:
    found = servers((GATE, NARROWED))
    assert found.special == "narrowed"
    assert how(found, "vLLM") == WITH_PLUGIN
    assert how(found, "llama.cpp, Ollama", 1000) == GGUF


def test_other_numbers_of_heads_and_added_biases_keep_vllm_from_running_a_model() -> None:
    refused = "not possible: this model has different numbers of attention heads in its layers"
    found = servers((QUERY, NarrowedLinear(32, 16, bias=False)))
    assert how(found, "vLLM").startswith(refused)
    reader = NarrowedLinear(40, 32)
    reader.adds_bias = True
    found = servers((GATE.replace("gate", "down"), reader))
    assert how(found, "vLLM").startswith(refused)
    assert how(found, "llama.cpp, Ollama") == GGUF


def test_low_rank_linears_lose_their_share_of_the_saving_in_llama_cpp() -> None:
    found = servers((QUERY, LOW_RANK), (GATE, NARROWED))
    assert found.special == "low-rank"
    assert found.num_restored == 32 * 32 - 4 * (32 + 32)
    ending = "; 1 low-rank linear is multiplied back, which loses {} of the saving"
    assert how(found, "llama.cpp, Ollama", 2 * 768) == GGUF + ending.format("50%")
    assert how(found, "llama.cpp, Ollama") == GGUF + ending.format("part")
    two = servers((QUERY, LOW_RANK), (QUERY.replace("1", "2"), LowRankLinear(32, 32, 4)))
    assert "; 2 low-rank linears are multiplied back" in how(two, "llama.cpp, Ollama")


def test_a_removed_block_costs_nothing_in_llama_cpp() -> None:
    output = "model.layers.1.self_attn.o_proj"
    found = servers((output, LowRankLinear(32, 32, 0)))
    assert found.special == "low-rank"
    assert how(found, "llama.cpp, Ollama", 1000) == GGUF


def test_a_family_that_llama_cpp_cannot_run_is_named() -> None:
    name = "model.decoder.layers.0.fc1"
    text = how(servers((name, NARROWED), family="opt"), "llama.cpp, Ollama")
    assert text.startswith("not possible: this model has class OPTForCausalLM, which format gguf")
    ordinary = how(servers(family="opt"), "llama.cpp, Ollama")
    assert "the folder is an ordinary one, so `convert_hf_to_gguf.py .` of llama.cpp" in ordinary


def test_the_card_has_the_table_for_its_own_model() -> None:
    found = Servers(special="low-rank", num_multiplied=59, num_restored=6_800_000)
    text = card(servers=found)
    start = text.index("## Who can run it")
    table = text[start : text.index("## Limits")]
    assert table == (
        "## Who can run it\n\nIn this folder:\n\n| program | command |\n|---|---|\n"
        "| transformers | as above |\n"
        f"| vLLM | {WITH_PLUGIN} |\n"
        f"| llama.cpp, Ollama | {GGUF}; 59 low-rank linears are multiplied back, "
        "which loses 27% of the saving |\n"
        f"| torchao, 8 bits | {TORCHAO} |\n\n"
    )
