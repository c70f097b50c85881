"""A plan as tables in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table

from loramox.extras.plan.job import Plan, Planned

PURPOSES = ("weights", "adapter", "gradients", "optimiser", "momentum", "activations", "loss")
SHOWN = 12  # choices
WIDE = 130  # columns of a terminal that has room for the memory of each choice by purpose


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print, for each length of rows, the choices, fastest first, and the costs of sweeping and merging."""
    console = console or Console()
    for planned in plan.planned:
        console.print(_choices(plan, planned, PURPOSES if console.width >= WIDE else ()))
        if planned.longest is None:
            console.print("Nothing fits: shorter rows (--max_length), a lower --r, or a larger card")
        else:
            console.print(_first(plan, planned), soft_wrap=True)  # flags that are broken over lines cannot be copied
            console.print(f"The first takes rows of up to about {planned.longest} tokens")
        console.print(_jobs(plan, planned))
    where = f"{_gb(plan.memory)} GB of {plan.device}; a choice fits when it is predicted to fill no more than {_gb(plan.budget)} GB of it."
    console.print(
        f"Memory: {where} 1 GB is 1024³ bytes. Merging works in main memory, in addition to what Python takes."
    )
    console.print(
        f"Time is arithmetic, not measured: every operation's FLOPs or bytes at {plan.speed.source}; merging is timed on this CPU, disk apart."
        if plan.speed
        else "Time: give --tflops (dense, 16 bits) of that card. The order is that of a card with 150 FLOPs for each byte it moves."
    )
    console.print(
        "The total time is not given: it needs steps that were measured, and a plan loads no weights. The progress bar of unlearn shows it "
        "after a few steps."
    )


def _first(plan: Plan, planned: Planned) -> str:
    """The flags of the fastest choice, and what it is made of."""
    first = min(planned.estimates, key=lambda each: not plan.fits(each))
    held = [f"{purpose} {_gb(size)}" for purpose, size in first.held.items() if size >= 1e7]
    return f"The first is {' '.join(first.choice.flags())}\n  and holds, in GB: {', '.join(held) or 'less than 0.01 of anything'}"


def _choices(plan: Plan, planned: Planned, purposes: Sequence[str]) -> Table:
    """`purposes`: of which the share in each choice is shown."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("rows", *purposes, "peak", "min/epoch")]
    title = f"Training on {planned.forget_rows} forget rows, the longest row {planned.length} tokens; GB at the fullest moment"
    table = Table(
        *numbers[:1], "checkpointing", "optimiser", *numbers[1:], "fits",
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for estimate in sorted(planned.estimates, key=lambda each: not plan.fits(each))[:SHOWN]:
        choice = estimate.choice
        table.add_row(
            f"{choice.per_device_train_batch_size} × {choice.gradient_accumulation_steps}",
            "on" if choice.activation_checkpointing else "off",
            choice.optim,
            *(_gb(estimate.held.get(purpose, 0)) for purpose in purposes),
            _gb(estimate.peak),
            _minutes(plan, estimate.seconds),
            "yes" if plan.fits(estimate) else "no",
        )
    return table


def _jobs(plan: Plan, planned: Planned) -> Table:
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("peak, GB", "minutes")]
    table = Table("then", *numbers, "of it", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    fits = sum(planned.sweep.held.values()) <= plan.budget
    batch = f"--batch_size {planned.sweep_batch_size}{'' if fits else ', which does not fit'}"
    for name, cost, note in (
        ("sweep", planned.sweep, f"{batch}; at most: with answers of the greatest length"),
        ("merge", planned.merge, f"and {planned.merge_files / 1e9:.1f} · 10⁹ bytes read and written"),
    ):
        parts = ", ".join(f"{purpose} {_gb(size)}" for purpose, size in cost.held.items() if size >= 1e7) or "little"
        seconds = f"{cost.seconds / 60:,.1f}" if plan.speed or name == "merge" else "–"
        table.add_row(name, _gb(sum(cost.held.values())), seconds, f"{parts}; {note}")
    return table


def _minutes(plan: Plan, seconds: float) -> str:
    return f"{seconds / 60:,.2f}" if plan.speed else "–"


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f}"
