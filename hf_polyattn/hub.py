"""Publishing a saved model: one commit with everything a stranger needs, or none."""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .remote_code import FILE

logger = logging.getLogger(__name__)

CARD = "README.md"
UPLOADED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", FILE),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"),
    *("preprocessor_config.json", "processor_config.json", CARD, "LICENSE*", "results*.json", "*.png"),
)
"""What belongs to a model. Anything else in its folder, an optimizer's state or folders in it, stays where it is."""
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", FILE)
"""Of an earlier push these go: a loader would prefer one old file to the shards of the new model."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads the model in `folder` to the Hub, creating the repository if need be.

    All files arrive in one commit, made when the last of them is there: a push that breaks leaves the repository as
    it was and can be repeated, and files that are there already are not sent again. The token is the one of
    `hf auth login` or HF_TOKEN.

    Args:
        folder: what `save_pretrained` wrote, with a model card (README.md) beside it.
        repo_id: "name" or "user/name".
        private: of a new repository. None: what the account's default is.
        revision: branch, created if need be; None: main.
        message: of the commit.
        create_pr: open a pull request instead of committing to the branch.
    Returns:
        huggingface_hub's CommitInfo: `commit_url`, `oid`, `pr_url`.
    Raises:
        FileNotFoundError: when `folder` holds no whole model, or no card.
        PermissionError: without a token.
        ValueError: when `private` is asked for and the repository is there and public.
        ConnectionError: when the connection breaks or the Hub refuses; nothing was committed then.
    """
    folder = Path(folder)
    check_folder(folder)
    api = HfApi()
    if get_token() is None:
        raise PermissionError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is there already and public: choose another name, or make it private first")
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message or f"Upload {json.loads((folder / 'config.json').read_text())['architectures'][0]}",
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(UPLOADED),
            # a * matches across folders, and checkpoints of a run lie in some
            ignore_patterns=["*/*"],
            delete_patterns=list(_REPLACED),
        )
    except (HTTPError, RuntimeError) as error:
        # an upload that fails comes wrapped, with the name of the file
        reason = error if isinstance(error, HTTPError) else error.__cause__
        if isinstance(reason, HfHubHTTPError):
            raise ConnectionError(f"the Hub refused, and nothing was committed: {reason}") from error
        if isinstance(reason, HTTPError):
            raise ConnectionError(
                f"the connection to the Hub broke ({type(reason).__name__}), and nothing was committed: push again"
            ) from error
        raise


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError, with the remedy, unless `folder` holds a whole model and its card."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} holds an adapter only: merge it into its base and save that")
        raise FileNotFoundError(f"{folder} holds no config.json: give a folder that save_pretrained has written")
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise FileNotFoundError(f"{folder} lacks weights: {', '.join(missing)}")
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder} has no model card: write one with `hf-polyattn card {folder}`")


def license_of(base_model: str | None) -> str | None:
    """The licence that the card of a model (folder or Hub name) states; None when nobody can tell."""
    from huggingface_hub import ModelCard

    if not base_model:
        return None
    local = Path(base_model) / CARD
    try:
        data: Any = ModelCard.load(local if local.is_file() else base_model, ignore_metadata_errors=True).data
    except (OSError, ValueError, HTTPError):
        logger.info("no card of %s could be read", base_model)
        return None
    return data.license
