"""A made-up run of realistic shape: 30 layers, 8 of them replaced, 7 linears in each."""

from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning.plan import DropLayers, FactorizeLinear, NarrowMlp, Plan, SelectLayers
from grasp_lightning.reporting.metrics import DecoderLinears, Metrics, Pair, Seconds
from grasp_lightning.reporting.servers import Servers

LAYERS = (17, 19, 20, 21, 22, 23, 24, 26)
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
CONFIG = {
    "output_dir": "runs/quickstart",
    "overwrite": False,
    "seed": 0,
    "model": {"path": "smollm2", "revision": None, "dtype": "auto", "device": "auto"},
    "method": {"name": "grasp", "num_layers": 8, "layers": None, "keep_ratio": 0.1},
    "calibration": {"source": "pydoc", "path": None, "num_samples": 64, "seqlen": 256},
    "evaluation": {"source": "pydoc", "path": None, "num_samples": 32, "seqlen": 512},
}
LOW_RANK_SERVERS = Servers(special="low-rank", num_multiplied=56, num_restored=25_501_248)


def example_metrics(**changes: object) -> Metrics:
    metrics = Metrics(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        method="grasp",
        dtype="float32",
        layers=LAYERS,
        removed_ratio=0.1896,
        parameters=Pair(dense=134_515_008, compressed=109_013_760),
        bytes=Pair(dense=538_060_032, compressed=436_055_040),
        decoder_linears=DecoderLinears(
            parameters=Pair(dense=106_168_320, compressed=80_667_072),
            bytes=Pair(dense=424_673_280, compressed=322_668_288),
        ),
        source_bytes=98_420_000,
        perplexity=Pair[float | None](dense=18.2468, compressed=41.0152),
        perplexity_tokens=16_352,
        seconds=Seconds(
            load=2.4,
            similarity=9.8,
            attribution=61.3,
            factorize=6.1,
            save=1.9,
            evaluate=38.7,
            total=122.9,
        ),
        peak_memory_bytes=1_912_000_000,
        versions={"grasp_lightning": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
    )
    return replace(metrics, **changes)  # type: ignore[arg-type]  # fields by name


def drop_metrics() -> Metrics:
    seconds = Seconds(load=2.4, similarity=9.8, save=1.9, evaluate=38.7, total=54.0)
    return example_metrics(method="drop", layers=(24, 25, 26), seconds=seconds)


def example_scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    similarity = 0.87 + 0.06 * torch.rand(30, generator=generator)
    similarity[list(LAYERS)] += 0.062
    similarity[[0, 1, 29]] = torch.tensor([0.48, 0.74, 0.71])
    scores = {"layer_similarity": similarity}
    for layer in LAYERS:
        for kind, shape in SHAPES.items():
            k = torch.arange(min(shape))
            values = 12 * torch.exp(-k / 140) / (1 + k).sqrt()
            noise = torch.randn(len(k), generator=generator)
            scores[f"model.layers.{layer}.{kind}.singular_values"] = values
            scores[f"model.layers.{layer}.{kind}.scores"] = 2e-3 * values**0.7 * noise.exp()
    return scores


def example_plan(scores: dict[str, Tensor] | None = None) -> Plan:
    scores = example_scores() if scores is None else scores
    operations = []
    for layer in LAYERS:
        for kind, (out_features, in_features) in SHAPES.items():
            module = f"model.layers.{layer}.{kind}"
            rank = int(0.1 * out_features * in_features / (out_features + in_features))
            kept = scores[f"{module}.scores"].topk(rank).indices.sort().values
            operations.append(
                FactorizeLinear(module=module, rank=rank, components=tuple(kept.tolist()))
            )
    return Plan(
        method="grasp",
        options={"keep_ratio": 0.1, "num_layers": 8},
        operations=(SelectLayers(layers=LAYERS), *operations),
        complete=True,
    )


def drop_plan() -> Plan:
    layers = (24, 25, 26)
    operations = (SelectLayers(layers=layers), DropLayers(layers=layers))
    return Plan(method="drop", options={"num_layers": 3}, operations=operations, complete=True)


def narrowing_plan() -> Plan:
    """Low-rank attention in one layer, MLPs of two layers narrowed."""
    query = FactorizeLinear(module="model.layers.3.self_attn.q_proj", rank=37, components=None)
    mlps = [
        NarrowMlp(
            reader=f"model.layers.{layer}.mlp.down_proj",
            writers=tuple(f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "up")),
            channels=tuple(range(kept)),
        )
        for layer, kept in ((3, 1024), (5, 384))
    ]
    return Plan(method="grasp_plus", operations=(query, *mlps), complete=True)


def narrowing_metrics() -> Metrics:
    channels = {
        reader: Pair(dense=1536, compressed=kept)
        for reader, kept in narrowing_plan().channels.items()
    }
    return example_metrics(method="grasp_plus", layers=(3, 5), channels=channels)
