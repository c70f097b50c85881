"""The frontier of one adapter: every strength, and the rule that chooses one."""
