"""Benchmark files: what to train, import, attack, certify, corrupt and audit, and what to write, in one TOML file.

The room stands on the command line: a job is one of its commands with its options, so that what a file makes is what the
commands make, under the same names and keys.
"""
