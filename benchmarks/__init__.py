"""What every mechanism costs: time, memory and growth with the length, beside what others offer.

`make bench` runs all of it, `make bench ONLY="ema s4d"` some of it, `make bench ONLY=targets` the table of targets. One
file, one job:

* `problems.py`: what a problem is: candidates that compute the same thing from the same numbers.
* `cases.py`: what is measured: our mechanisms and layers, and what PyTorch itself offers for the same.
* `peers.py`: other packages that offer the same, given our parameters. All optional.
* `measure.py`: how: all candidates in one process, in turn, round after round, on one thread.
* `limits.py`: what this machine can do at best, and how much work each mechanism cannot avoid.
* `targets.py`: how fast each mechanism has to be, at which size.
* `children.py`: one process a case, so that each starts clean.
* `report.py`: the tables, the JSON record, the plots.
"""
