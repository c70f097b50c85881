"""OpenUnlearning's own code, called from a checkout of github.com/locuslab/open-unlearning.

It needs omegaconf and scikit-learn.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

CONTEXT = 4096
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference")
ASKED = {  # loramox's part → OpenUnlearning's metric and data set, and the part's file
    "verbmem": ("forget_verbmem_ROUGE", "MUSE_forget_verbmem", "verbmem/forget"),
    "knowmem_forget": ("forget_knowmem_ROUGE", "MUSE_forget_knowmem", "knowmem/forget_qa"),
    "knowmem_retain": ("retain_knowmem_ROUGE", "MUSE_retain_knowmem", "knowmem/retain2_qa"),
}


def imported(checkout: Path) -> SimpleNamespace:
    """Its metric functions, data sets and collator. Its package also imports lm_eval, for a benchmark that is not run here: an
    empty stand-in takes its place.
    """
    sys.path.insert(0, str(checkout / "src"))
    sys.modules |= {f"lm_eval{part}": MagicMock() for part in ("", ".models", ".models.hf_vlms", ".tasks")}
    from data.collators import DataCollatorForSupervisedDataset
    from data.pretraining import CompletionDataset
    from data.qa import QADataset
    from evals.metrics import METRICS_REGISTRY
    from omegaconf import OmegaConf

    return SimpleNamespace(
        metrics=METRICS_REGISTRY, QADataset=QADataset, CompletionDataset=CompletionDataset,
        Collator=DataCollatorForSupervisedDataset, OmegaConf=OmegaConf,
    )  # fmt: skip


def trainers(checkout: Path) -> dict[str, type]:
    """Its trainers, by our names. They import deepspeed, which nothing here calls: an empty stand-in takes its place."""
    sys.path.insert(0, str(checkout / "src"))
    sys.modules["deepspeed"] = module_from_spec(ModuleSpec("deepspeed", None))
    from trainer.unlearn.dpo import DPO
    from trainer.unlearn.grad_ascent import GradAscent
    from trainer.unlearn.grad_diff import GradDiff
    from trainer.unlearn.npo import NPO
    from trainer.unlearn.simnpo import SimNPO

    return {"ga": GradAscent, "graddiff": GradDiff, "npo": NPO, "simnpo": SimNPO, "dpo": DPO}


class Muse:
    """Its MUSE metrics on the rows of a folder, under loramox's names.

    `space_in_answer` puts the space before an answer to the answer, as loramox does; else the prompt ends in it, as theirs does.
    """

    def __init__(self, checkout: Path, tokenizer, muse: Path, space_in_answer: bool = True) -> None:
        self.tokenizer, self.checkout, self.muse = tokenizer, checkout, muse
        self.their = imported(checkout)
        self.cache = tempfile.TemporaryDirectory()
        self.template = dict(self._config("model/Llama-2-7b-hf").template_args)
        self.space = " " if space_in_answer else ""
        if space_in_answer:
            self.template["asst_start_tag"] = self.template["asst_start_tag"].rstrip()

    def _config(self, name: str) -> Any:
        return self.their.OmegaConf.load(self.checkout / "configs" / f"{name}.yaml")

    def _source(self, name: str) -> dict[str, Any]:
        """What `datasets` needs to read one of MUSE's files."""
        records = json.loads((self.muse / f"{name}.json").read_text())
        records = [{"text": r} if isinstance(r, str) else r for r in records]
        if name.startswith("knowmem"):
            records = [r | {"answer": self.space + r["answer"]} for r in records]
        copy = Path(self.cache.name) / f"{name.replace('/', '_')}.jsonl"
        copy.write_text("".join(json.dumps(r) + "\n" for r in records))
        return {"path": "json", "data_files": str(copy), "split": "train", "cache_dir": self.cache.name}

    def _data(self, name: str, file: str, **more: Any) -> Any:
        config = self._config(f"data/datasets/{'MUSE_MIA' if 'MIA' in name else name}")[name]
        given = {key: value for key, value in config.args.items() if not key.endswith("hf_args")} | more
        if "few_shot_dataset_hf_args" in config.args:
            # With theirs of 512, a tokenizer of few words would cut the question off.
            given |= {"few_shot_dataset_hf_args": self._source(f"{file}_icl"), "max_length": CONTEXT}
        data = getattr(self.their, config.handler)(self._source(file), self.template, self.tokenizer, **given)
        if getattr(data, "fs_data", None):  # a column of the `datasets` that they pin is a list, one of today's is not
            data.fs_data = {key: list(column) for key, column in data.fs_data.items()}
        return data

    def rows(self, part: str) -> Iterator[dict[str, Any]]:
        """The tokens and labels of one part's rows, as they are scored."""
        name, file = ASKED[part][1:] if part in ASKED else (f"MUSE_MIA_{part}", f"privleak/{part}")
        data = self._data(name, file)
        return (data[i] for i in range(len(data)))

    def _run(self, name: str, model, settings, side: str = "right", **given: Any) -> dict[str, Any]:
        given |= {"collators": self.their.Collator(self.tokenizer, side, "index"), "tokenizer": self.tokenizer}
        given |= {"batch_size": settings.batch_size}
        with contextlib.redirect_stdout(io.StringIO()):
            return self.their.metrics[name].evaluate_metric(model, name, **given)

    def asked(self, model, part: str) -> tuple[dict[str, float], list[str]]:
        """ROUGE of one part, and what the model said, row by row."""
        metric, name, file = ASKED[part]
        settings = self._config(f"eval/muse_metrics/{metric}")
        greedy = self.their.OmegaConf.merge(self._config("generation/default"), settings.generation_args)
        side = settings.collators.DataCollatorForSupervisedDataset.args.padding_side
        data = self._data(name, file, predict_with_generate=True)
        said = self._run(
            "rouge", model, settings, side, data=data, generation_args=greedy, rouge_type=settings.rouge_type
        )
        rows = [said["value_by_index"][i] for i in range(len(data))]
        recall = float(np.mean([row["rougeL_recall"] for row in rows]))
        return {f"{part}_rouge_l": recall, f"{part}_rouge_l_f1": said["agg_value"]}, [row["generation"] for row in rows]

    def everything(self, model, retrained: Path, their_clean: dict[str, float] | None) -> tuple[dict[str, float], dict]:
        """All metrics, and what the model said. `their_clean` has this function's metrics of the retrained model."""
        found: dict[str, float] = {}
        said = {}
        for part in ASKED:
            values, said[part] = self.asked(model, part)
            found |= values
        for name in ("extraction_strength", "exact_memorization"):
            data = self._data("MUSE_forget_verbmem", "verbmem/forget")
            settings = self._config(f"eval/muse_metrics/{name}")
            found[f"verbmem_{name}"] = self._run(name, model, settings, data=data)["agg_value"]
        texts = {part: self._data(f"MUSE_MIA_{part}", f"privleak/{part}") for part in ("forget", "holdout")}
        for name in ATTACKS:
            settings = self._config(f"eval/muse_metrics/{name}")
            more = {"k": settings.get("k"), "reference_model_path": str(retrained)}
            found[name] = self._run(name, model, settings, data=texts, **more)["agg_value"]
        clean = their_clean or found
        logs = {"retain_model_logs": {"retain": {"agg_value": clean["mia_min_k"]}}}
        given = {"pre_compute": {"forget": {"agg_value": found["mia_min_k"]}}, "reference_logs": logs}
        found["priv_leak"] = self.their.metrics["privleak"].evaluate_metric(model, "privleak", **given)["agg_value"]
        return found, said
