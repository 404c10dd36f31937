"""The folder of one run: its rules, lock and manifest, and atomic file writes."""

from grasp_lightning.run_folder.files import write_file
from grasp_lightning.run_folder.folder import RunFolder, check_free_space
from grasp_lightning.run_folder.follower import FollowedRun

__all__ = ["FollowedRun", "RunFolder", "check_free_space", "write_file"]
