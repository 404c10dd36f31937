"""Rounded products of a model leave what is summed and decomposed exact."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grasp_lightning.cli import main
from grasp_lightning.config import MetricOptions
from grasp_lightning.linalg.components import TokenGradient, sigma_gradients, window_scores
from grasp_lightning.linalg.factors import factorize
from grasp_lightning.linalg.precision import matmul_precision
from grasp_lightning.linalg.weightings import damped_root, weighted_svd
from grasp_lightning.stats.base import MomentKind, Vocabulary
from grasp_lightning.stats.moments import MomentSums
from grasp_lightning.stats.vocabulary import VocabularySums
from grasp_lightning.training.layer_refit import add_products
from tests.rounding import RoundedProducts

SETTINGS = ["--method.removed_ratio=0.2", "--trainer.checkpoint_seconds=0"]
SETTINGS += ["--calibration.source=pydoc", "--calibration.num_samples=3"]
SETTINGS += ["--calibration.seqlen=32", "--evaluation.source=pydoc"]
SETTINGS += ["--evaluation.num_samples=2", "--evaluation.seqlen=32"]
KINDS: frozenset[MomentKind] = frozenset({"input_gram", "gradient_gram", "fisher_columns"})


@pytest.fixture
def rounded() -> Iterator[RoundedProducts]:
    """Products are rounded where the settings allow it, as on newer hardware."""
    with matmul_precision("highest"), RoundedProducts() as mode:
        yield mode


def _sums() -> dict[str, Callable[[], Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(40, size, generator=generator) for size in (12, 8))
    weight = torch.randn(8, 12, generator=generator)
    svd, root = factorize(weight), damped_root(x.double().mT @ x.double(), 1e-3).float()

    def moments() -> dict[str, Tensor]:
        sums = MomentSums({"up": (8, 12)}, KINDS, {"up": "up"}, torch.device("cpu"))
        sums.add("up", x, grad)
        return sums.sums

    def products() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        add_products(found, "up", x, grad, torch.ones(40))
        return found

    def rows() -> dict[str, Tensor]:
        ends = Vocabulary(
            embedding="embed", head="head", scale=1.0, special=(), metric=MetricOptions()
        )
        sums = VocabularySums(ends, torch.ones(64), torch.ones(64), 12, torch.device("cpu"))
        sums.add_embedding(torch.arange(40), x)
        sums.add_head(x, grad.repeat(1, 8))
        return sums.sums

    return {
        "moments": moments,
        "rows": rows,
        "refit": products,
        "sigma": lambda: sigma_gradients(svd, TokenGradient(x, grad)),
        "dense gradient": lambda: TokenGradient(x, grad).dense(torch.float32),
        "scores": lambda: window_scores(svd, weight, terms="full", score="taylor", squared=False),
        "svd": lambda: weighted_svd(weight, None, root, dtype=torch.float32),
    }


def _flat(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    assert isinstance(found, dict | tuple)
    return list(found.values()) if isinstance(found, dict) else list(found)


@pytest.mark.parametrize("name", _sums())
def test_sums_and_decompositions_are_not_rounded(name: str, rounded: RoundedProducts) -> None:
    work = _sums()[name]
    exact = _flat(work())
    with matmul_precision("medium"):
        product = torch.ones(2, 2) @ torch.full((2, 2), 1.001)
        assert rounded.num_rounded == 1
        assert not torch.equal(product, torch.full((2, 2), 2.002))  # the setting has an effect
        found = _flat(work())
        assert rounded.num_rounded == 1
    assert all(map(torch.equal, found, exact))
    for gram in found if name == "moments" else ():
        assert gram.ndim == 1 or torch.equal(gram, gram.mT)


def test_a_setting_for_one_backend_is_restored() -> None:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"  # torch no longer has a name for both settings
        with matmul_precision("highest"):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_a_run_with_rounded_products_makes_a_plan_and_says_so(
    rounded: RoundedProducts,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    perplexities = {}
    for name in ("highest", "medium"):
        run, keys = tmp_path / name, ["--trainer.matmul_precision=" + name]
        keys += [f"--model.path={tiny_folder}", *SETTINGS]
        assert main(["compress", *keys, f"--output_dir={run}"]) == 0
        assert torch.get_float32_matmul_precision() == "highest"
        assert (rounded.num_rounded > 0) == (name == "medium")
        metrics = json.loads((run / "metrics.json").read_text())
        assert json.loads((run / "plan.json").read_text())["complete"]
        assert metrics["removed_ratio"] == pytest.approx(0.2, abs=1e-3)
        perplexities[name] = metrics["perplexity"]["dense"]
        assert main(["plan", *keys]) == 0
        said = f"products of the model are rounded (trainer.matmul_precision {name}), those of"
        assert (said in capsys.readouterr().out) == (name == "medium")
    assert perplexities["medium"] != perplexities["highest"]
    assert perplexities["medium"] == pytest.approx(perplexities["highest"], rel=0.01)
    # Statistics depend on it, so a run is not continued with another.
    keys[0] = "--trainer.matmul_precision=high"
    assert main(["compress", *keys, f"--output_dir={run}"]) == 2
    assert "trainer.matmul_precision" in capsys.readouterr().err
    assert "matmul_precision: medium" in (run / "report.html").read_text()
