"""The parser of a verb: --help shows the important flags, one per line, and --help-all shows every flag."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

# The group of --help that each class of settings belongs to; those of other classes are in the last one.
GROUPS = {
    "Data": ("Data", "Asked", "DepthConfig", "Columns", "Tokenisation"),
    "Model": ("ReferenceConfig", "ModelConfig", "Subject"),
    "Method": ("UnlearnConfig",),
    "Training": ("FitConfig",),
    "Attack": ("AttackConfig",),
    "Sweep": ("SweepConfig",),
    "Plan": ("PlanConfig",),
    "Scoring": ("ScoringConfig", "HarnessConfig", "ForgettingConfig"),
    "Output": ("RunConfig", "ShippingConfig", "RequestConfig", "MergeConfig", "GgufConfig", "PushConfig"),
}  # fmt: skip

# transformers' own settings that matter to most users, which --help shows among all those that it has.
TRAINING = (
    "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "save_strategy", "eval_strategy", "report_to", "use_cpu",
)  # fmt: skip

# Our own settings that few users need.
RARE = (
    "trust_remote_code", "shared_subspace", "attn_implementation", "steering", "rmu_layer", "whp_strength", "margin",
    "momentum_rank", "reference_cache_gb",
)  # fmt: skip

WIDTH, COLUMN = 120, 34


class Parser(HfArgumentParser):
    def __init__(self, kinds: Sequence[type], **kwargs: Any) -> None:
        super().__init__(kinds, formatter_class=_Defaults, allow_abbrev=False, **kwargs)
        self.add_argument("--help-all", action=_HelpAll, help="Show every flag, with its full text.")
        for action in self._actions:
            if action.dest == "prompt_template":
                action.type = with_line_breaks

    def format_help(self) -> str:
        lines = [*self.format_usage().splitlines(), "", self.description or ""]
        for title, actions in self._grouped():
            lines += ["", f"{title}:", *(_line(action) for action in actions)]
        return "\n".join([*lines, "", "--help-all shows every flag, with its full text.", ""])

    def _grouped(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
        group_of, hidden = dict.fromkeys(TRAINING, "Training"), {"help", argparse.SUPPRESS, *RARE}
        for kind in self.dataclass_types:
            group = next((title for title, kinds in GROUPS.items() if kind.__name__ in kinds), "Output")
            for field in dataclasses.fields(kind):
                if not issubclass(kind, TrainingArguments) or field.name not in of_transformers:
                    group_of[field.name] = group
                elif field.name not in TRAINING:
                    hidden.add(field.name)
        group_of |= dict.fromkeys(("out", "overwrite"), "Output")
        shown: dict[str, list[argparse.Action]] = {title: [] for title in GROUPS}
        for action in self._actions:
            if action.dest not in hidden and not any(flag.startswith("--no_") for flag in action.option_strings):
                shown[group_of.get(action.dest, "Output")].append(action)
        return ((title, actions) for title, actions in shown.items() if actions)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults as they are typed in a shell."""

    def _expand_help(self, action: argparse.Action) -> str:
        text, default = self._get_help_string(action) or "", typed(action.default)
        text = text if default else text.replace(" (default: %(default)s)", "")
        return text % (vars(action) | {"prog": self._prog, "default": default})


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(HfArgumentParser.format_help(parser), end="")
        parser.exit()


def _line(action: argparse.Action) -> str:
    """A flag, the first sentence of its help, and its default."""
    flag = action.option_strings[0] if action.option_strings else str(action.metavar)
    choices = list(action.choices or ())
    takes = f" {{{','.join(map(str, choices))}}}" if 0 < len(choices) < 5 else ""
    text, _, told = (action.help or "").partition("Default: ")
    default = typed(action.default) or told.rstrip(".")
    required = action.required and action.option_strings
    after = " (required)" if required else f" (default: {default})" if default and len(default) < 60 else ""
    text = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".; ")
    start = f"  {flag + takes:{COLUMN}} "
    room = WIDTH - len(start) - len(after)
    if len(text) > room:
        text = text[: room - 1].rsplit(" ", 1)[0].rstrip(",:;") + "…"
    return start + text + after


def typed(value: Any) -> str:
    """A value as it is typed after its flag in a shell; nothing where there is none."""
    if value is None or value is False or value is argparse.SUPPRESS:
        return ""
    if value is True:
        return "true"
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    return shlex.quote(str(getattr(value, "value", value)).replace("\n", r"\n"))


def with_line_breaks(text: str) -> str:
    r"""A text from a command line or a recipe, in which \n and \t are typed for a line break and a tab."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")
