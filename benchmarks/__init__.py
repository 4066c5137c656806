"""What every mechanism costs: time, memory and growth with the length, beside what PyTorch itself offers.

`make bench` runs all of it, `make bench ONLY="ema s4d"` some of it. Three files, one job each:

* `cases.py`: what is measured. Each case builds one or more candidates that compute the same thing.
* `measure.py`: how. All candidates in one process, in turn, round after round, on one thread.
* `report.py`: the table, the JSON record, the plot.
"""
