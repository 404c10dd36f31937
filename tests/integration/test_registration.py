"""Importing the package is enough for transformers to open compressed models, in any order."""

import subprocess
import sys
from pathlib import Path

import pytest

from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import tiny_model
from tests.unit.models.helpers import factorize_layers

ORDERS = {
    "package first": "import grasp_lightning; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import grasp_lightning",
    "models first": "from transformers import LlamaForCausalLM, AutoModelForCausalLM; import "
    "grasp_lightning",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_compressed_folder_opens_whatever_is_imported_first(order: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    view = DecoderView(model)
    apply_operations(view, *factorize_layers(view, (1,), 3))
    save_model(model, tmp_path / "model")
    code = (
        f"{ORDERS[order]}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(sum(type(module).__name__ == 'LowRankLinear' for module in model.modules()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "7", done.stderr


def test_the_package_alone_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, grasp_lightning, grasp_lightning.config.parsing\n"
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
