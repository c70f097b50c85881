"""The settings of `loramox attack`."""

import math
import warnings
from dataclasses import dataclass

from loramox.errors import SettingsError
from loramox.settings import refuse, setting

ATTACKS = ("relearn", "requantize", "forms", "context", "sample", "pair")
QUICK_ROWS = 20


@dataclass
class AttackConfig:
    """The adapter to attack, and how."""

    adapter: str = setting("Folder of the forget adapter.")
    out: str = setting("Folder to write. Attacks that are finished there are not repeated.")
    attacks: list[str] = setting(
        "Which attacks to run. relearn: train on some forget rows, and on retain rows. requantize: adapter in 4 bits; merge, then 4 and 8 "
        "bits, GGUF too. forms: the question in other words and languages, or with some of the answer given away. context: after other rows "
        "and their answers. sample: many answers at a temperature. pair: guidance away from the forget model, and the adapter with its sign "
        "flipped. The last four need --max_new_tokens above 0.",
        factory=lambda: list(ATTACKS),
    )
    quick: bool = setting(
        f"A first look: score at most {QUICK_ROWS} forget rows and {QUICK_ROWS} retain rows, spread over their files. Too few to compare methods.",
        False,
    )
    scale: float = setting("Scale of the adapter: 1 is as shipped. Not --alpha.", 1.0)
    retrained_model: str | None = setting(
        "Folder or hub id of a model trained without the forget rows: the control, which is attacked in the same way.",
        None,
    )
    holdout: str | None = setting(
        "Rows like the forget rows that no model has seen: the control if there is no retrained model. The forget model is attacked with them in the same way.",
        None,
    )
    relearn_steps: list[int] = setting(
        "Steps of relearning after which the rows are scored.", factory=lambda: [1, 2, 5, 10, 20]
    )
    relearn_share: float = setting("Share of the forget rows that the attacker has; the others are scored.", 0.2)
    relearn_rate: list[float] = setting(
        "Learning rates of relearning, AdamW on a fresh LoRA adapter: one attack for each.", factory=lambda: [1e-3]
    )
    relearn_text: str | None = setting(
        "Unrelated text to relearn on as well: a .txt file of lines, or any file of rows.", None
    )
    relearn_all_weights: bool = setting(
        "Relearn once more with all weights, as if the adapter were merged: 20 bytes of memory per weight. Needs --quantization none.",
        False,
    )
    relearn_rank: int = setting("Rank of the LoRA adapter that relearns.", 16)
    relearn_batch: int = setting("Rows per step of relearning.", 8)
    sample_count: int = setting("Answers sampled per forget question.", 16)
    sample_temperature: float = setting("Temperature of the sampled answers.", 1.0)
    sample_threshold: float = setting(
        "Least ROUGE-L recall, or share of the key words, with which an answer (sampled, or to a form or context) is a leak.",
        0.8,
    )
    guidance: list[float] = setting(
        "pair: strengths γ of the guidance. The logits are base + γ·(base − forget model).",
        factory=lambda: [0.5, 1.0, 2.0],
    )
    seed: int = setting(
        "Seed of the attacker's rows, the training, the sampled answers, and the retain rows put before a question.", 0
    )

    def __post_init__(self) -> None:
        if "ask" in self.attacks:
            warnings.warn("--attacks ask is now forms, and will be refused in the next version", stacklevel=2)
            self.attacks = list(dict.fromkeys("forms" if name == "ask" else name for name in self.attacks))
        unknown = set(self.attacks) - set(ATTACKS)
        if unknown or not self.attacks:
            raise SettingsError(f"attacks are {self.attacks}; --attacks takes {', '.join(ATTACKS)}")
        refuse("relearn_share", self.relearn_share, 0 < self.relearn_share < 1, "a share between 0 and 1")
        fine = 0 < self.sample_threshold <= 1
        refuse("sample_threshold", self.sample_threshold, fine, "a share above 0, at most 1")
        for name in ("relearn_rank", "relearn_batch", "sample_count", "sample_temperature", "scale"):
            refuse(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        fine = bool(self.relearn_steps) and min(self.relearn_steps) >= 1
        refuse("relearn_steps", self.relearn_steps, fine, "numbers of 1 or more")
        for name in ("relearn_rate", "guidance"):
            values = getattr(self, name)
            fine = bool(values) and all(0 < value < math.inf for value in values)
            refuse(name, values, fine, "numbers above 0")
