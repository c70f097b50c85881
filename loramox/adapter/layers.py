"""Find the layers that an adapter's config names, with rank and scale: matched as in PEFT, but in bounded time.

The config may be a stranger's, and its regular expressions may be made to run for ever. They are therefore matched here, by a
library that can stop, and PEFT gets a config in which they are replaced by the layers' names.
"""

import copy
import math
import re
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import regex
from peft import LoraConfig

from loramox.adapter.folder import CONFIG, WEIGHTS
from loramox.errors import AdapterError

SECONDS = 2.0  # for all patterns and layers of an adapter
ALL = "all-linear"
LONGEST = 1000  # pattern; compiling one takes time too


class Layers:
    """The layers of a `LoraConfig`, by their names in the base model.

    Raises `AdapterError`, here and in its methods, for settings of wrong types and for patterns that take too long.
    """

    def __init__(self, config: LoraConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._until = time.monotonic() + SECONDS
        self._check_types()

    def named(self, layer: str) -> bool:
        """Whether PEFT adapts a layer of this name, as `check_target_module_exists` in PEFT has it."""
        config = self.config
        if config.exclude_modules and self._in(config.exclude_modules, layer):
            return False
        targets = config.target_modules
        if isinstance(targets, str):
            # ALL leaves out the output head, which only the base model tells.
            return targets.lower() == ALL or self._in(targets, layer)
        return layer in targets or (self._in(targets, layer) and self._transformed(layer))

    def check_named(self, layers: Iterable[str]) -> None:
        """Raises `AdapterError` for one of the layers in the folder's weights that the config leaves out."""
        if out := next((layer for layer in layers if not self.named(layer)), None):
            raise AdapterError(
                f"{self.folder}: {CONFIG} leaves out {out} (target_modules, exclude_modules, layers_to_transform), and {WEIGHTS} has it. The "
                "two files do not belong together: save the adapter again"
            )

    def rank_and_alpha(self, layer: str) -> tuple[int, float]:
        """The rank and the lora_alpha of a layer: those of the first pattern that matches its name, or the adapter's.

        PEFT sorts patterns when it saves: where two match, training may have taken the other.
        """
        ranks, alphas = self.config.rank_pattern, self.config.alpha_pattern
        rank = next((value for key, value in ranks.items() if self._is_key(key, layer)), self.config.r)
        return rank, next((value for key, value in alphas.items() if self._is_key(key, layer)), self.config.lora_alpha)

    def pinned(self, layers: Iterable[str]) -> LoraConfig:
        """The config with each of these layers by its name, and without any pattern of the adapter's."""
        pinned = copy.copy(self.config)
        pinned.target_modules = set(layers)
        pinned.exclude_modules = pinned.layers_to_transform = pinned.layers_pattern = None
        own = {f"^{re.escape(layer)}": self.rank_and_alpha(layer) for layer in pinned.target_modules}
        pinned.rank_pattern = {key: rank for key, (rank, _) in own.items() if rank != pinned.r}
        pinned.alpha_pattern = {key: alpha for key, (_, alpha) in own.items() if alpha != pinned.lora_alpha}
        return pinned

    def _transformed(self, layer: str) -> bool:
        """Whether layers_to_transform has the number of the block that the layer is in."""
        numbers, patterns = _listed(self.config.layers_to_transform), _listed(self.config.layers_pattern or None)
        if not numbers:
            return True
        of_block = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
        matches = (self._search(each, layer) for each in of_block or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        found = next(filter(None, matches), None)
        return found is not None and int(found["idx"]) in numbers

    def _in(self, wanted: str | Collection[str], layer: str) -> bool:
        if isinstance(wanted, str):
            return self._search(wanted, layer, regex.fullmatch) is not None
        return layer in wanted or any(layer.endswith(f".{each}") for each in wanted)

    def _is_key(self, key: str, layer: str) -> bool:
        return self._search(rf"(.*\.)?({key})$", layer) is not None

    def _search(self, pattern: str, layer: str, how: Callable[..., Any] = regex.match) -> Any:
        """A match of the pattern with the name, found within the time that is left for this adapter."""
        try:
            return how(pattern, layer, timeout=max(self._until - time.monotonic(), 1e-3))
        except TimeoutError as error:
            raise AdapterError(
                f"{self.folder}: matching the patterns of its adapter_config.json takes more than {SECONDS:g} seconds (last: {pattern[:100]}). "
                "Write the layers' names there as a list"
            ) from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{self.folder}: its adapter_config.json is damaged: {pattern[:100]} is no regular expression ({error})"
            ) from error

    def _check_types(self) -> None:
        config = self.config
        settings = (config.target_modules, config.exclude_modules, config.layers_pattern)
        texts = [text for setting in settings for text in _listed(setting or None)]
        sound = all(isinstance(text, str) and 0 < len(text) <= LONGEST for text in texts)
        sound = sound and all(type(number) is int for number in _listed(config.layers_to_transform))
        if not sound or not config.target_modules:
            raise AdapterError(
                f"{self.folder}: target_modules, exclude_modules, layers_to_transform or layers_pattern of its adapter_config.json is no list "
                "of layers. Save the adapter again"
            )
        self._check_scales()

    def _check_scales(self) -> None:
        config = self.config
        try:
            ranks = [config.r, *config.rank_pattern.values()]
            alphas = [config.lora_alpha, *config.alpha_pattern.values()]
            sound = all(type(rank) is int and rank > 0 for rank in ranks)
            sound = sound and all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas)
            for pattern in (*config.rank_pattern, *config.alpha_pattern):
                sound = sound and len(pattern) <= LONGEST
                re.compile(pattern)
        except (AttributeError, TypeError, OverflowError, RecursionError, re.error):
            sound = False
        if not sound:
            raise AdapterError(
                f"{self.folder / 'adapter_config.json'}: r, lora_alpha, rank_pattern or alpha_pattern is damaged, so that the scale of its layers "
                "is not known. Save the adapter again"
            )


def _listed(setting: Any) -> list[Any]:
    """The values of a setting that PEFT takes as none, one, or several."""
    if setting is None:
        return []
    return list(setting) if isinstance(setting, list | set) else [setting]
