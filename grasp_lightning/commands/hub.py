"""Uploads of finished models to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from grasp_lightning.errors import OutputError
from grasp_lightning.models.source import first_line


def push_folder(folder: Path, repository: str) -> str:
    """Upload a model folder to a repository on the hub, which is made if it does not exist.

    Args:
        folder: What is uploaded.
        repository: Name, such as ``owner/name``.

    Returns:
        Address of the upload.

    Raises:
        OutputError: If the hub cannot be reached, or refuses.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder))
    except (OSError, HFValidationError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise OutputError(
            f"push_to_hub: cannot upload to {repository} ({first_line(error)}); the model is in "
            f"{folder}: check the name, the network and your login, and run the same command again"
        ) from error
