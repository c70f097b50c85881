"""The folder of a merged model: checked for other files and for disk space, written completely or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramox.adapter.provenance import check_out
from loramox.errors import RunError
from loramox.files import disk_may_fill, replacing


@contextmanager
def writing(out: Path, needed: int) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and of which nothing is left otherwise.

    Raises `RunError` when fewer than `needed` bytes are free, or when the disk fills up within the block.
    """
    needed += 64 << 20  # the tokenizer and headers beside
    advice = f"--out {out} needs {needed / 1e6:,.0f} MB in all. Free some, or choose another disk"
    with disk_may_fill(advice), replacing(out, folder=True) as partial:
        if (free := shutil.disk_usage(out.absolute().parent).free) < needed:
            raise RunError(
                f"--out {out}: {free / 1e6:,.0f} MB are free there, and the merged model needs {needed / 1e6:,.0f} MB. Free some, choose "
                "another disk, or merge into 16 bits (--dtype bfloat16)"
            )
        yield partial


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
