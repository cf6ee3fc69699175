"""Attacks on stores, runs, checkpoints, data and the command line, by the hundred: docs/reliability.md."""
