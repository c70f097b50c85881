"""What a run computes, by its job."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loramox.evaluate.attacks.relearn import attacker, train
from loramox.files import replacing
from loramox.train.momentum import Momentum

from .bench import Bench, Delta, Trained, norm
from .frontier import at_level, beside, measured
from .methods import ETAS, LEVEL, LEVELS, gold_of, reference_of, strengths
from .runs import Record, Run

RELEARN_STEPS = (5, 10, 20, 40)
RELEARN_SHARE = 0.2  # of the forget rows are the attacker's
SNAPSHOTS = 12  # points of a trajectory


class Jobs:
    """`compute(run)` for every job; what a run needs of others it computes, or finds."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.runs = bench, bench.runs

    def compute(self, run: Run) -> Record:
        return getattr(self, run.job)(run)

    def reference(self, run: Run) -> Record:
        """The model that knows."""
        return {"point": self.bench.plain(run, self.bench.world.path / "reference")}

    def retrained(self, run: Run) -> Record:
        """The one that never saw the forget rows: the world's own, or one trained here from scratch."""
        epochs = dict(run.settings).get("scratch")
        own = self.bench.world.path / "retrained"
        return {"point": self.bench.plain(run, self.bench.from_scratch(run, epochs) if epochs else own)}

    def beside(self, run: Run) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The reference's metrics on the rows of a run, with forget quality, and the retrained model's truth ratios."""
        gold = gold_of(run)
        never = self.runs.result(gold, self.compute)["point"] if gold else {}
        knows = beside(self.runs.result(reference_of(run), self.compute)["point"], never)
        del knows["truth_ratios"]
        return knows, never.get("truth_ratios", [])

    def curve(self, run: Run) -> Record:
        """Train, and ask at several strengths: forgetting against what is kept."""
        knows, theirs = self.beside(run)
        start = time.perf_counter()
        trained = self.bench.trained(run)
        seconds = time.perf_counter() - start

        def measure(strength: float) -> dict[str, float]:
            with trained.at(strength) as model:
                return {"strength": strength} | self.bench.ask(run, model, theirs)

        of = self.bench.of(run)
        own, others = trained.strength, strengths(of, run.method)
        points = measured(measure, {"strength": 0.0} | knows, own, others, LEVELS, of["refine"])
        about = {
            "strength": own,
            "norm": norm(trained.delta),
            "train_seconds": seconds,
            "config": self.bench.coefficients(run),
        }
        return {"points": points} | about

    def trajectory(self, run: Run) -> Record:
        """The forget model at its own strength, and how far it and θ_ref + ΔW are from θ_ref, along training."""
        knows, theirs = self.beside(run)
        trained = self.bench.train(run, snapshots=True)
        points = [{"step": 0, "distance": 0.0, "trained_distance": 0.0} | knows]
        every = max(1, len(trained.snapshots) // SNAPSHOTS)
        for number, (step, delta, average) in enumerate(self._averages(run, trained), 1):
            if number % every and number < len(trained.snapshots):
                continue
            with trained.at(trained.strength, average) as model:
                found = self.bench.ask(run, model, theirs)
            how_far = {"distance": trained.strength * norm(average), "trained_distance": norm(delta)}
            points.append({"step": step} | how_far | found)
        return {"points": points, "strength": trained.strength}

    def _averages(self, run: Run, trained: Trained, eta: float | None = None) -> Iterator[tuple[int, Delta, Delta]]:
        """(step, ΔW, its momentum average) after each epoch, exact for any η: training does not depend on it."""
        momentum = Momentum(eta or self.bench.config(run).momentum, 4 * self.bench.of(run)["r"])
        for step, delta in trained.snapshots:
            momentum.tick(delta)
            yield step, delta, dict(momentum.average)

    def momentum(self, run: Run) -> Record:
        """The forget model of one training at every η."""
        _, theirs = self.beside(run)
        trained = self.bench.train(run, snapshots=True)
        points = []
        for eta in ETAS:
            average = [average for _, _, average in self._averages(run, trained, eta)][-1]
            with trained.at(trained.strength, average) as model:
                points.append({"momentum": eta} | self.bench.ask(run, model, theirs))
        return {"points": points, "strength": trained.strength}

    def relearn(self, run: Run) -> Record:
        """What comes back when the forget model is trained on some forget rows, or on rows that are to stay.

        The forget model is at the strength nearest to the retrained model among those that keep the retain rows (where there is
        no retrained model, of most forgetting); the attacker's rows are not asked.
        """
        curve_run = Run("curve", run.method, run.settings, run.seed)
        at = at_level(self.runs.result(curve_run, self.compute)["points"], LEVEL)
        strength = (at.nearest or at.point)["strength"] if at else 0
        if strength == 0:
            return {"failed": f"no strength keeps the retain probability at {LEVEL}"}
        with self.runs.claim(curve_run):
            trained = self.bench.trained(curve_run)
        parts = self._attacked(run)
        questions = self.bench.questions(run, {part: parts[part] for part in ("forget", "retain")})
        points, pad = [], questions.tokenizer.pad_token_id or 0
        with trained.at(0) as model:
            knows = self.bench.ask(run, model, questions=questions)
        with trained.at(strength) as model:
            before = self.bench.ask(run, model, questions=questions)
            for what in ("attacker", "retain"):
                examples = [e for part in self.bench.questions(run, {what: parts[what]}).parts for e in part.answers]
                points.append({"rows": what, "step": 0} | before)
                with attacker(model, self.bench.of(run)["r"], run.seed):
                    for step in train(model, examples, RELEARN_STEPS, 1e-3, self.bench.of(run)["batch"], pad, run.seed):
                        points.append({"rows": what, "step": step} | self.bench.ask(run, model, questions=questions))
        return {"points": points, "reference": knows, "strength": strength}

    def _attacked(self, run: Run) -> dict[str, Path]:
        """Files of the forget rows that the attacker has, of those that are asked, and of the retain rows."""
        split = self.bench.split(run)
        rows = split.forget.read_text(encoding="utf-8").splitlines()
        chosen = set(random.Random(run.seed).sample(range(len(rows)), max(1, round(RELEARN_SHARE * len(rows)))))
        files = {"retain": split.asked["retain"]}
        for part, own in (("attacker", True), ("forget", False)):
            files[part] = self.runs.work(run) / f"{part}.jsonl"
            with replacing(files[part]) as partial:
                partial.write_text(
                    "".join(row + "\n" for i, row in enumerate(rows) if (i in chosen) == own), encoding="utf-8"
                )
        return files
