"""The panel of chapter 02: what the state of a linear system remembers, and how its eigenvalues decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, LogSlider, Panel
from longseq_tutorial.classroom.panels_ema import frequency_response
from longseq_tutorial.mechanisms.s4 import KINDS, METHODS, discretize, dplr_dense, s4d_init

__all__ = ["StateMemory", "legendre", "memory_directions"]

SIGNALS = ("two waves", "chirp", "steps", "noise")
LONGEST = 512  # steps of the past that are drawn
FAINT = 1e-4  # a direction of the past this much weaker in the state than the strongest counts as lost


def legendre(N: int, r: Tensor | np.ndarray | float) -> Tensor:
    """Orthonormal Legendre polynomials on (0, 1): ``sqrt(2n+1) P_n(2r - 1)`` for n = 0 .. N-1, ``(..., N)``, float64.

    These are the polynomials whose coefficients the state of HiPPO-LegS holds.
    """
    at = np.asarray(r, dtype=np.float64)
    scale = np.sqrt(2 * np.arange(N) + 1)
    return torch.from_numpy((np.polynomial.legendre.legvander(2 * at - 1, N - 1) * scale).reshape(*at.shape, N))


def memory_directions(echoes: Tensor, faint: float = FAINT) -> Tensor:
    """Which pasts a state can tell apart.

    Args:
        echoes: ``(N, L)`` real, what an input of 1, so and so many steps ago, has left in each of the N numbers.
        faint: directions whose trace in the state is this much weaker than the strongest count as lost.

    Returns:
        An orthonormal basis ``(kept, L)`` of the pasts that are remembered: ``basis.T @ (basis @ past)`` is the best
        that can be rebuilt of a past from the state alone.
    """
    _, sizes, basis = torch.linalg.svd(echoes, full_matrices=False)
    return basis[sizes > faint * sizes.max()]


class StateMemory(Panel):
    """Eigenvalues, the kernel they give, its frequency response, and a past rebuilt from the state.

    Args:
        source: ``None``, and eigenvalues start as :func:`~longseq_tutorial.mechanisms.s4.s4d_init` says; or an
            :class:`~longseq_tutorial.mechanisms.s4.S4D` or :class:`~longseq_tutorial.mechanisms.s4.S4`, trained or
            not (any module whose ``system()`` gives ``A, B, C, dt`` or ``Lambda, P, B, C, dt``).
        past: a signal of your own, real ``(L,)``, at least 8 samples, oldest first; its end is drawn. ``None``: choose
            among four.
        start: values that replace the controls' own starting values.

    Raises:
        TypeError: another kind of source.
        ValueError: a past of another shape, or not finite.
    """

    title = "What a state space remembers"

    def __init__(self, source: nn.Module | None = None, past: Tensor | None = None, **start: Any) -> None:
        self._source: Any = _checked_source(source)
        self._past = None if past is None else _checked_past(past)
        longest = LONGEST if self._past is None else min(LONGEST, len(self._past))
        own: dict[str, Control]
        if source is None:
            own = {
                "kind": Choice("eigenvalues", KINDS, "lin"),
                "states": IntSlider("state size N", 2, 64, 32, 2),
                "real": LogSlider("real parts (decay), times", 0.1, 10.0, 1.0),
                "imag": LogSlider("imaginary parts (turning), times", 0.1, 10.0, 1.0),
                "dt": LogSlider("dt", 0.001, 0.5, 0.03),
                "method": Choice("discretisation", METHODS, "zoh"),
            }
        else:
            own = {
                "channel": IntSlider("channel", 0, len(self._source.system()[-1]) - 1, 0),
                "real": LogSlider("real parts (decay), times", 0.1, 10.0, 1.0),
                "imag": LogSlider("imaginary parts (turning), times", 0.1, 10.0, 1.0),
                "stretch": LogSlider("dt, times", 0.1, 10.0, 1.0),
            }
        readings = ("what was there?",) if source is None else ("its own C", "what was there?")
        signals = SIGNALS if self._past is None else ("yours", *SIGNALS)
        self.controls: Mapping[str, Control] = {
            **own,
            "length": IntSlider("length of the past (steps)", 8, longest, min(128, longest)),
            "reading": Choice("the output asks", readings),
            "asked": IntSlider("how many steps ago", 0, longest - 1, min(40, longest - 1)),
            "signal": Choice("signal", signals),
        }
        super().__init__(**start)

    def figure(self, length: int, reading: str, asked: int, signal: str, **own: Any) -> Figure:
        """Eigenvalues and kernel above, frequency response and the rebuilt past below."""
        echoes, poles, kernel, basis = self._look(length, reading, asked, own)
        fig, ((plane, lags), (gains, time)) = plt.subplots(2, 2, figsize=(9.0, 4.6), width_ratios=(2, 3))
        _draw_poles(plane, poles)
        lags.plot(kernel, marker="")
        if reading == "what was there?":
            lags.axvline(min(asked, length - 1), color="#999999", linestyle=":")
        lags.axhline(0, color="#999999", linewidth=0.8)
        lags.set(title="kernel", xlabel="lag (steps)", ylabel="weight")
        frequencies, gain = frequency_response(kernel)
        gains.plot(frequencies, gain, marker="")
        gains.set(title="frequency response", xlabel="frequency (cycles per step)", ylabel="gain")
        gains.set_ylim(bottom=0)
        u = self._signal(signal, length)
        rebuilt = (basis.T @ (basis @ u.flip(0))).flip(0)
        ago = torch.arange(-(length - 1), 1)
        time.plot(ago, u, marker="", color="#999999", label="the past")
        time.plot(ago, rebuilt, marker="", label=f"rebuilt from {echoes.shape[0]} numbers")
        time.set(title="the past, rebuilt from the state now", xlabel="time (steps, now = 0)", ylabel="value")
        time.legend(fontsize="small")
        return fig

    def describe(self, length: int, reading: str, asked: int, signal: str, **own: Any) -> str:
        """The same in words."""
        echoes, poles, kernel, basis = self._look(length, reading, asked, own)
        sampled = poles.abs().clamp(1e-300, 1 - 1e-12)
        lives = math.log(0.5) / torch.log(sampled)
        turning = torch.angle(poles).abs()
        turning = turning[turning > 1e-6]
        words = [
            f"{len(poles)} eigenvalues; half-lives from {fmt(float(lives.min()))} to {fmt(float(lives.max()))} steps"
        ]
        if len(turning):
            longest, shortest = 2 * math.pi / float(turning.min()), 2 * math.pi / float(turning.max())
            words[0] += f", periods from {fmt(shortest)} to {fmt(longest)} steps"
        words[0] += "."
        peak = int(kernel.abs().argmax())
        frequencies, gain = frequency_response(kernel)
        loudest = int(gain.argmax())
        u = self._signal(signal, length).flip(0)
        rebuilt = basis.T @ (basis @ u)
        new = max(1, length // 4)
        if reading == "what was there?":
            words.append(f"Asked what was there {min(asked, length - 1)} steps ago,")
        else:
            words.append("Read with its own C,")
        words += [
            f"the kernel is largest at lag {peak}: {fmt(float(kernel[peak]))};",
            f"its gain is largest, {fmt(float(gain[loudest]))},",
            f"at a period of {fmt(1 / float(frequencies[loudest]))} steps." if loudest else "at frequency 0.",
            f"Of the last {length} steps the state's {len(echoes)} real numbers tell {len(basis)} directions apart.",
            f"From them the past ({signal}) is rebuilt with a relative error of {fmt(_relative(rebuilt - u, u))}:",
            f"{fmt(_relative(rebuilt[:new] - u[:new], u[:new]))} in the newest quarter,",
            f"{fmt(_relative(rebuilt[-new:] - u[-new:], u[-new:]))} in the oldest.",
        ]
        return " ".join(words)

    def _look(self, length: int, reading: str, asked: int, own: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Echoes (N, L), sampled eigenvalues, the kernel (L,), and the basis of what is remembered."""
        echoes, poles, C = self._system(length, own)
        basis = memory_directions(echoes)
        if reading == "what was there?":
            kernel = basis.T @ basis[:, min(asked, length - 1)]
        else:
            kernel = torch.cat([2 * C.real, -2 * C.imag]) @ echoes
        return echoes[echoes.abs().amax(1) > 0], poles, kernel, basis

    def _system(self, length: int, own: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Echoes (N, L) as real and imaginary parts, all sampled eigenvalues, C (N/2,)."""
        system: tuple[Tensor, ...]
        if self._source is None:
            A, B = s4d_init(own["kind"], own["states"])
            system, dt, method = (A, B, torch.ones_like(A)), own["dt"], own["method"]
        else:
            with torch.no_grad():
                *vectors, steps = (p.detach().cpu() for p in self._source.system())
            channel = own["channel"]
            system = tuple(v[channel].to(torch.complex128) for v in vectors)
            dt, method = float(steps[channel]) * own["stretch"], getattr(self._source, "discretization", "zoh")
        A = torch.complex(system[0].real * own["real"], system[0].imag * own["imag"])
        step = torch.tensor([dt], dtype=torch.float64)
        if len(system) == 3:
            decay, push = (p[0] for p in discretize(A[None], system[1][None], step, method))
            states = push[:, None] * torch.cat(
                [torch.ones_like(decay)[:, None], decay[:, None].expand(-1, length - 1)], 1
            ).cumprod(1)
            poles = torch.cat([decay, decay.conj()[decay.imag != 0]])
        else:
            dense, x = (p[0] for p in dplr_dense(A[None], system[1][None], system[2][None], step))
            past = []
            for _ in range(length):
                past.append(x[: len(A)])
                x = dense @ x
            states, poles = torch.stack(past, 1), torch.linalg.eigvals(dense)
        return torch.cat([states.real, states.imag]), poles, system[-1]

    def _signal(self, name: str, length: int) -> Tensor:
        if name == "yours" and self._past is not None:
            return self._past[-length:]
        t = torch.arange(length, dtype=torch.float64) / length
        if name == "two waves":
            return torch.sin(2 * math.pi * 2 * t) + 0.5 * torch.sin(2 * math.pi * 7 * t + 1)
        if name == "chirp":
            return torch.sin(2 * math.pi * (t + 10 * t**2))
        if name == "steps":
            return torch.tensor([0.0, 1.0, 0.4, -0.6, 0.2])[(t * 5).long()].double()
        return torch.randn(LONGEST, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:length]


def _relative(error: Tensor, truth: Tensor) -> float:
    return float(error.norm() / truth.norm().clamp(min=1e-12))


def _draw_poles(ax: Axes, poles: Tensor) -> None:
    circle = torch.linspace(0, 2 * math.pi, 200)
    ax.plot(torch.cos(circle), torch.sin(circle), marker="", color="#999999", linewidth=1)
    ax.plot(poles.real, poles.imag, linestyle="", marker="o", markersize=4, color=OKABE_ITO["vermilion"])
    ax.set(title="eigenvalues of one step", xlabel="real part", ylabel="imaginary part", xlim=(-1.1, 1.1))
    ax.set_ylim(-1.1, 1.1)
    ax.set_aspect("equal")


def _checked_source(source: Any) -> Any:
    if source is None:
        return None
    if not isinstance(source, nn.Module) or not callable(getattr(source, "system", None)):
        raise TypeError(
            f"StateMemory wants an S4D, an S4, or nothing; got {type(source).__name__}. "
            "Pass the state space inside your model, e.g. layer.ssm."
        )
    module: Any = source
    system = module.system()
    if len(system) not in (4, 5) or len({tuple(p.shape[1:]) for p in system[:-1]}) != 1 or system[-1].dim() != 1:
        shapes = [tuple(p.shape) for p in system]
        raise ValueError(f"system() must give A, B, C (D, N/2) and dt (D,), or Lambda, P, B, C and dt; got {shapes}.")
    return module


def _checked_past(past: Any) -> Tensor:
    if not isinstance(past, Tensor) or past.dim() != 1 or len(past) < 8 or past.is_complex():
        got = f"{tuple(past.shape)} {past.dtype}" if isinstance(past, Tensor) else type(past).__name__
        raise ValueError(f"past must be a real tensor (L,) of at least 8 samples; got {got}. Pick one: x[0, :, 0].")
    if not past.isfinite().all() or past.abs().max() == 0:
        raise ValueError("past must be finite and not all zero; got NaN, infinity or silence.")
    return past.detach().double().cpu()
