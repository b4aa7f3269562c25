"""The enrolled agent as a process whose system calls fail or are its last, each that changes the disk once.

tests/unit/test_installer_faults.py does this to calls of Python's os module within one process; here strace does it to
the process, from outside.
"""
