"""Compress large language models by replacing redundant layers with low-rank linears.

Importing this package lets ``from_pretrained`` of transformers open compressed models.
"""

from grasp_lightning.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
