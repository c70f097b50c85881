"""θ_mem → θ_for: turn the memorization adapter round."""

from loramox.extrapolate.negate import (
    ShippingConfig,
    check_shipping,
    check_strength,
    extrapolate,
    negate,
    served_base,
    shipped_dtype,
)

__all__ = [
    "ShippingConfig",
    "check_shipping",
    "check_strength",
    "extrapolate",
    "negate",
    "served_base",
    "shipped_dtype",
]
