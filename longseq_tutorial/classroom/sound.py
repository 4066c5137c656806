"""Clips to listen to, and a way to ask any classifier which part of a clip it needs. For notebook 11."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longseq_tutorial.tasks import Split, collate, fsdd
from longseq_tutorial.tasks.base import REPOSITORY_DATA
from longseq_tutorial.tasks.speech import normalised

CLIPS = "fsdd_clips.npz"
SOURCE = "20 clips of the Free Spoken Digit Dataset's official test, by Z. Jackson and contributors, CC BY-SA 4.0"

Classifier = Callable[[Tensor, Tensor], Tensor]  # (x (B, L), mask (B, L)) -> logits (B, classes)


def real_clips(options: Mapping[str, Any] | None = None) -> tuple[Split, list[str]]:
    """The recordings that lie in the repository, prepared as `tasks.load("speech", ...)` would, and their names.

    options: those of the run whose model is to hear them (`record.recipe["data"]`); `normalise` and `length` count.
    """
    options = options or {}
    recordings = fsdd.read_pack(REPOSITORY_DATA / CLIPS)
    audio = recordings.audio.astype(np.float32) / 32768
    clips = [
        normalised(audio[start:stop][: options.get("length", 8_000)], options.get("normalise", "rms"))
        for start, stop in zip(recordings.offsets[:-1], recordings.offsets[1:], strict=True)
    ]
    offsets = np.cumsum([0] + [len(clip) for clip in clips])
    names = [recordings.name(index).removesuffix(".wav") for index in range(len(recordings))]
    return Split(np.concatenate(clips).astype(np.float32), offsets, recordings.digit), names


def probabilities(model: Classifier, x: Tensor) -> Tensor:
    """What a classifier makes of a clip, `(L,) -> (classes,)`, or of clips of one length, `(B, L) -> (B, classes)`."""
    batch = torch.atleast_2d(x)
    with torch.no_grad():
        answer = torch.softmax(model(batch, torch.ones_like(batch, dtype=torch.bool)), dim=-1)
    return answer[0] if x.dim() == 1 else answer


def answers(model: Classifier, clips: Sequence[Tensor], batch: int = 10) -> Tensor:
    """The logits of many clips of any lengths, `(n, classes)`, in their order. Clips of like length go together."""
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    logits = []
    with torch.no_grad():
        for start in range(0, len(order), batch):
            together = collate([(clips[i], 0) for i in order[start : start + batch]])
            logits.append(model(together.x, together.mask))
    return torch.cat(logits)[torch.tensor(order).argsort()]


def occlusion(model: Classifier, x: Tensor, window: int, hop: int) -> tuple[Tensor, Tensor]:
    """How much each stretch of a clip matters for the answer: silence it, and see how far the answer's logit falls.

    x: `(L,)`. window, hop: samples silenced at a time, and from one stretch to the next.
    Returns the middles of the stretches (in samples) and the falls of the logit of the class that the whole clip is
    given, relative to the mean over all classes, `(stretches,)` each. Needs no gradient, so any classifier will do.
    """
    starts = torch.arange(0, max(1, len(x) - window // 2), hop)
    place = torch.arange(len(x))
    silenced = (place >= starts[:, None]) & (place < starts[:, None] + window)  # (stretches, L)
    batch = torch.cat([x[None], x.masked_fill(silenced, 0)])
    with torch.no_grad():
        logits = model(batch, torch.ones_like(batch, dtype=torch.bool))
    score = (logits - logits.mean(-1, keepdim=True))[:, logits[0].argmax()]
    return starts + window // 2, score[0] - score[1:]


def contributions(model: Classifier, x: Tensor, steps: int = 1) -> Tensor:
    """What each sample of a clip adds to the score of its answer: sample times gradient, `(L,)`.

    The score is that of `occlusion`, the logit of the class that the clip is given, relative to the mean over all
    classes. With one step this is the first order: if the model were linear, a stretch's sum would be exactly how far
    the score falls when it is silenced. With more steps the gradient is the mean of that many on the straight way from
    silence to the clip (integrated gradients: Sundararajan, Taly and Yan, ICML 2017); then the sum over the whole clip
    tends to the whole difference between the clip's score and silence's, linear or not.
    """
    if steps < 1:
        raise ValueError(f"wanted at least one step from silence to the clip; got {steps}.")
    real = torch.ones(steps, len(x), dtype=torch.bool)
    with torch.no_grad():
        answer = int(model(x[None], real[:1]).argmax())
    share = (torch.arange(steps, dtype=x.dtype) + 0.5) / steps if steps > 1 else x.new_ones(1)
    heard = (share[:, None] * x.detach()).requires_grad_()
    with torch.enable_grad():
        logits = model(heard, real)
        (gradient,) = torch.autograd.grad((logits[:, answer] - logits.mean(1)).sum(), heard)
    return gradient.mean(0) * x


def delayed(x: Tensor, samples: int) -> Tensor:
    """A clip `(L,)` with so many samples of silence before it; with a negative number it loses its first ones."""
    if samples <= -len(x):
        raise ValueError(f"wanted at least one of {len(x)} samples to stay; got a shift by {samples}.")
    return x[-samples:] if samples < 0 else torch.cat([x.new_zeros(samples), x])


def mix(x: Tensor, noise: Tensor, decibels: float) -> Tensor:
    """Clips `(..., L)` with noise added `decibels` below each clip's own level (root mean square)."""
    level = x.square().mean(-1, keepdim=True).sqrt() / noise.square().mean(-1, keepdim=True).sqrt()
    return x + noise * level * 10 ** (-decibels / 20)


def player(x: Tensor, rate: int, label: str) -> str:
    """HTML that plays a clip `(L,)` at its own loudness; samples beyond -1 and 1 are clipped, as loudspeakers do."""
    samples = (x.detach().clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<audio controls aria-label="{label}" src="data:audio/wav;base64,{data}"></audio>'
