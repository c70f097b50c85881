"""The attack job: try to recover the forget rows, and record the scores. Records are as in `evaluate`, before and after."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from torch import nn

from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.errors import MissingExtraError, ModelError, NonFiniteLossError, SettingsError
from loramox.evaluate.attacks import asking, pair, relearn, requantize, sample
from loramox.evaluate.attacks.attacked import NEVER_KNOWN, AttackedRows
from loramox.evaluate.attacks.bench import RECORD, Asking, Bench
from loramox.evaluate.attacks.config import AttackConfig
from loramox.evaluate.measure import Record, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.files import remove
from loramox.model.config import ModelConfig
from loramox.model.fitting import ran_out_of_memory
from loramox.run import one_writer

__all__ = ["RECORD", "AttackConfig", "attack"]

log = logging.getLogger(__name__)

MERGED = ".merged"  # a model that is there during an attack; hidden, so that it is no one else's
NO_CONTROL = (
    "needs a model trained without the forget rows (--retrained_model), or rows of the same kind that no model has seen "
    "(--holdout). Without either it is not known how much of what comes back is guessing"
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

    Each state of the model (before, after so many steps, in so many bits) has its own folder of records. A state that is there is
    not made again, and attacks that are added to a folder join those in it. Forget rows that the attacker trains on are not
    among those asked, before or after. The controls that are given, retrained model and holdout rows, are attacked too.
    Raises a `LoramoxError` before the model is loaded.
    """
    if PartialState().num_processes > 1:
        raise SettingsError("attacks are made in one process: run it without torchrun or accelerate launch")
    bench = Bench(config, model, data, scoring or ScoringConfig(), tokenisation or Tokenisation(), columns or Columns())
    bench.open()
    reference, forget_model = (functools.partial(bench.adapted, bench.model, scale) for scale in (0.0, config.scale))
    asking.prepare(bench, bench.forget)
    asking.ask_all(bench, bench.forget, "reference model", reference)
    asking.ask_all(bench, bench.forget, "forget model", forget_model)
    _sample(bench, bench.forget, "forget model", forget_model)
    _pair(bench, bench.forget, read_records(bench.folder("none", "reference model")))
    _relearn(bench, bench.forget, forget_model)
    if bench.never:
        asking.prepare(bench, bench.never)
        asking.ask_all(bench, bench.never, NEVER_KNOWN, forget_model)
        _sample(bench, bench.never, NEVER_KNOWN, forget_model)
        _pair(bench, bench.never, bench.ask("none", f"adapter off, {NEVER_KNOWN}", reference, bench.never))
        _relearn(bench, bench.never, forget_model, f", {NEVER_KNOWN}")
    if "requantize" in bench.config.attacks:
        _requantize(bench)
    if bench.retrained:
        # With the adapter at scale 0 it is the retrained model, and the attacker's own adapter starts as on the forget model.
        retrained = functools.partial(bench.adapted, bench.retrained, 0.0)
        asking.ask_all(bench, bench.forget, "retrained model", retrained)
        _sample(bench, bench.forget, "retrained model", retrained)
        _relearn(bench, bench.forget, retrained, ", retrained model")
    if not (bench.retrained or bench.never):
        bench.absent["control"] = NO_CONTROL
    record = bench.close()
    for attack, saved in record["steps_saved"].items():
        log.info(relearn.sentence(attack, saved))
    return record


def _sample(bench: Bench, rows: AttackedRows, state: str, model: Asking) -> None:
    config, questions = bench.config, bench.to_answer("sample", rows)
    if questions is None:
        return
    records = bench.measured("sample", state, questions)
    if records is None:
        how = (config.sample_count, config.sample_temperature, config.sample_threshold, config.seed)
        with model() as asked:
            records = sample.sample(asked, questions, *how, f"sample, {state}")
    bench.keep("sample", state, records, sample.leakage(records), worst=sample.worst(records))


def _pair(bench: Bench, rows: AttackedRows, base: list[Record]) -> None:
    """What base and adapter together reveal that the base alone does not; `base` are its records of the rows."""
    config, questions = bench.config, bench.to_answer("pair", rows)
    if questions is None:
        return
    of = f", {rows.label}" if rows.label else ""

    def beside_base(records: list[Record]) -> None:
        metrics, bench.states[-1]["worst"] = pair.beyond_base(records, base)
        bench.states[-1]["metrics"] |= metrics

    for strength in config.guidance:
        state = f"guidance {strength:g}{of}"
        records = bench.measured("pair", state, questions)
        if records is None:
            model = bench.load(bench.model, adapted=True)
            records = pair.guided(model, questions, config.scale, strength, f"pair, {state}")
        bench.keep("pair", state, records, pair.summary(records))
        beside_base(records)
    flipped = functools.partial(bench.adapted, bench.model, -config.scale)
    beside_base(bench.ask("pair", f"sign flipped{of}", flipped, rows))


