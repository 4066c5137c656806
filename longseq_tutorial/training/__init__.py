"""Training: recipes, the loop, checkpoints, records. The command line is `longseq_tutorial.train`."""

from .checkpoint import CheckpointError
from .diagnose import NonFiniteError
from .loop import Unfinished, evaluate, fit
from .recipe import Recipe, RecipeError
from .recipes import RECIPES, get
from .records import Record, RecordError, load_run, read_record

__all__ = [
    "RECIPES",
    "CheckpointError",
    "NonFiniteError",
    "Recipe",
    "RecipeError",
    "Record",
    "RecordError",
    "Unfinished",
    "evaluate",
    "fit",
    "get",
    "load_run",
    "read_record",
]
