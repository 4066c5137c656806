"""Small models and made-up tasks, shared by the tests of the models."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AnyTask:
    name: str = "made-up"
    kind: str = "tokens"
    classes: int = 4
    vocabulary: int = 11
    pairs: bool = False


TOKENS, SAMPLES = AnyTask(), AnyTask(kind="samples", vocabulary=0)
SMALL = {
    "mega": dict(dim=8, layers=2, z_dim=4, v_dim=12, ffn_dim=10, n=3, head_dim=6, max_positions=64),
    "mega-chunk": dict(dim=8, layers=2, z_dim=4, v_dim=12, ffn_dim=10, n=3, head_dim=6, chunk=5),
    "seqboat": dict(dim=8, layers=2, z_dim=4, v_dim=12, n=3, head_dim=6, max_positions=64),
    "longvq": dict(dim=8, layers=2, z_dim=4, v_dim=12, ffn_dim=10, n=3, state=6, codes=5, head_dim=6),
    "fastrpb": dict(dim=8, layers=2, heads=2, qkv_dim=12, ffn_dim=10, head_dim=6, max_positions=64, features=7),
    "spade": dict(dim=8, layers=2, heads=2, ffn_dim=10, head_dim=6, state=6, buckets=8, max_distance=6),
    "transformer": dict(dim=8, layers=2, heads=2, ffn_dim=10, head_dim=6),
}
VARIANTS = [("mega", {}), ("mega-chunk", {}), ("seqboat", dict(window=3)), ("transformer", {})] + [
    (name, dict(attention=attention, norm=norm, prenorm=prenorm, bias=bias))
    for name in ("mega", "mega-chunk")
    for attention, norm, prenorm, bias in [
        ("laplace", "batchnorm", True, "simple"),
        ("relu2", "rmsnorm", True, "rotary"),
        ("softmax", "scalenorm", False, "rotary"),
    ]
]
VARIANTS += [
    ("seqboat", dict(attention="laplace", norm="batchnorm", prenorm=True, bias="local", window=3, sinusoid=True)),
    ("seqboat", dict(attention="relu2", norm="rmsnorm", prenorm=True, bias="rotary", window=2, always_active=True)),
    ("seqboat", dict(attention="softmax", norm="scalenorm", prenorm=False, window=None)),
]
VARIANTS += [
    ("longvq", dict(window=2)),
    ("longvq", dict(memory="s4d", window=3, exact_window=True, norm="batchnorm", prenorm=True)),
    ("longvq", dict(window=1, norm="scalenorm")),
    ("fastrpb", {}),
    ("fastrpb", dict(attention="elu", bias="symmetric", sinusoid=True)),
    ("fastrpb", dict(attention="favor", bias="none")),
    ("fastrpb", dict(attention="softmax")),
    ("spade", dict(window=3)),
    ("spade", dict(mode="add", local="chunk", window=5)),
    ("spade", dict(mode="stack", s4_layers=2, window=1)),
]


def inputs(task, batch=3, length=13):
    if task.kind == "tokens":
        return torch.randint(1, task.vocabulary, (batch, length))
    return torch.randn(batch, length, dtype=torch.float64)


def randomised(module):
    """Every parameter away from its initial value, so that every term matters."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=g)
    return module.double().eval()
