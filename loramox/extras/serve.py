"""A folder from which `transformers serve` serves the forget model: links to the base's files, and the adapter."""

import shutil
from pathlib import Path
from typing import Any

from loramox.adapter.folder import CARD, CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.loading import check_whole
from loramox.adapter.provenance import check_alone, check_asked_base, check_base, check_out, read_provenance
from loramox.adapter.streaming.checkpoint import base_to_merge, beside, fetch_to_ship, leads_out
from loramox.errors import AdapterError, RunError
from loramox.files import replacing
from loramox.model.config import identify, read_config, skeleton


def serve_folder(
    adapter: str | Path, out: str | Path, base: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Lay out the folder `out` with the forget adapter and links to its base's files; return the names to ask a server for.

    Under {"forget": name} it answers as the forget model, under {"base": name} as the base. transformers puts an adapter on the
    model in whose folder it lies; nothing is merged or copied, so the base has to stay where it is.

    Raises `AdapterError` for what is no forget adapter of loramox, or is one of another base; `ModelError` for a base that is
    quantized or has no safetensors; `RunError` when `out` is taken.
    """
    adapter, out = Path(adapter), Path(out)
    source = read_provenance(adapter, "forget")
    check_alone(source, adapter)
    if out.resolve() == adapter.resolve():
        raise RunError(f"--out {out} is the adapter itself. Choose another folder")
    check_out(out, "forget", overwrite)
    model = base_to_merge(source["base"], base)
    config = read_config(model, flag="--base")
    identity = identify(model, config)
    check_base(source, identity, adapter)
    check_whole(adapter, skeleton(config, model))  # transformers leaves out what it finds no place for, in silence
    if leads_out(adapter / CARD, adapter):
        raise AdapterError(
            f"{adapter / CARD} is a link that leads out of the adapter's folder, or is no file. Put a file in its place"
        )
    folder, shards, identity = fetch_to_ship(model, identity)
    local = folder == Path(model.model)
    check_asked_base(source, identity, adapter)  # of a model of the hub, weights are known only now
    files = {*beside(folder), *(shard.path for shard in shards)}
    with replacing(out, folder=True) as partial:
        for path in files:
            (partial / path.name).symlink_to(path.resolve())
        for name in (WEIGHTS, PROVENANCE, CARD, CONFIG):
            shutil.copyfile(adapter / name, partial / name)
    return {"forget": str(out), "base": str(folder.resolve()) if local else model.model}
