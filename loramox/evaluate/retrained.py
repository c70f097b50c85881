"""A model trained without the forget rows, given as a model: checked before any weights are loaded."""

from dataclasses import replace
from typing import Any

from loramox.errors import SettingsError
from loramox.model.config import ModelConfig, identify, read_config, read_tokenizer


def check_retrained_model(
    given: str, model: ModelConfig, base: dict[str, Any]
) -> tuple[ModelConfig, dict[str, str | None]]:
    """How to load the retrained model, and what identifies it.

    Args:
        given: its folder or hub id.
        model: the model that knows the forget rows.
        base: what identifies that one.

    Raises:
        SettingsError: it is that very model, or has another tokenizer.
    """
    retrained = replace(model, model=given, revision=None)
    identity = identify(retrained, read_config(retrained, weights=True))
    if identity["weights"] is not None and identity["weights"] == base["weights"]:
        raise SettingsError(
            f"--retrained_model {given} is the model that knows the forget rows. Give one that was trained without them"
        )
    if read_tokenizer(retrained).get_vocab() != read_tokenizer(model).get_vocab():
        raise SettingsError(
            f"--retrained_model {given} has another tokenizer than --model, so that their answers are not comparable. Give the "
            "same model, trained without the forget rows"
        )
    return retrained, identity
