"""Attacking as one job: what comes back of the forget rows when somebody tries. Records as in evaluating, before and after."""

import functools
import gc
import itertools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from torch import nn

from loramox.adapter.loading import put_on
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.errors import NonFiniteLossError, SettingsError
from loramox.evaluate.attacks import asking, pair, relearn, requantize, sample
from loramox.evaluate.attacks.bench import NO_QUESTIONS, RECORD, Bench
from loramox.evaluate.attacks.config import AttackConfig
from loramox.evaluate.measure import Record, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.model.config import ModelConfig
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.run import one_writer

__all__ = ["RECORD", "AttackConfig", "attack"]

log = logging.getLogger(__name__)

NO_CONTROL = (
    "needs a model trained without the forget rows (--retrained_model). Without one it is not known how much of what "
    "comes back is guessing"
)


@one_writer
def attack(
    config: AttackConfig,
    model: ModelConfig,
    data: Data,
    scoring: ScoringConfig | None = None,
    tokenisation: Tokenisation | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Attack the forget model with everything in `config.attacks`; write `config.out`, return what attacks.json holds.

    Each state of the model (before, after so many steps, in so many bits) has its own folder of records. Forget rows that
    the attacker trains on are not among those asked, before or after. Raises a `LoramoxError` before the model is loaded.
    """
    if PartialState().num_processes > 1:
        raise SettingsError("attacks are made in one process: run it without torchrun or accelerate launch")
    tokenisation, columns = tokenisation or Tokenisation(), columns or Columns()
    bench = Bench(config, model, data, scoring or ScoringConfig(), tokenisation, columns)
    bench.open()
    with bench:
        _before_and_asked(bench)
        if "sample" in config.attacks:
            _sample(bench)
        if "pair" in config.attacks:
            _pair(bench)
        if "relearn" in config.attacks:
            _relearn(bench, bench.forget_model, config.scale)
        if "requantize" in config.attacks:
            _requantize(bench)
        _control(bench)
    return bench.close()


def _before_and_asked(bench: Bench) -> None:
    asking.prepare(bench)
    for state, scale in (("reference model", 0.0), ("forget model", bench.config.scale)):
        model = None if asking.done(bench, state) else bench.forget_model()
        with at_scale(model, scale) if model else nullcontext():
            asking.ask_all(bench, state, model)


def _sample(bench: Bench, state: str = "forget model", model: nn.Module | None = None) -> None:
    """Sample answers of the forget model, or of another `model`."""
    config, questions = bench.config, bench.open_questions
    if questions is None:
        bench.absent["sample"] = NO_QUESTIONS
        return

    def sampling() -> list[Record]:
        asked = model or bench.forget_model()
        with nullcontext() if model else at_scale(asked, config.scale):
            return sample.sample(
                asked, questions, config.sample_count, config.sample_temperature, config.sample_threshold, config.seed,
                f"sample, {state}",
            )  # fmt: skip

    records = bench.keep("sample", state, questions, sampling, sample.leakage)
    bench.states[-1]["worst"] = sample.worst(records)


def _pair(bench: Bench) -> None:
    """What base and adapter together reveal that the base alone does not."""
    config, questions = bench.config, bench.open_questions
    if questions is None:
        bench.absent["pair"] = NO_QUESTIONS
        return
    base = read_records(bench.folder("none", "reference model"))

    def beside_base(records: list[Record]) -> None:
        metrics, bench.states[-1]["worst"] = pair.beyond_base(records, base)
        bench.states[-1]["metrics"] |= metrics

    def guided(strength: float) -> list[Record]:
        return pair.guided(bench.forget_model(), questions, config.scale, strength, f"pair, guidance {strength:g}")

    for strength in config.guidance:
        answering = functools.partial(guided, strength)
        beside_base(bench.keep("pair", f"guidance {strength:g}", questions, answering, pair.summary))
    model = None if bench.asked_already("pair", "sign flipped") else bench.forget_model()
    with at_scale(model, -config.scale) if model else nullcontext():
        beside_base(bench.ask("pair", "sign flipped", model))


def _control(bench: Bench) -> None:
    """Ask and sample the retrained model as the forget model was, or name the control as absent."""
    if bench.retrained is None:
        bench.absent["control"] = NO_CONTROL
        return
    bench.adapted = None  # one model at a time
    state = "retrained model"
    there = asking.done(bench, state)
    if "sample" in bench.config.attacks and bench.open_questions:
        there = there and bench.asked_already("sample", state)
    model = None if there else load_reference(bench.retrained, bench.device)
    asking.ask_all(bench, state, model)
    if "sample" in bench.config.attacks:
        _sample(bench, state, model)
    if "relearn" in bench.config.attacks:
        # With the adapter at scale 0 it is the retrained model, and the attacker's own adapter starts as on the forget model.
        adapted = functools.cache(
            lambda: put_on(model or load_reference(bench.retrained, bench.device), bench.config.adapter)
        )
        _relearn(bench, adapted, 0.0, f", {state}")
        for attack, saved in relearn.saved(bench.states).items():
            log.info(relearn.sentence(attack, saved))


def _relearn(bench: Bench, load: Callable[[], PeftModel], scale: float, of: str = "") -> None:
    """Train the model that `load` returns, its adapter at `scale`, on each set of the attacker's rows at each rate."""
    config = bench.config
    if relearn.TEXT not in bench.training:
        bench.absent["relearn unrelated text"] = relearn.NO_TEXT
    for (what, questions), rate in itertools.product(bench.training.items(), config.relearn_rate):
        attack = f"relearn {what}" + (f", rate {rate:g}" if len(config.relearn_rate) > 1 else "")
        states = [f"step {step}{of}" for step in config.relearn_steps]
        if bench.asked_already(attack, *states):
            for state in states:
                bench.ask(attack, state, None)
            continue
        model = load()
        examples = [example for part in questions.parts for example in part.answers]
        pad = questions.tokenizer.pad_token_id or 0
        with at_scale(model, scale), relearn.attacker(model, config.relearn_rank, config.seed):
            for step in relearn.train(
                model, examples, config.relearn_steps, rate, config.relearn_batch, pad, config.seed
            ):
                try:
                    bench.ask(attack, f"step {step}{of}", model)
                except NonFiniteLossError:  # such a model has lost the rows, which says nothing about forgetting
                    lower = f"give a lower --relearn_rate than {rate:g}"
                    bench.absent[f"{attack}{of}"] = f"training diverged by step {step}: {lower}"
                    break


def _requantize(bench: Bench) -> None:
    config, merged = bench.config, bench.out / "merged"
    bench.adapted = None  # one model at a time
    after_merging = {"nf4": "nf4, merged first", "int8": "int8, merged first"}
    if bench.model.quantization == "none":
        after_merging = {"none": "not quantized, merged"} | after_merging
    else:  # a device that holds the model quantized may not hold it otherwise
        log.info("The merged model is not asked before it is quantized. With --quantization none it is")
    if not bench.asked_already("requantize", *after_merging.values()):
        requantize.merge(bench.merging, merged)
    for kind, state in after_merging.items():
        if kind != "none":
            _ask_loaded(bench, f"{kind}, not merged", functools.partial(_unmerged, bench, kind), config.scale)
        _ask_loaded(bench, state, functools.partial(requantize.requantized, bench.model, merged, kind, bench.device))


def _ask_loaded(bench: Bench, state: str, load: Callable[[], nn.Module], scale: float = 1.0) -> None:
    """Score a state whose model is loaded for it alone, unless it is scored already; an adapter on it is at `scale`."""
    model = None if bench.asked_already("requantize", state) else load()
    with at_scale(model, scale) if model else nullcontext():
        bench.ask("requantize", state, model)
    del model
    gc.collect()  # modules refer to each other, and the next one must find room


def _unmerged(bench: Bench, kind: str) -> nn.Module:
    """The adapter on the base model quantized as `kind`."""
    base = load_reference(replace(bench.model, quantization=kind), bench.device)
    return put_on(base, bench.config.adapter)
