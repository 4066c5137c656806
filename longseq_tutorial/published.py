"""Published test accuracies, as data: what our own results are held against, and what the notebooks print and draw.

Only figures that were checked against a text stand here; what we merely remember, or could not find, does not.
`lookup(task, model)` gives a row, `why_unknown(model, task)` the reason where there is none. `differences(...)` says
in what the data of a run are not those of the published figures: where it says anything, a gap means little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType, MappingProxyType

__all__ = [
    "BENCHMARKS", "COSTS", "ROWS", "Benchmark", "Cost", "Row", "benchmark", "differences", "lookup", "mean", "models",
    "table", "why_unknown",
]  # fmt: skip

# Of the published training sequences: a run on fewer is no repetition; one that holds some out for validation is.
ENOUGH = 0.8


@dataclass(frozen=True)
class Row:
    """One published figure."""

    task: str  # a key of BENCHMARKS
    model: str  # a name of models.build, else the name that the paper uses
    accuracy: float | None  # test accuracy in percent; None: reported as failed (chance, or out of memory)
    source: str  # paper and table
    note: str = ""  # what a reader should know before comparing


@dataclass(frozen=True)
class Cost:
    """What training on Text at length 4,000 costs, relative to the Transformer of the same paper."""

    model: str
    speed: float  # updates a second; 2 is twice as fast
    memory: float  # peak; 0.5 is half of it
    source: str


@dataclass(frozen=True)
class Benchmark:
    """A published task: what the figures were measured on."""

    title: str  # as papers head their columns
    classes: int
    length: int  # longest sequence, in tokens, pixels or samples
    train: int  # training sequences
    data: str  # in words
    genuine: str  # pattern of the TaskConfig.source of data that are the same, or made by the same rule

    @property
    def chance(self) -> float:
        """Percent right of a model that guesses evenly; always naming the commonest class can be better."""
        return 100 / self.classes


_MADE = r", seed \d+ \(made by this project\)"
_HARD = r", the official Long Range Arena files \(curv_contour_length_14\)(, \d+ empty pictures left out)?"
_RULE = rf" by the Long Range Arena's rule{_MADE}"

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "listops": Benchmark(
            "ListOps",
            10,
            2_000,
            96_000,
            "expressions of 500 to 2,000 tokens, nested to depth 10",
            rf"ListOps(, the official Long Range Arena files|{_RULE})",
        ),
        "text": Benchmark(
            "Text", 2, 4_000, 25_000, "IMDB reviews of up to 4,000 bytes", r"IMDB reviews, official split, .*"
        ),
        "retrieval": Benchmark(
            "Retrieval",
            2,
            4_000,
            147_086,
            "pairs of papers of the ACL Anthology Network, up to 4,000 bytes each",
            r"ACL Anthology Network, the official Long Range Arena pairs, first .*",
        ),
        "image": Benchmark(
            "Image", 10, 1_024, 45_000, "CIFAR-10 in grey, pixel by pixel", r"CIFAR-10 \(official data\), grey, .*"
        ),
        "pathfinder": Benchmark(
            "Pathfinder", 2, 1_024, 160_000, "the hard set at 32 x 32 pixels", rf"Pathfinder-32({_RULE}|{_HARD})"
        ),
        "pathx": Benchmark(
            "Path-X",
            2,
            16_384,
            160_000,
            "the hard set at 128 x 128 pixels",
            rf"Path-X \(Pathfinder-128\)({_RULE}|{_HARD})",
        ),
        "speech-sc10": Benchmark(
            "SC10",
            10,
            16_000,
            24_482,
            "Speech Commands, ten words, clips of exactly a second at 16 kHz, split at random",
            r"Speech Commands v0\.02, 10 words, random 70 : 15 : 15 split, seed \d+, not by speaker",
        ),
        "speech-sc35": Benchmark(
            "SC35",
            35,
            16_000,
            84_843,
            "Speech Commands, all 35 words at 16 kHz, official split by speaker",
            r"Speech Commands v0\.02, 35 words, official (lists|rule), by speaker",
        ),
    }
)
ARENA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")  # the columns below

_MEGA = "Mega paper (Ma et al., ICLR 2023, arXiv 2209.10655), Table 2"
_SPEECH = "Mega paper (Ma et al., ICLR 2023, arXiv 2209.10655), raw Speech Commands"
_LIQUID = "Liquid-S4 paper (Hasani et al., ICLR 2023, arXiv 2209.12951), Table 1"
_S4D = f"S4D paper (Gu et al., NeurIPS 2022), as quoted in the {_LIQUID}"
_TAY = f"Long Range Arena (Tay et al., ICLR 2021), as quoted in the {_LIQUID}"
_S5 = "S5 paper (Smith et al., ICLR 2023), as quoted in later comparisons"
_LRU = "LRU paper (Orvieto et al., ICML 2023, arXiv 2303.06349), Table 3"
_SC35 = "S4D paper (Gu et al., NeurIPS 2022), Table 11, as quoted in the Liquid-S4 paper, Table 4"

_RERUN = "re-run by Mega's authors; mean of five seeds"
_FIVE = "mean of five seeds"
_FAIL = None  # "x" in the papers: chance level, or did not fit the memory

# model, source, note, then ListOps, Text, Retrieval, Image, Pathfinder, Path-X. `...`: not known to us.
_TABLE: tuple[tuple[str, str, str, tuple[float | EllipsisType | None, ...]], ...] = (
    ("Transformer (Arena)", _MEGA, "the Arena's own", (36.37, 64.27, 57.46, 42.44, 71.40, _FAIL)),
    ("transformer", _MEGA, _RERUN, (37.11, 65.21, 79.14, 42.94, 71.83, _FAIL)),
    ("Local attention", _TAY, "", (15.82, 52.98, 53.39, 41.46, 66.63, _FAIL)),
    ("Sparse Transformer", _TAY, "", (17.07, 63.58, 59.59, 44.24, 71.71, _FAIL)),
    ("Longformer", _TAY, "", (35.63, 62.85, 56.89, 42.22, 69.71, _FAIL)),
    ("Linformer", _MEGA, "", (35.70, 53.94, 52.27, 38.56, 76.34, _FAIL)),
    ("Reformer", _MEGA, "", (37.27, 56.10, 53.40, 38.07, 68.50, _FAIL)),
    ("Sinkhorn Transformer", _TAY, "", (33.67, 61.20, 53.83, 41.23, 67.45, _FAIL)),
    ("BigBird", _MEGA, "", (36.05, 64.02, 59.29, 40.83, 74.87, _FAIL)),
    ("Linear Transformer", _TAY, "", (16.13, 65.90, 53.09, 42.34, 75.30, _FAIL)),
    ("Performer", _MEGA, "", (18.01, 65.40, 53.82, 42.77, 77.05, _FAIL)),
    ("Luna-256", _MEGA, "", (37.98, 65.78, 79.56, 47.86, 78.55, _FAIL)),
    ("FNet", _LIQUID, "", (35.33, 65.11, 59.61, 38.67, 77.80, _FAIL)),
    ("Nyströmformer", _LIQUID, "", (37.15, 65.52, 79.56, 41.58, 70.94, _FAIL)),
    ("H-Transformer-1D", _LIQUID, "", (49.53, 78.69, 63.99, 46.05, 68.78, _FAIL)),
    ("S4-v1", _MEGA, "", (58.35, 76.02, 87.09, 87.26, 86.05, 88.10)),
    ("S4-v2", _MEGA, "", (59.60, 86.82, 90.90, 88.65, 94.20, 96.35)),
    ("S4-v2 (re-run)", _MEGA, _RERUN, (59.10, 86.53, 90.94, 88.48, 94.01, 96.07)),
    ("S4D-LegS", _S4D, "", (60.47, 86.18, 89.46, 88.19, 93.06, 91.95)),
    ("S4D-Inv", _S4D, "", (60.18, 87.34, 91.09, 87.83, 93.78, 92.80)),
    ("S4D-Lin", _S4D, "", (60.52, 86.97, 90.96, 87.93, 93.96, _FAIL)),
    ("Liquid-S4", _LIQUID, "", (62.75, 89.02, 91.20, 89.50, 94.80, 96.66)),
    ("S5", _S5, "", (62.15, 89.31, 91.40, 88.00, 95.33, 98.58)),
    ("LRU", _LRU, "its Image is in colour and left out here", (60.2, 89.4, 89.9, ..., 95.1, 94.2)),
    ("mega", _MEGA, _FIVE, (63.14, 90.43, 91.25, 90.44, 96.01, 97.98)),
    ("mega-chunk", _MEGA, f"{_FIVE}; chunks of 128, on Path-X of 4,096", (58.76, 90.19, 90.97, 85.80, 94.41, 93.81)),
)  # fmt: skip

_VALIDATION = "the caption there calls the figures validation accuracy"
_SPEECH_ROWS = (
    Row("speech-sc10", "transformer", None, _SPEECH, "786K parameters; does not fit the memory"),
    Row("speech-sc10", "S4", 98.32, _SPEECH, "as reported by S4; the split is drawn at random"),
    Row("speech-sc10", "S4 (re-run)", 97.50, _SPEECH, "300K parameters; re-run by Mega's authors"),
    Row("speech-sc10", "mega-chunk", 96.92, _SPEECH, "the base model, chunks of 1,000; the split is drawn at random"),
    Row("speech-sc10", "mega-chunk (big)", 97.30, _SPEECH, "476K parameters; the split is drawn at random"),
    Row("speech-sc35", "S4-v2", 96.08, _SC35, f"307K parameters; {_VALIDATION}"),
    Row("speech-sc35", "S4D-LegS", 95.83, _SC35, f"306K parameters; {_VALIDATION}"),
    Row("speech-sc35", "S4D-Inv", 96.18, _SC35, f"306K parameters; {_VALIDATION}"),
    Row("speech-sc35", "S4D-Lin", 96.25, _SC35, f"306K parameters; {_VALIDATION}"),
    Row("speech-sc35", "Liquid-S4", 96.78, "Liquid-S4 paper, Table 4", f"224K parameters; {_VALIDATION}"),
)


def _arena_rows() -> Iterator[Row]:
    for model, source, note, accuracies in _TABLE:
        for task, accuracy in zip(ARENA, accuracies, strict=True):
            if not isinstance(accuracy, EllipsisType):
                yield Row(task, model, accuracy, source, note)


ROWS: tuple[Row, ...] = (*_arena_rows(), *_SPEECH_ROWS)
COSTS: tuple[Cost, ...] = tuple(
    Cost(model, speed, memory, _MEGA)
    for model, speed, memory in (
        ("transformer", 1.0, 1.0),
        ("Reformer", 0.8, 0.24),
        ("Linformer", 5.5, 0.10),
        ("BigBird", 1.1, 0.30),
        ("Performer", 5.7, 0.11),
        ("Luna-256", 4.9, 0.16),
        ("S4-v2 (re-run)", 4.8, 0.14),
        ("mega", 2.9, 0.31),
        ("mega-chunk", 5.5, 0.13),
    )
)

_UNKNOWN = {
    "seqboat": "of the SeqBoat paper (NeurIPS 2023) we know abstract and code, not its tables",
    "longvq": "of the LongVQ paper (IJCAI 2024) we know the abstract; no code is public, and ours is a reconstruction",
    "fastrpb": "of FastRPB and SIKF (2022) we know the published code, which holds no results",
    "spade": "of the SPADE paper (2022) we know abstract and language-model code, not its tables",
}
_BY_KEY = {(row.task, row.model): row for row in ROWS}


def benchmark(task: str, source: str = "") -> str | None:
    """The published task (a key of `BENCHMARKS`) that is nearest to one of `tasks.load`; None where there is none.

    source: the `TaskConfig.source`. Speech is held against the 35 words where it is all of them, else the ten.
    """
    if task == "speech":
        return "speech-sc35" if re.match(r"Speech Commands v0\.02, 35 words", source) else "speech-sc10"
    return task if task in BENCHMARKS else None


def lookup(task: str, model: str) -> Row | None:
    """The published figure; None where we know of none (`why_unknown` says why).

    task: a key of `BENCHMARKS`, or "speech" for its ten words. model: a name of `models.build` or of the table. Our
    "transformer" is held against the better of two published ones, the re-run by Mega's authors.
    """
    return _BY_KEY.get((benchmark(task) or task, model))


def why_unknown(model: str, task: str = "") -> str:
    """In one line, why no published figure of a model (on a task) stands here; "" where one does."""
    if (lookup(task, model) is not None) if task else any(row.model == model for row in ROWS):
        return ""
    if model in _UNKNOWN:
        return _UNKNOWN[model]
    if model == "mega" and task.startswith("speech"):
        return "the Mega paper prints speech for Mega-chunk only"
    return f"no figure of {model}{f' on {task}' if task else ''} was found that could be checked"


def differences(task: str, source: str, length: int, train: int) -> tuple[str, ...]:
    """In what the data of a run differ from the published task's. Empty: the figures may be compared.

    task, source, length: of the `TaskConfig`; train: sequences trained on. The rule: the source must be the official
    data, or made by the published rule; no sequence cut shorter than the published; and at least `ENOUGH` of the
    published number of training sequences.
    """
    key = benchmark(task, source)
    if key is None:
        return ("nothing is published for this task",)
    wanted, found = BENCHMARKS[key], []
    if not re.fullmatch(wanted.genuine, source):
        found.append(f"other data (published: {wanted.data})")
    if length < wanted.length:
        found.append(f"at most {length:,} steps a sequence, not {wanted.length:,}")
    if train < ENOUGH * wanted.train:
        found.append(f"trained on {train:,} sequences, not {wanted.train:,}")
    return tuple(found)


def models(task: str = "") -> tuple[str, ...]:
    """The models with a row (for this task), in the table's order."""
    key = benchmark(task) or task
    return tuple(dict.fromkeys(row.model for row in ROWS if not task or row.task == key))


