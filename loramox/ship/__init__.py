"""θ_for → users."""

from loramox.ship.switch import ForgetSwitch

__all__ = ["ForgetSwitch"]
