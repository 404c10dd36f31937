"""The folder of one run: its rules, its lock, its manifest, and files that are whole or absent."""

from grasp_lightning.run_folder.files import write_file
from grasp_lightning.run_folder.folder import RunFolder
from grasp_lightning.run_folder.follower import FollowedRun

__all__ = ["FollowedRun", "RunFolder", "write_file"]
