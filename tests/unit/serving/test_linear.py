"""The plugin against stand-ins for vLLM's layers: all processes together equal the checkpoint."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_lightning_vllm.parts import Linear
from tests.unit.serving.stand_in_vllm import (
    ENGINE,
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)

pytestmark = pytest.mark.usefixtures("stand_in_vllm")
PROCESSES = (1, 2, 3)
INPUTS = 12
X = torch.randn(5, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
QKV = (6, 3)  # heads, key/value heads; each of size 4


def checkpoint(linear: Linear, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random tensors of one linear, by the keys of vLLM's layer."""
    rows, columns = shape = linear.shape or shape
    rank = rows if linear.rank is None else linear.rank
    tensors = {"weight": torch.randn(rank, columns), "bias": torch.randn(rows)}
    if linear.rank is not None:
        tensors["left.weight"] = torch.randn(rows, rank)
    return {key: tensor.double() for key, tensor in tensors.items()}


def dense(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = tensors["weight"]
    if "left.weight" in tensors:
        weight = tensors["left.weight"] @ weight
    return x @ weight.mT + tensors["bias"]


def loaded(
    layer: LinearBase, linears: list[Linear], stored: list[dict], shards: list[object]
) -> Any:  # noqa: ANN401  its class cannot be imported before the stand-ins
    method = import_module("grasp_lightning_vllm.linear").GraspLinearMethod(linears)
    layer.attach(method)
    for shard, tensors in zip(shards, stored, strict=True):
        for key, tensor in tensors.items():
            layer.load(key, tensor, shard)
    method.process_weights_after_loading(layer)
    return method


@pytest.mark.parametrize("num_processes", PROCESSES)
@pytest.mark.parametrize("ranks", [(5, 0, None), (None, 3, 2), (0, 0, 0), (1, 7, 12)])
def test_queries_keys_and_values(ranks: tuple[int | None, ...], num_processes: int) -> None:
    heads = (6, 6) if num_processes == 2 else QKV  # vLLM splits key/value heads evenly
    sizes = [heads[0] * 4, heads[1] * 4, heads[1] * 4]
    linears = [Linear(name, rank) for name, rank in zip("qkv", ranks, strict=True)]
    stored = [checkpoint(x, (size, INPUTS)) for x, size in zip(linears, sizes, strict=True)]
    pieces: list[list[Tensor]] = [[], [], []]
    for process in range(num_processes):
        options = {"process": process, "num_processes": num_processes}
        layer = QKVParallelLinear(INPUTS, heads, 4, bias=True, **options)
        method = loaded(layer, linears, stored, ["q", "k", "v"])
        y = method.apply(layer, X, layer.bias).split([n // num_processes for n in sizes], dim=-1)
        for piece, found in zip(y, pieces, strict=True):
            found.append(piece)
    for tensors, found in zip(stored, pieces, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=-1), dense(tensors, X))


@pytest.mark.parametrize("num_processes", PROCESSES)
@pytest.mark.parametrize(
    "linears",
    [
        [Linear("gate", shape=(11, INPUTS)), Linear("up", shape=(11, INPUTS))],
        [Linear("gate", 4), Linear("up")],
        [Linear("gate_up", shape=(22, INPUTS))],
        [Linear("gate_up", 5)],
    ],
    ids=lambda linears: f"{len(linears)}-{linears[0].rank}",
)
@pytest.mark.parametrize("down", ["dense", "low rank"])
def test_a_whole_mlp(linears: list[Linear], down: str, num_processes: int) -> None:
    width = 11 if linears[0].shape else 18  # 11 channels split unevenly
    reader = Linear("down", shape=(INPUTS, width)) if width == 11 else Linear("down", 3)
    if down == "dense" and width == 18:
        reader = Linear("down")
    rows = 2 * width // len(linears)
    stored = [checkpoint(linear, (rows, INPUTS)) for linear in linears]
    stored_down = checkpoint(reader, (INPUTS, width))
    total = torch.zeros(len(X), INPUTS, dtype=torch.float64)
    for process in range(num_processes):
        options = {"process": process, "num_processes": num_processes}
        writer = ColumnParallelLinear(INPUTS, [18, 18], bias=True, **options)
        shards: list[object] = [None] if len(linears) == 1 else [0, 1]
        method = loaded(writer, linears, stored, shards)
        gate, up = method.apply(writer, X, writer.bias).chunk(2, dim=-1)
        last = RowParallelLinear(18, [INPUTS], bias=True, **options)
        method = loaded(last, [reader], [stored_down], [None])
        # vLLM adds the bias in the first process, and sums over processes.
        total += method.apply(last, gate * up, last.bias if process == 0 else None)
    gate, up = torch.cat([dense(tensors, X) for tensors in stored], dim=-1).chunk(2, dim=-1)
    torch.testing.assert_close(total, dense(stored_down, gate * up))


def test_a_missing_tensor_is_named() -> None:
    linears = [Linear("m.q", 2), Linear("m.k"), Linear("m.v", 1)]
    stored = [checkpoint(x, (size, INPUTS)) for x, size in zip(linears, (24, 12, 12), strict=True)]
    del stored[0]["left.weight"], stored[1]["bias"]
    layer = QKVParallelLinear(INPUTS, QKV, 4, bias=True)
    with pytest.raises(ValueError, match=r"^the checkpoint lacks m.q.left.weight, m.k.bias$"):
        loaded(layer, linears, stored, ["q", "k", "v"])


def test_a_tensor_of_another_shape_is_named() -> None:
    linears = [Linear("m.o", 2)]
    stored = checkpoint(linears[0], (INPUTS, INPUTS))
    stored["left.weight"] = stored["left.weight"][:, :1]
    layer = RowParallelLinear(INPUTS, [INPUTS], bias=True)
    message = r"m.o.left.weight must have shape \(12, 2\), got \(12, 1\)"
    with pytest.raises(ValueError, match=message):
        loaded(layer, linears, [stored], [None])


def make_config(**content: object) -> Any:  # noqa: ANN401  as above
    return import_module("grasp_lightning_vllm.config").GraspConfig.from_config(content)


def test_layers_get_the_linears_that_they_hold() -> None:
    config = make_config(ranks={"a.q_proj": 3, "a.o_proj": 0}, shapes={"m.down_proj": [4, 5]})
    layer = LinearBase(4, [4])
    method = config.get_quant_method(layer, "a.qkv_proj")
    assert [(x.module, x.rank) for x in method.linears] == [
        ("a.q_proj", 3),
        ("a.k_proj", None),
        ("a.v_proj", None),
    ]
    assert config.get_quant_method(layer, "m.down_proj").linears[0].shape == (4, 5)
    assert type(config.get_quant_method(layer, "b.proj")).__name__ == "UnquantizedLinearMethod"
    # Of a merged layer, the plugin checks the dense linears, too.
    merged = config.get_quant_method(QKVParallelLinear(4, QKV, 4), "b.qkv_proj")
    assert [x.module for x in merged.linears] == ["b.q_proj", "b.k_proj", "b.v_proj"]
    assert config.get_quant_method(torch.nn.Linear(1, 1), "a.q_proj") is None
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    assert len(config._linears("a.qkv_proj")) == 1


def engine(size: int = 1, lora: object = None) -> SimpleNamespace:
    text = SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)
    return SimpleNamespace(
        lora_config=lora,
        model_config=SimpleNamespace(hf_text_config=text),
        parallel_config=SimpleNamespace(tensor_parallel_size=size),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, r"tensor_parallel_size 9 does not fit 9 attention heads.*one of \[1, 3\]$"),
        ({"lora": object()}, "LoRA.*merge the adapter"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(options: dict, message: str) -> None:
    ENGINE.config = engine(**options)
    with pytest.raises(ValueError, match=message):
        make_config().get_quant_method(torch.nn.Linear(1, 1), "lm_head")


def test_vllm_checks_all_tensors_of_our_folders_alone() -> None:
    import_module("grasp_lightning_vllm.completeness").check_all_weights()
    loading = import_module("vllm.model_executor.model_loader.default_loader")
    for method, expected in (("grasp_lightning", True), ("fp8", None)):
        loader = loading.DefaultModelLoader()
        loader.enable_weights_track = None
        loader.load_weights(None, SimpleNamespace(quantization=method))
        assert loader.enable_weights_track is expected