def mean(model: str, tasks: Sequence[str] = ARENA, failed: float | None = None) -> float:
    """Mean accuracy over tasks, in percent. Raises `ValueError` for a task without a figure.

    failed: what a failed task counts; None leaves it out. Papers do either, so such means are comparable only when
    they are taken alike, over the same tasks.
    """
    found = [lookup(task, model) for task in tasks]
    missing = [task for task, row in zip(tasks, found, strict=True) if row is None]
    if missing:
        raise ValueError(f"no mean for {model}: its figure on {', '.join(missing)} is not known to us. Choose tasks.")
    values = [failed if row.accuracy is None else row.accuracy for row in found if row is not None]
    known = [value for value in values if value is not None]
    if not known:
        raise ValueError(f"no mean for {model}: it failed on {', '.join(tasks)}. Say what a failure counts: failed=50.")
    return sum(known) / len(known)


def table(names: Sequence[str] | None = None, tasks: Sequence[str] = ARENA) -> str:
    """Published accuracies in percent as text, a line a model. Raises `ValueError` for unknown tasks and models.

    names: the models; None: all that have a figure on one of the tasks. "-": not known to us.
    """
    for task in tasks:
        if task not in BENCHMARKS:
            raise ValueError(f"tasks must be of {', '.join(BENCHMARKS)}; got {task!r}.")
    names = [name for name in models() if any(lookup(task, name) for task in tasks)] if names is None else names
    for name in names:
        if name not in models():
            raise ValueError(f"names must be of {', '.join(models())}; got {name!r}.")
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{BENCHMARKS[task].title:>12}" for task in tasks)]
    for name in names:
        cells = [_cell(lookup(task, name)) for task in tasks]
        lines.append(name.ljust(width) + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return "fails" if row.accuracy is None else f"{row.accuracy:.2f}"
