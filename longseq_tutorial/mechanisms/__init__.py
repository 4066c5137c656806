"""The eight mechanisms of the course, one file each.

A mechanism file imports torch and nothing of ours but :mod:`~longseq_tutorial.mechanisms.fft` (long convolutions),
:mod:`~longseq_tutorial.mechanisms.blocks` (linear recurrences in blocks) and
:mod:`~longseq_tutorial.mechanisms.devices` (how much to work on at once), so each can be read alone beside its
notebook. Only VQ attention has two files: its keys get their names in
:mod:`~longseq_tutorial.mechanisms.vector_quantizer`.
"""
