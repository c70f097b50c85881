"""A ledger of unlearning requests, and one adapter for all in force."""
