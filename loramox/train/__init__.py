"""Train the adapter's ΔW."""
