"""Builders: pure functions from sizes to a `Schedule`; `catalog` lists them for the command line."""
