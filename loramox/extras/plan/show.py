"""A plan as tables in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Column, Table

from loramox.extras.plan.job import Plan, Planned

SHOWN = 12  # choices


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print, for each length of rows, the choices, fastest first, and the cost of a sweep; then that of a merge."""
    console = console or Console()
    for planned in plan.planned:
        console.print(_choices(plan, planned))
        console.print(_first(plan, planned), soft_wrap=True)  # flags that are broken over lines cannot be copied
        console.print(_sweep(plan, planned))
    console.print(
        f"A merge takes {_gb(sum(plan.merge.values()))} GB of main memory besides Python's, and reads and writes "
        f"{plan.merge_files / 1e9:.1f} · 10⁹ bytes."
    )
    console.print(
        f"Memory: {_gb(plan.memory)} GB of {plan.device}; a choice fits when it is predicted to fill no more than {_gb(plan.budget)} GB "
        "of it. 1 GB is 1024³ bytes."
    )
    console.print(
        f"Time is arithmetic, not measured: every operation's FLOPs or bytes at {plan.speed.source}."
        if plan.speed
        else "Time: give --tflops (dense, 16 bits) of that card. The order is that of a card with 150 FLOPs for each byte it moves."
    )
    console.print(
        "The total time is not given: it needs steps that were measured, and a plan loads no weights. The progress bar of unlearn shows it "
        "after a few steps."
    )


def _choices(plan: Plan, planned: Planned) -> Table:
    table = Table(
        Column("rows", justify="right", no_wrap=True), "checkpointing", "optimiser",
        *(Column(name, justify="right", no_wrap=True) for name in ("peak", "min/epoch")), "fits",
        title=f"Training on {planned.forget_rows} forget rows, the longest row {planned.length} tokens; GB at the fullest moment",
        title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for estimate in sorted(planned.estimates, key=lambda each: not plan.fits(each.peak))[:SHOWN]:
        choice = estimate.choice
        table.add_row(
            f"{choice.per_device_train_batch_size} × {choice.gradient_accumulation_steps}",
            "on" if choice.activation_checkpointing else "off",
            choice.optim,
            _gb(estimate.peak),
            f"{estimate.seconds / 60:,.2f}" if plan.speed else "–",
            "yes" if plan.fits(estimate.peak) else "no",
        )
    return table


def _first(plan: Plan, planned: Planned) -> str:
    """The flags of the fastest choice that fits, and what it holds; of the smallest, where none fits."""
    first = next((each for each in planned.estimates if plan.fits(each.peak)), None)
    held = _held((first or min(planned.estimates, key=lambda each: each.peak)).held)
    if first is None:
        return f"Nothing fits: shorter rows (--max_length), a lower --r, or a larger card. The smallest holds, in GB: {held}"
    return f"The first is {' '.join(first.choice.flags())}\n  and holds, in GB: {held}"


def _sweep(plan: Plan, planned: Planned) -> str:
    peak = sum(planned.sweep.held.values())
    minutes = f", {planned.sweep.seconds / 60:,.1f} minutes at most" if plan.speed else ""
    fits = "" if plan.fits(peak) else ", which do not fit: it takes fewer"
    return f"A sweep of {plan.sweep_batch_size} answers at a time{fits}: {_gb(peak)} GB{minutes} ({_held(planned.sweep.held)})"


def _held(held: dict[str, int]) -> str:
    return ", ".join(f"{purpose} {_gb(size)}" for purpose, size in held.items() if size >= 1e7) or "less than 0.01 each"


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f}"
