"""Bundles that mean harm, or were damaged on their way, against the real installer on a real folder.

cases.py makes them out of a small signed bundle, trial.py has a device take them and says what it did that it must not,
`python -m tests.hostile --count 10000 --seed 1` runs as many as you like.
"""
