"""Upload shipped files to the hub: only files of known names, so that no training rows can be among them."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loramox.adapter.folder import CARD, CONFIG, PROVENANCE
from loramox.adapter.streaming.checkpoint import BESIDE, INDEX
from loramox.errors import RunError, SettingsError
from loramox.settings import setting

# Everything that an adapter, a merged model or a GGUF consists of. Whatever else is in a folder stays here.
SHIPPED = (CONFIG, PROVENANCE, CARD, "config.json", INDEX, "*.safetensors", "*.gguf", *BESIDE)


@dataclass
class PushConfig:
    """Where what ships is uploaded to, if anywhere."""

    push_to_hub: str | None = setting(
        "Hub repository, NAME or OWNER/NAME, to upload what is written to; made private if it does not exist. "
        "Default: nothing is uploaded.",
        None,
    )
    dry_run: bool = setting("Write everything here, but only list what --push_to_hub would upload.", False)

    def __post_init__(self) -> None:
        if self.dry_run and not self.push_to_hub:
            raise SettingsError("--dry_run lists what would be uploaded: it needs --push_to_hub REPOSITORY")
        try:
            validate_repo_id(self.push_to_hub or "none")
        except HFValidationError as error:
            raise SettingsError(f"--push_to_hub {self.push_to_hub}: {error}") from error


def to_upload(what: Path) -> list[Path]:
    """The files of `what`, a folder or a single file, that are uploaded. Links are not followed."""
    files = [what] if what.is_file() else sorted(what.iterdir())
    return [f for f in files if f.is_file() and not f.is_symlink() and any(fnmatch(f.name, p) for p in SHIPPED)]


def push(what: str | Path, config: PushConfig) -> list[Path]:
    """Upload a shipped folder or file to `config.push_to_hub`, or with `dry_run` nothing; return the files it is about. The token
    is huggingface_hub's own (`hf auth login`); it is neither read nor written here. If the hub refuses, what was written on this
    machine stays.
    """
    files = to_upload(Path(what))
    if config.push_to_hub is None or config.dry_run:
        return files
    api = HfApi()
    try:
        repository = api.create_repo(config.push_to_hub, private=True, exist_ok=True).repo_id
        added = [CommitOperationAdd(file.name, file) for file in files]
        api.create_commit(repository, added, commit_message="A forget adapter made by loramox")
    except Exception as error:  # also those of the hub's HTTP package, which differs from version to version
        raise RunError(
            f"--push_to_hub {config.push_to_hub}: the hub did not take it ({type(error).__name__}: {error}). What was written is in {what}; log in "
            "with hf auth login, and give the command again with --overwrite"
        ) from error
    return files
