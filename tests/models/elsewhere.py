"""One training step of every model on a device that is not a CPU, pretended: run by test_elsewhere in its own process.

Tensors have shapes, dtypes and a device, but no numbers, so that this needs no GPU. As on a GPU, an operation refuses
tensors of different devices, and an answer that the program waits for is noticed: here it is made up. Prints for every
model and length how many operations a step takes, how often it waits, and what was not where it should be, as JSON.
"""

import json
import os
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from longseq_tutorial import models
from tests.models.any_task import SMALL, TOKENS

DEVICE, BATCH, LENGTHS = "elsewhere", 2, (1024, 16384)
# Local attention of a usual width; the other settings, however small, are those of the tests.
SIZES = {
    "mega-chunk": dict(chunk=128),
    "seqboat": dict(window=64),
    "longvq": dict(window=64, codes=64, norm="layernorm"),
    "fastrpb": dict(max_positions=LENGTHS[-1]),
    "spade": dict(window=64),
}


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would be told to do: all but views and bare memory."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not (function.is_view or name.startswith("prim.") or "empty" in name):
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


class Waits(ExitStack):
    """Makes up what the program wants to know of a tensor, and counts how often."""

    def __init__(self, length):
        super().__init__()
        self.count, tokens = 0, length // 4  # so many are active in SeqBoat

        def places(tensor):
            return tuple(torch.zeros(BATCH * tokens, dtype=torch.long, device=DEVICE) for _ in range(tensor.dim()))

        for name, answer in (("__bool__", lambda _: True), ("__int__", lambda _: tokens), ("nonzero", places)):
            self.enter_context(mock.patch.object(torch.Tensor, name, self._counted(answer)))

    def _counted(self, answer):
        def asked(tensor, **_):
            self.count += 1
            return answer(tensor)

        return asked


def moved(model: nn.Module) -> nn.Module:
    """The model with every parameter and buffer on the device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there = torch.empty(p.shape, dtype=p.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(there, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)
    return model


def step(name, length):
    """The second step: the first may look for what is to be set up."""
    model = models.build(name, TOKENS, **{**SMALL[name], **SIZES.get(name, {})})
    with FakeTensorMode(), Waits(length) as waits:
        model = moved(model)
        x = torch.ones(BATCH, length, dtype=torch.long, device=DEVICE)
        mask = torch.ones(BATCH, length, dtype=torch.bool, device=DEVICE)
        label = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
        for _ in range(2):
            waits.count = 0
            with Launches() as launches:
                loss = F.cross_entropy(model(x, mask), label) + models.auxiliary_loss(model)
                loss.backward()
    astray = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.device != p.device)
    ]
    return {
        "operations": launches.names.total(),
        "waits": waits.count,
        "astray": astray,
        "most": launches.names.most_common(5),
    }


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]
    getattr(torch, DEVICE).is_available = lambda: True
    print(json.dumps({name: [step(name, length) for length in LENGTHS] for name in models.NAMES}), flush=True)
    os._exit(0)  # autograd's thread for a device that does not exist cannot be ended in good order
