"""Compress large language models by replacing redundant layers with low-rank linears.

``compress``, ``compensate``, ``evaluate``, ``trim_vocabulary`` and ``load`` do what the program
does; ``quantize`` makes the weights of a loaded model int8, int4 or NF4. Importing this package
lets ``from_pretrained`` of transformers open compressed models.
"""

from grasp_lightning.api import (
    Run,
    compensate,
    compress,
    evaluate,
    load,
    quantize,
    trim_vocabulary,
)
from grasp_lightning.registration import register_with_transformers

__all__ = ["Run", "compensate", "compress", "evaluate", "load", "quantize", "trim_vocabulary"]

__version__ = "0.1.0"

register_with_transformers()
