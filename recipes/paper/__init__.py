"""The MOX paper's tables and figures, on a small model or any other: see README.md."""
