"""The frozen reference model and the LoRA adapter on it."""
