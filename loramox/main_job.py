"""The main job: memorize, then extrapolate. Two rooms that meet in a folder."""

import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from loramox.batches import Tokenisation
from loramox.extrapolate import ShippingConfig, check_shipping, extrapolate
from loramox.memorize import FOLDER, MemorizeConfig, memorize
from loramox.reference import ReferenceConfig
from loramox.rows import Columns, Data
from loramox.run import RunConfig, read_record, update_record

SHIPPED = "forget-adapter"


def unlearn(
    run: RunConfig,
    reference: ReferenceConfig,
    data: Data,
    args: MemorizeConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
    shipping: ShippingConfig | None = None,
) -> dict[str, Any]:
    """Rows and a model in, `run.out`/forget-adapter out; the record of both halves is in `run.out`/run.json and returned.

    Raises what `memorize` and `extrapolate` raise.
    """
    out = Path(run.out)
    shipping = shipping or ShippingConfig()
    check_shipping(shipping, reference, out)
    memorize(run, reference, data, args, columns, tokenisation)
    if args.process_index == 0:
        start = time.perf_counter()
        shipped = extrapolate(out / FOLDER, out / SHIPPED, shipping=shipping, overwrite=run.resume)
        record = read_record(out)
        update_record(
            out,
            status="done",
            forget_adapter={key: shipped[key] for key in ("strength", "rank", "truncation_error", "dtype")},
            timings=record["timings"] | {"extrapolate_seconds": time.perf_counter() - start},
        )
    PartialState().wait_for_everyone()
    return read_record(out)
