"""What a run will take, before any weights are loaded: memory and time of every way to run it, and the fastest that fits."""

from loramox.plan.config import FitConfig, PlanConfig
from loramox.plan.job import Plan, fit, plan

__all__ = ["FitConfig", "Plan", "PlanConfig", "fit", "plan"]
