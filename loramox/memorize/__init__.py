"""θ_ref → θ_mem = θ_ref + ΔW: train the adapter on the forget rows, with the rest held in place."""

from loramox.memorize.baseline_config import BaselineConfig
from loramox.memorize.baseline_trainer import BaselineTrainer
from loramox.memorize.config import MemorizeConfig
from loramox.memorize.earlier import Earlier
from loramox.memorize.job import FOLDER, memorize
from loramox.memorize.trainer import MemorizeTrainer

__all__ = ["FOLDER", "BaselineConfig", "BaselineTrainer", "Earlier", "MemorizeConfig", "MemorizeTrainer", "memorize"]
