"""Figures of the service, each taken beside what it is compared with, in turns within one run, and with its spread.

`python -m bench`, or `make bench`. One file has one subject; `__main__.py` says what can be asked for.
"""
