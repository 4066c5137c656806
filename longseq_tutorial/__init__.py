"""How models read very long sequences: mechanisms, models, tasks and training, in files short enough to read.

Nothing is imported here, so that ``python -m longseq_tutorial.doctor`` runs even where torch does not. Take
what you need from its own home: ``from longseq_tutorial.mechanisms import ema``,
``from longseq_tutorial.models import build, record``, ``from longseq_tutorial.tasks import load``.
"""

import os

# Torch's threads wait for each other by spinning. Where other programs want the cores too, that makes two threads
# many times slower than one. So they spin for a moment only, and then sleep. (GNU's OpenMP, which torch has on
# Linux, reads this when torch is first imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
