"""The commands: one short function each, `Namespace -> exit code`. Nothing heavy is imported before it is needed.

common.py: what they share. plans.py: what would be built, and why. builds.py: making and keeping. setups.py: one training
setup, and this machine. asks.py: built variants, this installation. options.py: the words that each command takes.
"""
