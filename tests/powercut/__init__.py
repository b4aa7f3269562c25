"""Power cuts: a real flash in a virtual machine whose disk is recorded write by write, then every crash of it replayed.

guest.py makes the machine and records, wlog.py reads the record and says which states a cut may leave, replay.py mounts
them and judges, `python -m tests.powercut` does it all.
"""
