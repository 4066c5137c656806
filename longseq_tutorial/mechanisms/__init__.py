"""The eight mechanisms of the course, one file each.

A mechanism file imports torch and nothing of ours but :mod:`~longseq_tutorial.mechanisms.fft`, so each can be
read alone beside its notebook.
"""
