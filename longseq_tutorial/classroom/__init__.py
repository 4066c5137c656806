"""What only notebooks need: figures with words, panels, exercise checks, measurements."""

from longseq_tutorial.classroom.figures import OKABE_ITO, below, fmt, show, use_style
from longseq_tutorial.classroom.measure import growth_exponent, peak_memory, quickest, time_and_memory
from longseq_tutorial.classroom.panels import Choice, IntSlider, LogSlider, Panel, Slider, Toggle

__all__ = [
    "OKABE_ITO",
    "Choice",
    "IntSlider",
    "LogSlider",
    "Panel",
    "Slider",
    "Toggle",
    "below",
    "fmt",
    "growth_exponent",
    "peak_memory",
    "quickest",
    "show",
    "time_and_memory",
    "use_style",
]
