"""θ_mem → θ_for: turn the memorization adapter round."""

from loramox.extrapolate.negate import ShippingConfig, check_shipping, check_strength, extrapolate, negate

__all__ = ["ShippingConfig", "check_shipping", "check_strength", "extrapolate", "negate"]
