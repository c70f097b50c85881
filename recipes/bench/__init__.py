"""What the work costs: each recipe prints what it measured, on what, beside a peer in the same run."""
