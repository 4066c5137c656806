"""The eight mechanisms of the course, one file each.

A mechanism file imports torch and nothing of ours but :mod:`~longseq_tutorial.mechanisms.fft` (long convolutions) and
:mod:`~longseq_tutorial.mechanisms.blocks` (linear recurrences in blocks), so each can be read alone beside its
notebook.
"""
