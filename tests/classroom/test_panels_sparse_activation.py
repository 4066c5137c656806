"""The panel of chapter 05 draws every unit it promises to take, says true numbers, and refuses the rest in words."""

import pytest
import torch
from torch import nn

from longseq_tutorial.classroom.panels_sparse_activation import WhoWakes
from longseq_tutorial.mechanisms.gated_attention import laplace, relu2
from longseq_tutorial.mechanisms.sparse_activation import SparseActivation, extract


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed=0, **options):
    torch.manual_seed(seed)
    made = SparseActivation(4, 2, 6, **{"window": 2, "max_positions": 30, **options}).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if not name.startswith("router"):
                p.normal_()
    return made


class Two(nn.Module):
    """A model with two units, a mask and an input of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = unit(1), unit(2, window=None, function=relu2)
        self.choose = nn.Linear(4, 2).double()

    def forward(self, x, mask=None):
        x = x + self.first(x, self.choose(x), mask)
        return x + self.second(x, self.choose(x), mask=mask)


H, U = draw(2, 17, 4), draw(2, 17, 2, seed=1)
MASK = torch.arange(17) < torch.tensor([[17], [9]])
ASLEEP = torch.tensor([1.0, 0.0]).expand(2, 17, 2)
SOURCES = {
    "global": lambda **start: WhoWakes(unit(), H, U, **start),
    "local": lambda **start: WhoWakes(unit(bias="local", causal=True), H, U, MASK, **start),
    "rotary": lambda **start: WhoWakes(unit(bias="rotary", function=laplace), H, U, **start),
    "no window": lambda **start: WhoWakes(unit(window=None), H, U, **start),
    "always": lambda **start: WhoWakes(unit(always_active=True), H, **start),
    "always, padded": lambda **start: WhoWakes(unit(always_active=True, window=None), H, None, MASK, **start),
    "float32": lambda **start: WhoWakes(unit().float(), H.float(), U.float(), **start),
    "nobody": lambda **start: WhoWakes(unit(), H, ASLEEP, **start),
    "one token": lambda **start: WhoWakes(unit(), H[:1, :1], U[:1, :1], labels=["a"], **start),
    "model": lambda **start: WhoWakes(Two(), H, MASK, **start),
    "long": lambda **start: WhoWakes(unit(), draw(1, 300, 4), draw(1, 300, 2), labels="x" * 300, **start),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_drawn_at_both_ends_of_every_control(name):
    panel = SOURCES[name]()
    assert panel.error is None, panel.say()
    for end in ("low", "high"):
        panel.set(**{key: getattr(c, end) for key, c in panel.controls.items() if hasattr(c, end)})
        assert panel.error is None, panel.say()
        assert "nan" not in panel.say().lower()
    for layer in getattr(panel.controls.get("layer"), "options", ()):
        panel.set(layer=layer)
        assert panel.error is None, panel.say()


def test_the_reading_is_the_units_own():
    made = unit()
    panel = WhoWakes(made, H, U)
    it = panel.reading(skip=0.0, temperature=1.0, window=2, sample=1)
    active, confidence = made.router(U)
    assert torch.equal(it.awake, active[1])
    assert torch.equal(it.place, active[1].nonzero().squeeze(1))
    torch.testing.assert_close(it.chance[active[1]], confidence[1][active[1]])
    torch.testing.assert_close(it.chance, torch.softmax(U[1] / made.router.log_temperature.exp(), -1)[:, 1])
    # weights times values, gated and projected, is the unit's output
    packed = H[1:, it.place]
    _, r, v = torch.nn.functional.silu(made.mx_proj(packed)).split([2, 6, 6], dim=-1)
    index = (active[1:].cumsum(1) * active[1:]).long()
    want = extract(made.h_proj((it.weights @ v) * r), index) * confidence[1:, :, None]
    torch.testing.assert_close(want, made(H, U)[1:])


def test_sliders_do_what_they_say_and_leave_the_module_alone():
    made = unit()
    before = {name: p.clone() for name, p in made.state_dict().items()}
    panel = WhoWakes(made, H, U)
    start = panel.reading(skip=0.0, temperature=1.0, window=2)
    fewer = panel.reading(skip=0.7, temperature=1.0, window=2)
    hotter = panel.reading(skip=0.0, temperature=5.0, window=2)
    wider = panel.reading(skip=0.0, temperature=1.0, window=5)
    assert torch.equal(fewer.awake, U[0, :, 1] > U[0, :, 0] + 0.7) and fewer.awake.sum() < start.awake.sum()
    assert torch.equal(hotter.awake, start.awake)
    assert ((hotter.chance - 0.5).abs() < (start.chance - 0.5).abs()).all()
    assert (wider.weights > 0).sum() > (start.weights > 0).sum()
    assert all(torch.equal(before[name], p) for name, p in made.state_dict().items())
    assert made.window == 2 and made.router.act_bias == 0


def test_words_tell_the_numbers():
    u = torch.zeros(1, 20, 2, dtype=torch.float64)
    u[0, [3, 15], 1] = 2.0  # two awake tokens, 12 apart; temperature 2: confidence sigmoid(1)
    panel = WhoWakes(unit(), H[:1, :1].expand(1, 20, 4), u, labels="abcdefghijklmnopqrst")
    words = panel.say()
    assert "2 of 20 tokens are awake (10 %), with confidence 0.73" in words
    assert "Query 15 ('p') reads 2 keys" in words and "spans 12 tokens" in words
    assert "Query 4 ('e') is asleep" in panel.set(query=4).say()
    assert "nobody attends" in panel.set(skip=panel.controls["skip"].high).say()
    one = WhoWakes(unit(), H[:1, :1].expand(1, 10, 4), u.flip(1)[:, :10])
    assert "1 of 10 tokens is awake" in one.say()
    assert "reads 1 key, most of it from 4, 0 tokens away, with weight 1.0" in one.say()
    assert "as always" in WhoWakes(unit(always_active=True), H).say()


def test_padding_is_asleep_and_unread():
    panel = WhoWakes(unit(always_active=True), H, None, MASK, sample=1)
    it = panel.reading(skip=0.0, temperature=1.0, window=2, sample=1)
    assert torch.equal(it.awake, MASK[1])
    torch.testing.assert_close(it.weights.sum(-1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: WhoWakes(nn.Linear(2, 2), torch.ones(1, 2)), TypeError, "unit inside your model"),
        (lambda: WhoWakes(torch.ones(2, 2)), TypeError, "SparseActivation"),
        (lambda: WhoWakes(nn.ModuleList([unit()]).append(nn.Identity())[1:], H), TypeError, "SparseActivation"),
        (lambda: WhoWakes(unit(), H, U, labels="abc"), ValueError, "17 tokens; got 3"),
        (lambda: WhoWakes(unit(), draw(1, 2000, 4), draw(1, 2000, 2)), ValueError, "Cut the sequence"),
        (lambda: WhoWakes(unit(), H), ValueError, "logits must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
