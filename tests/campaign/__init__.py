"""A fault campaign: breaks runs and files in many ways, and checks after each fault that nothing was lost.

`python -m tests.campaign --help` describes the program. Each module holds some rows of its table; `trials.py` describes
what a row is and what counts as survival.
"""
