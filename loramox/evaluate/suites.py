"""The rows of public benchmarks, from the hub or from a folder."""

from pathlib import Path

from loramox.errors import RowsError

TOFU = "locuslab/TOFU"


def suite_parts(split: str, folder: str | None) -> dict[str, str]:
    """TOFU (arXiv 2401.06121): part → file or hub data set, for its forget split forget01, forget05 or forget10.

    Raises `RowsError` when the folder lacks one of its files.
    """
    names = {
        "forget": f"{split}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    if folder is None:
        return {part: f"{TOFU}:{name}" for part, name in names.items()}
    found = {part: _file(Path(folder), name) for part, name in names.items()}
    missing = [names[part] for part, path in found.items() if path is None]
    if missing:
        raise RowsError(
            f"--data {folder} has no {', '.join(f'{name}.jsonl' for name in missing)} (or .json, .parquet). They are TOFU's own "
            "files, from its data set on the hub"
        )
    return {part: str(path) for part, path in found.items()}


def _file(folder: Path, name: str) -> Path | None:
    return next((path for end in (".jsonl", ".json", ".parquet") if (path := folder / f"{name}{end}").is_file()), None)
