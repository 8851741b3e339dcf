"""Converters, and ways to talk to a model; python -m tools.NAME --help describes each."""
