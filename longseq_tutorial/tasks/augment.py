"""Random changes to a batch of waveforms that a listener would forgive, so that a model must forgive them too.

Each function is pure: a batch and one number for each clip go in, a new batch comes out. `augment` draws the
numbers from a generator and applies all of them; the same generator state gives the same batch.
"""

from __future__ import annotations

import torch

from .base import Batch, DataError


def change_speed(batch: Batch, speed: torch.Tensor, limit: int) -> Batch:
    """Play clip i `speed[i]` times as fast, by linear interpolation; its pitch rises with it.

    speed: (batch,), positive. A clip of n samples becomes one of ceil(n / speed), cut to `limit`.
    """
    _check(batch, speed=speed)
    length = batch.mask.sum(1)  # (batch,)
    changed = (length / speed).ceil().long().clamp(1, limit)
    time = torch.arange(int(changed.max()), device=batch.x.device)
    last = (length - 1)[:, None]
    source = (time * speed[:, None]).clamp(max=last)  # (batch, new length): where each new sample is read
    left = source.floor().long()
    right = (left + 1).minimum(last)
    x = torch.lerp(batch.x.gather(1, left), batch.x.gather(1, right), (source - left).to(batch.x.dtype))
    mask = time < changed[:, None]
    return Batch(x * mask, mask, batch.label)


def shift(batch: Batch, samples: torch.Tensor, limit: int) -> Batch:
    """Start clip i later by `samples[i]`, with silence before it, or earlier, losing its first samples.

    samples: (batch,) integers. The clip becomes that much longer or shorter, cut to `limit`; one sample stays.
    """
    _check(batch, samples=samples)
    length = batch.mask.sum(1)
    samples = samples.maximum(1 - length)  # never shift all of a clip away
    shifted = (length + samples).clamp(max=limit)
    time = torch.arange(int(shifted.max()), device=batch.x.device)
    source = time - samples[:, None]  # (batch, new length)
    inside = (source >= 0) & (source < length[:, None])
    mask = time < shifted[:, None]
    x = batch.x.gather(1, source.clamp(0, batch.x.shape[1] - 1)) * (inside & mask)
    return Batch(x, mask, batch.label)


def scale(batch: Batch, gain: torch.Tensor) -> Batch:
    """Multiply clip i by `gain[i]`; a negative gain turns the waveform over, which nobody hears."""
    _check(batch, gain=gain)
    return batch._replace(x=batch.x * gain[:, None].to(batch.x.dtype))


def add_noise(batch: Batch, decibels: torch.Tensor, generator: torch.Generator) -> Batch:
    """Add white noise `decibels[i]` below the level (RMS) of clip i. Padding stays zero."""
    _check(batch, decibels=decibels)
    level = (batch.x.square().sum(1) / batch.mask.sum(1)).sqrt() * 10 ** (-decibels / 20)  # (batch,)
    noise = torch.randn(batch.x.shape, generator=generator, device=generator.device, dtype=batch.x.dtype)
    return batch._replace(x=batch.x + noise.to(batch.x.device) * level[:, None].to(batch.x.dtype) * batch.mask)


def augment(
    batch: Batch,
    generator: torch.Generator,
    *,
    limit: int,
    speed: tuple[float, float] = (0.9, 1.1),
    shift_samples: tuple[int, int] = (-200, 800),
    gain_decibels: tuple[float, float] = (-6.0, 6.0),
    noise_decibels: tuple[float, float] = (20.0, 50.0),
) -> Batch:
    """All four changes, each drawn uniformly within its bounds for every clip.

    limit: no clip grows beyond this many samples. The defaults suit speech at 8 kHz: a tenth faster or slower,
    25 ms earlier to 100 ms later, half to twice as loud, noise 20 to 50 dB below the speech.
    """
    count, device = len(batch.label), batch.x.device

    def draw(low: float, high: float) -> torch.Tensor:
        unit = torch.rand(count, generator=generator, device=generator.device)
        return (low + (high - low) * unit).to(device)

    batch = change_speed(batch, draw(*speed), limit)
    batch = shift(batch, draw(*shift_samples).round().long(), limit)
    batch = add_noise(batch, draw(*noise_decibels), generator)
    sign = torch.where(draw(-1, 1) < 0, -1.0, 1.0)
    return scale(batch, sign * 10 ** (draw(*gain_decibels) / 20))


def _check(batch: Batch, **given: torch.Tensor) -> None:
    name, values = next(iter(given.items()))
    if not batch.x.is_floating_point():
        raise DataError(f"augmentation is for waveforms (float samples); this batch holds {batch.x.dtype}.")
    if values.shape != batch.label.shape:
        wanted = tuple(batch.label.shape)
        raise DataError(f"{name} must hold one number for each clip, {wanted}; got {tuple(values.shape)}.")
    if name == "speed" and not bool((values > 0).all()):
        raise DataError(f"speed must be positive; got {float(values.min())}.")
