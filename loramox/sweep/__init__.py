"""The sweep: score one trained adapter at many alphas or scales, and choose one by a rule."""
