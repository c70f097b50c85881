"""The folder that a merged model is written to: what may be replaced, whether the disk holds it, whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loramox.adapter.provenance import check_out
from loramox.errors import RunError
from loramox.files import replacing


@contextmanager
def writing(out: Path, needed: int) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and of which nothing is left otherwise.

    Raises `RunError` when fewer than `needed` bytes are free, or when the disk fills up within the block.
    """
    needed += 64 << 20  # the tokenizer and headers beside
    with replacing(out) as partial:
        _check_disk(out, needed)
        partial.mkdir()
        try:
            yield partial
        except (OSError, SafetensorError) as error:
            # safetensors has an error of its own, which tells the system's in words.
            if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
                raise
            raise RunError(
                f"--out {out}: the disk filled up while the model was written, which needs {needed / 1e6:,.0f} MB in all; "
                f"{_free(out) / 1e6:,.0f} MB are free now, and what was written is removed. Free some, or choose another disk"
            ) from error


def check_apart(out: Path, overwrite: bool, sources: list[tuple[str, Path]]) -> None:
    """Nothing but a merged model of loramox is ever overwritten, and what it is made from is never touched."""
    here = out.resolve()
    for what, folder in sources:
        there = folder.resolve()
        if folder.exists() and (here == there or there in here.parents or here in there.parents):
            raise RunError(f"--out {out} is in the folder of the {what} or around it ({folder}). Choose another folder")
    if out.is_symlink() or out.is_file():
        raise RunError(f"--out {out} is a file or a link. Give a folder that does not exist yet")
    check_out(out, "merged", overwrite)


def _check_disk(out: Path, needed: int) -> None:
    if (free := _free(out)) < needed:
        raise RunError(
            f"--out {out}: {free / 1e6:,.0f} MB are free there, and the merged model needs {needed / 1e6:,.0f} MB. Free some, choose "
            "another disk, or merge into 16 bits (--dtype bfloat16)"
        )


def _free(out: Path) -> int:
    return shutil.disk_usage(out.absolute().parent).free
