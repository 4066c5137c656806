"""The panel of chapter 04: who may look at whom in one layer, and what an output has really seen after several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, LogSlider, Panel, Toggle
from longseq_tutorial.mechanisms.chunking import chunk_attention, window_attention
from longseq_tutorial.mechanisms.ema import ema_fft

__all__ = ["ReceptiveField", "draw_field", "felt", "receptive_field"]

LENGTH, WIDTH, DEEPEST = 64, 8, 6
LONGEST = 256  # a field is made of one copy of the sequence for each position
NOISE = 1e-9  # of the strongest: below that, an FFT's rounding errors
CLEAR = 1e-2  # of the strongest: what counts as clearly felt
FAINTEST = -6  # log10, the lower end of the colours


def receptive_field(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How strongly each output depends on each input: ``|d y_i / d x_j|``, row i = output, column j = input.

    Asked in one backward pass. The batch holds a copy of x for each position, and copy i is asked about its output i
    only; since sequences in a batch do not meet, its gradient is row i. "Output i" is one fixed random combination of
    its channels, and the size of the gradient is its norm over the input's channels.

    Args:
        layer: any function or module, ``(B, L, D) -> (B, L, ·)``, that keeps the sequences of a batch apart.
        x: ``(L, D)``, real, where to ask.

    Returns:
        ``(L, L)``.
    """
    length = len(x)
    copies = x.detach().expand(length, *x.shape).clone().requires_grad_()  # (L, L, D)
    y = layer(copies)
    each = torch.arange(length, device=x.device)
    probe = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    (gradient,) = torch.autograd.grad((y[each, each] * probe).sum(), copies)
    return gradient.norm(dim=-1)


def felt(field: Tensor, share: float = NOISE) -> Tensor:
    """Which inputs each output feels: more than ``share`` of the strongest in its row. Bool, the shape of ``field``."""
    return field > share * field.amax(dim=-1, keepdim=True)


def draw_field(ax: Axes, field: Tensor) -> Any:
    """Draw a receptive field: colours for the logarithm of each row's share of its strongest, blank where unfelt."""
    shares = field / field.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(field.dtype).tiny)
    picture = torch.where(felt(field), shares.clamp(min=10.0**FAINTEST).log10(), torch.nan)
    image = ax.imshow(picture.numpy(), vmin=FAINTEST, vmax=0)
    ax.grid(False)
    return image


