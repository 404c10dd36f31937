"""The folder of one run: its rules, its lock, its manifest, and files that are whole or absent."""

from grasp_lightning.run_folder.folder import RunFolder

__all__ = ["RunFolder"]
