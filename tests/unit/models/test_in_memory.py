from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.models.in_memory import ModelInMemory
from tests.conftest import byte_tokenizer, save_tiny, tiny_model


def held(model: PreTrainedModel) -> ModelInMemory:
    return ModelInMemory.checked(model, byte_tokenizer())


def test_the_origin_of_a_loaded_model_is_its_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    origin = held(AutoModelForCausalLM.from_pretrained(folder)).origin
    assert (origin.name, origin.licence, origin.folder) == ("base", "apache-2.0", folder)
    # Of its other files, those of its tokenizer do not belong to the caller's.
    assert [file.name for file in origin.side_files] == ["LICENSE"]


def test_a_name_is_kept_but_never_a_path() -> None:
    model: Any = tiny_model()
    for given, name in (
        ("", "LlamaForCausalLM"),
        ("owner/a-name", "owner/a-name"),
        ("/gone/home/of/base", "base"),
    ):
        model.name_or_path = given
        assert held(model).origin.name == name


def test_the_name_in_a_configuration_comes_from_the_content() -> None:
    model: Any = tiny_model()
    names = {held(model).settings.path, held(tiny_model()).settings.path}
    assert len(names) == 1
    model.name_or_path = model.config.name_or_path = "elsewhere"
    names.add(held(model).settings.path)
    assert len(names) == 1
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    names.add(ModelInMemory.checked(model, tokenizer).settings.path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    names.add(held(model).settings.path)
    assert len(names) == 3


def test_a_copy_is_prepared_like_a_loaded_model() -> None:
    model: Any = tiny_model()
    model.requires_grad_(False).train()
    copied = held(model).copied().model
    assert not copied.training
    assert all(parameter.requires_grad for parameter in copied.parameters())
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
