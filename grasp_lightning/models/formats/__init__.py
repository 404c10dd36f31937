"""The formats of ``export``: one file or folder and one entry in the table each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from grasp_lightning.models.formats.base import ExportFacts, Format, Track
from grasp_lightning.models.formats.dense import DenseFormat
from grasp_lightning.models.formats.gguf import GgufFormat
from grasp_lightning.models.formats.quantized import QuantizedFormat
from grasp_lightning.models.formats.semi_sparse import SemiSparseFormat

__all__ = ["FORMATS", "ExportFacts", "Format", "Track"]

FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "dense": DenseFormat(),
        "gguf": GgufFormat(),
        "torchao": QuantizedFormat("int8", "int4"),
        "bitsandbytes": QuantizedFormat("nf4"),
        "2_4": SemiSparseFormat(),
    }
)
"""By the value of ``format``. A key of the configuration ``<format>_...`` is of one format only."""
