"""How models read very long sequences: mechanisms, models, tasks and training, in files short enough to read.

Nothing is imported here, so that ``python -m longseq_tutorial.doctor`` runs even where torch does not. Take
what you need from its own home: ``from longseq_tutorial.mechanisms import ema``,
``from longseq_tutorial.models import build, record``, ``from longseq_tutorial.tasks import load``.
"""

import os

# Torch's threads wait for each other by spinning. Where other programs want the cores too, that makes two threads
# several times slower than one; asleep while they wait, they are not. Torch reads this when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