def _relearn(bench: Bench, rows: AttackedRows, model: Asking, of: str = "") -> None:
    config = bench.config
    if "relearn" not in config.attacks:
        return
    if relearn.TEXT not in rows.training:
        bench.absent["relearn unrelated text"] = relearn.NO_TEXT
    ways: dict[str, Callable[[PeftModel], AbstractContextManager[PeftModel]]]
    ways = {"": functools.partial(relearn.attacker, rank=config.relearn_rank, seed=config.seed)}
    if config.relearn_all_weights:
        ways[", all weights"] = relearn.all_weights
    states = [f"step {step}{of}" for step in config.relearn_steps]
    for (what, questions), (way, attacker), rate in itertools.product(
        rows.training.items(), ways.items(), config.relearn_rate
    ):
        attack = f"relearn {what}{way}" + (f", rate {rate:g}" if len(config.relearn_rate) > 1 else "")
        if all(bench.has(attack, state) for state in states):
            for state in states:
                bench.ask(attack, state, model, rows)
            continue
        examples = [example for part in questions.parts for example in part.answers]
        how = (config.relearn_steps, rate, config.relearn_batch, questions.tokenizer.pad_token_id or 0, config.seed)
        try:
            with model() as trained, attacker(trained):
                for step in relearn.train(trained, examples, *how):
                    bench.ask(attack, f"step {step}{of}", functools.partial(nullcontext, trained), rows)
        except NonFiniteLossError:  # such a model has lost the rows, which says nothing about forgetting
            lower = f"give a lower --relearn_rate than {rate:g}"
            bench.absent[f"{attack}{of}"] = f"training diverged by step {step}: {lower}"
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            bench.absent[f"{attack}{of}"] = f"needs more memory: {error}"


def _requantize(bench: Bench) -> None:
    """Round the adapter, the weights below it, and both merged, to few bits.

    The control is asked in NF4 and int8. A retrained model has no adapter, so it is the same merged or not.
    """
    folder = bench.out / MERGED
    unquantized = bench.model.quantization == "none"

    def ask(state: str, model: Asking) -> None:
        bench.ask("requantize", state, model)
        if bench.never:
            bench.ask("requantize", f"{state}, {NEVER_KNOWN}", model, bench.never)

    @contextmanager
    def rounded() -> Iterator[nn.Module]:
        with bench.adapted(bench.model, bench.config.scale) as model, requantize.rounded(model):
            yield model

    def merged(kind: str) -> AbstractContextManager[nn.Module]:
        requantize.merge(bench.merging, folder)
        model = replace(bench.model, model=str(folder), revision=None, quantization="none")
        if kind not in requantize.GGUF:
            return nullcontext(bench.load(replace(model, quantization=kind), adapted=False))
        file = requantize.to_gguf(folder, kind, bench.merging.code)
        try:
            return nullcontext(bench.load(model, adapted=False, gguf=file))
        except (ImportError, NotImplementedError, ValueError) as error:
            raise ModelError(f"transformers does not load it: {error}") from error

    remove(folder)  # of a run that was killed
    try:
        ask("adapter in 4 bits", rounded)
        if unquantized:
            ask("not quantized, merged", functools.partial(merged, "none"))
        for kind in ("nf4", "int8"):
            below = replace(bench.model, quantization=kind)
            ask(f"{kind}, not merged", functools.partial(bench.adapted, below, bench.config.scale))
            ask(f"{kind}, merged first", functools.partial(merged, kind))
        for kind in requantize.GGUF:
            if not unquantized:
                bench.absent[f"requantize: {kind}"] = requantize.NOT_IN_4_BITS
                continue
            try:
                ask(f"{kind}, merged first", functools.partial(merged, kind))
            except (MissingExtraError, ModelError) as error:
                bench.absent[f"requantize: {kind}"] = str(error)
    finally:
        remove(folder)
    if bench.retrained:
        for kind, how in itertools.product(("nf4", "int8"), ("not merged", "merged first")):
            few_bits = replace(bench.retrained, quantization=kind)
            bench.ask("requantize", f"{kind}, {how}, retrained model", functools.partial(bench.adapted, few_bits, 0.0))