class ReceptiveField(Panel):
    """Masks, depth and an EMA beneath, and the receptive field that follows from them, measured with gradients.

    Args:
        source: what to ask.

            - ``None``: a stack of small layers ``x + attention(s)``, in chunks or in a window, where s is x itself or
              an EMA of it; kind, size, depth and half-life are controls;
            - any module or function ``(B, L, D) -> (B, L, ·)``: a layer or a whole stack of yours.
        given: beside a module, its input: ``(L, D)``, or ``(B, L, D)``, of which the first is taken.
        start: values that replace the controls' own starting values.

    Raises:
        TypeError, ValueError: something that cannot be asked; the message says what is wanted.
    """

    title = "What one output has seen"

    def __init__(
        self, source: Callable[[Tensor], Tensor] | None = None, given: Tensor | None = None, **start: Any
    ) -> None:
        self._source = source
        own: dict[str, Control] = {}
        if source is None:
            if given is not None:
                raise TypeError("without a module wanted no input; got one. ReceptiveField(module, x), or neither.")
            self._x = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            own = {
                "sight": Choice("attention looks at", ("chunk", "window")),
                "size": IntSlider("chunk length, or radius", 1, LENGTH // 2, 8),
                "layers": IntSlider("layers", 1, DEEPEST, 1),
                "causal": Toggle("causal: look at the past only"),
                "beneath": Choice("beneath each attention", ("nothing", "EMA")),
                "half_life": LogSlider("half-life of the EMA (steps)", 0.5, 50.0, 3.0),
            }
        else:
            self._x = _checked(source, given)
        self.controls = {**own, "position": IntSlider("output (position)", 0, len(self._x) - 1, len(self._x) // 2)}
        super().__init__(**start)

    def field(self, **own: Any) -> Tensor:
        """The receptive field ``(L, L)`` at these settings (all controls but the position)."""
        if self._source is None:
            return receptive_field(_stack(**own), self._x)
        modules = list(self._source.modules()) if isinstance(self._source, nn.Module) else []
        training = [m.training for m in modules]
        for m in modules:
            m.training = False  # dropout would make some inputs disappear
        try:
            return receptive_field(self._source, self._x).double().cpu()
        finally:
            for m, was in zip(modules, training, strict=True):
                m.training = was

    def figure(self, position: int, **own: Any) -> Figure:
        """The mask of one layer (of the built-in stack), the field, and one row of it."""
        field = self.field(**own)
        count = 3 if own else 2
        fig, axes = plt.subplots(1, count, figsize=(3.7 * count, 3.3), layout="none")
        fig.subplots_adjust(left=0.17 / count, right=1 - 0.05 / count, bottom=0.15, top=0.9, wspace=0.42)
        if own:
            allowed = _allowed(own["sight"], own["size"], own["causal"])
            axes[0].imshow(allowed.numpy(), vmin=0, vmax=1)
            axes[0].grid(False)
            axes[0].set(title="attention of one layer may look", xlabel="key (position)", ylabel="query (position)")
        image = draw_field(axes[-2], field)
        axes[-2].axhline(position, color=OKABE_ITO["vermilion"], linewidth=1.2, marker="")
        axes[-2].set(title="measured: output feels input", xlabel="input (position)", ylabel="output (position)")
        bar = fig.colorbar(image, ax=axes[-2], fraction=0.05, pad=0.04, ticks=[0, -2, -4, -6])
        bar.set_ticklabels(["1", "10⁻²", "10⁻⁴", "≤10⁻⁶"], fontsize=8)
        self._draw_row(axes[-1], field, position)
        return fig

    def describe(self, position: int, **own: Any) -> str:
        """The same in words, with the reach in tokens."""
        field = self.field(**own)
        reached, clearly = felt(field), felt(field, CLEAR)
        words = [self._about(**own)] if own else []
        words.append(f"Output {position} feels {_span(reached[position], position)};")
        words.append(f"with more than {fmt(100 * CLEAR, 1)} % of its strongest: {_span(clearly[position], position)}.")
        back, ahead = _farthest(reached)
        words.append(
            f"Over all outputs the reach is {_tokens(back)} back and {_tokens(ahead)} ahead, and "
            f"{fmt(100 * float(reached.double().mean()))} % of all pairs are felt."
        )
        return " ".join(words)

    def _about(self, sight: str, size: int, layers: int, causal: bool, beneath: str, half_life: float) -> str:
        share = 100 * float(_allowed(sight, size, causal).double().mean())
        kind = f"Chunks of {size}" if sight == "chunk" else f"A window of radius {size}"
        below = f"an EMA of half-life {fmt(half_life)} steps" if beneath == "EMA" else "nothing"
        return (
            f"{kind}, {layers} layer{'s' * (layers > 1)}, {'causal' if causal else 'both directions'}, {below} "
            f"beneath. One layer's attention may look at {fmt(share)} % of all pairs."
        )

    @staticmethod
    def _draw_row(ax: Axes, field: Tensor, position: int) -> None:
        row = field[position] / field[position].max().clamp(min=torch.finfo(field.dtype).tiny)
        steps = torch.arange(len(row))
        seen = felt(field)[position]
        ax.vlines(steps[seen], 10.0 ** (FAINTEST - 3), row[seen], color=OKABE_ITO["blue"], linewidth=2)
        ax.axvline(position, color=OKABE_ITO["vermilion"], linestyle="--", linewidth=1.2, marker="")
        ax.axhline(CLEAR, color="#777777", linestyle=":", linewidth=1.2, marker="")
        ax.set(yscale="log", xlim=(-1, len(row)), ylim=(10.0 ** (FAINTEST - 3), 3))
        ax.set(title=f"output {position}, input by input", xlabel="input (position)", ylabel="share of the strongest")


# ---- the built-in stack ----------------------------------------------------------------------------------------------


def _stack(
    sight: str, size: int, layers: int, causal: bool, beneath: str, half_life: float
) -> Callable[[Tensor], Tensor]:
    """Layers ``x + W_o attention(W_q s, W_k s, W_v s)`` with fixed random weights; s is x or its EMA."""
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(DEEPEST, 4, WIDTH, WIDTH, generator=g, dtype=torch.float64) / WIDTH**0.5
    attention = chunk_attention if sight == "chunk" else window_attention

    def run(x: Tensor) -> Tensor:
        for to_q, to_k, to_v, to_x in weights[:layers]:
            s = x if beneath == "nothing" else _smooth(x, half_life, causal)
            x = x + attention(s @ to_q, s @ to_k, s @ to_v, size, causal=causal) @ to_x
        return x

    return run


def _smooth(x: Tensor, half_life: float, causal: bool) -> Tensor:
    """A plain average with this half-life, from the past and, unless causal, from the future too."""
    alpha = torch.full((x.shape[-1], 1), 1 - 0.5 ** (1 / half_life), dtype=x.dtype)
    one = torch.ones_like(alpha)
    past = ema_fft(x, alpha, one, one, one)
    return past if causal else past + ema_fft(x.flip(1), alpha, one, one, one).flip(1)


def _allowed(sight: str, size: int, causal: bool) -> Tensor:
    """Who may look at whom, as the attention itself says: its weights, read off with an identity as values."""
    nothing, one = torch.zeros(LENGTH, 1, dtype=torch.float64), torch.eye(LENGTH, dtype=torch.float64)
    attention = chunk_attention if sight == "chunk" else window_attention
    return attention(nothing, nothing, one, size, causal=causal) > 0


# ---- words and doors -------------------------------------------------------------------------------------------------


def _farthest(reached: Tensor) -> tuple[int, int]:
    """The longest way back and ahead in a map of who feels whom."""
    output, source = reached.nonzero(as_tuple=True)
    if not len(output):
        return 0, 0
    return max(0, int((output - source).max())), max(0, int((source - output).max()))


def _span(row: Tensor, position: int) -> str:
    where = row.nonzero()[:, 0]
    if not len(where):
        return "no input at all"
    first, last = int(where[0]), int(where[-1])
    if first == last:
        return f"input {first} alone"
    back, ahead = max(0, position - first), max(0, last - position)
    some = "" if len(where) == last - first + 1 else f"{len(where)} of the "
    return f"{some}inputs {first} to {last}, {_tokens(back)} back and {_tokens(ahead)} ahead"


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _checked(source: Any, given: Any) -> Tensor:
    """The sequence ``(L, D)`` at which to ask the module, after trying it once."""
    if not callable(source):
        raise TypeError(
            "ReceptiveField wants a module or function (B, L, D) -> (B, L, D) and its input, or nothing; "
            f"got {type(source).__name__}."
        )
    if not isinstance(given, Tensor):
        raise TypeError(f"beside a module wanted its input, a tensor (L, D); got {type(given).__name__}.")
    if given.dim() not in (2, 3) or not given.numel() or not given.is_floating_point():
        raise ValueError(
            "wanted a real input (L, D) or (B, L, D), since gradients are taken with respect to it; "
            f"got {given.dtype} {tuple(given.shape)}. Hand in what comes out of the embedding."
        )
    x = given.detach() if given.dim() == 2 else given.detach()[0]
    if len(x) > LONGEST:
        raise ValueError(f"wanted at most {LONGEST} positions; got {len(x)}. Cut the sequence: x[:{LONGEST}].")
    with torch.no_grad():
        y = source(x.unsqueeze(0))
    if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[:2] != (1, len(x)):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"wanted a module that gives an output for each position, (1, {len(x)}, ·); got {got}.")
    return x
