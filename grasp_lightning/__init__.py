"""Compress large language models by replacing redundant layers with low-rank linears.

Importing this package registers low-rank linears with transformers, so that ``from_pretrained``
opens compressed models.
"""

from grasp_lightning.starting import is_program, leave_on_interrupt

if is_program():
    leave_on_interrupt()

import grasp_lightning.models.lowrank  # noqa: F401  (registers on import, which takes time)

__version__ = "0.1.0"
