"""The books against torch's own counter and profiler, the parts, the parabola, and what the panel says of them."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longseq_tutorial.classroom.figures import fmt
from longseq_tutorial.classroom.measure import peak_memory
from longseq_tutorial.classroom.panels_systems import MORE_OPERATIONS, PARTS, Count, Systems, count_parts
from longseq_tutorial.models import NAMES, build_encoder
from longseq_tutorial.tasks import TaskConfig


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    plt.close("all")


TASK = TaskConfig(name="letters", kind="tokens", classes=4, length=64, vocabulary=27, source="made here")
# As chapter 09 has them.
SIZES = {
    "mega": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "max_positions": 1024, "attention": "laplace"},
    "mega-chunk": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "chunk": 128, "attention": "laplace"},
    "seqboat": {"z_dim": 32, "v_dim": 128, "window": 128, "max_positions": 4096},
    "longvq": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "codes": 256, "window": 64},
    "fastrpb": {"heads": 4, "qkv_dim": 64, "ffn_dim": 128, "max_positions": 16384},
    "spade": {"heads": 4, "ffn_dim": 128, "window": 128},
    "transformer": {"heads": 4, "ffn_dim": 128},
}
QUADRATIC = ("mega", "transformer")


def stack_of(name):
    torch.manual_seed(0)
    return build_encoder(name, TASK, dim=64, layers=1, **SIZES[name]).eval()


def tokens(length):
    return torch.randint(1, 27, (1, 65536), generator=torch.Generator().manual_seed(0))[:, :length]


@pytest.fixture(scope="module")
def counts():
    """Every system at five lengths; the quadratic ones at four of them."""
    return {
        name: {
            length: count_parts(stack_of(name), tokens(length))
            for length in (1024, 2048, 4096, 8192, 16384)
            if length < 16384 or name not in QUADRATIC
        }
        for name in NAMES
    }


@pytest.fixture(scope="module")
def panel(counts):
    return Systems(counts)


def total(parts):
    return Count(*(sum(part[book] for part in parts.values()) for book in (0, 1)))


# ---- the books


@pytest.mark.parametrize("length", [1, 37, 256, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_the_operations_are_those_of_torchs_own_counter(name, length):
    stack, x = stack_of(name), tokens(length)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(MORE_OPERATIONS)) as counter:
        stack(x)
    assert total(count_parts(stack, x)).operations == counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 37, 256, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_allocator_but_for_scratch_memory(name, length):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack, x = stack_of(name), tokens(length)
        counted = total(count_parts(stack, x)).bytes
        with torch.no_grad():
            measured = peak_memory(lambda: stack(x))
    finally:
        torch.set_num_threads(threads)
    assert counted <= measured <= counted + (2**20 if name == "spade" else 64)


def test_a_layer_by_hand():
    """Two linear layers with a ReLU between, 5 positions: known to the last byte."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 6)

        def forward(self, x):
            return self.attend(x) + self.feed_forward(x)

        def attend(self, x):  # a name of ours in a file that is not
            return x.mT.contiguous().mT

        def feed_forward(self, x):
            return self.fc2(F.relu(self.fc1(x)))

    parts = count_parts(Small(), torch.zeros(5, 6))
    assert parts["feed-forward"].operations == 2 * 5 * 6 * 7 * 2
    # fc1's result and the ReLU's lie there together; before and after it is less. What lies beside them is attend's.
    assert parts["feed-forward"].bytes == 4 * 5 * (7 + 7)
    assert parts["projections and gates"] == Count(0, 4 * 5 * 6)
    assert set(parts) == set(PARTS) and not any(any(parts[name]) for name in ("memory", "attention", "input"))


def test_views_and_what_is_written_in_place_weigh_nothing():
    class Idle(nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = x.mT.unsqueeze(0).squeeze(0).mul_(2)
            return x

    assert total(count_parts(Idle(), torch.zeros(5, 5))) == Count(0, 0)


@pytest.mark.parametrize("n", [2, 8, 12, 100])
def test_transforms_are_counted(n):
    class Back(nn.Module):
        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x), n=n)

    class Complex(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x.to(torch.complex64))

    x = torch.zeros(3, n)
    assert total(count_parts(Back(), x)).operations == 2 * round(2.5 * 3 * n * math.log2(n))
    assert total(count_parts(Complex(), x)).operations == round(5 * 3 * n * math.log2(n))


@pytest.mark.parametrize("name", NAMES)
def test_every_part_finds_its_operations(name, counts):
    parts = counts[name][1024]
    wanted = {
        "memory": name not in ("fastrpb", "transformer"),
        "attention": True,
        "positions": name == "fastrpb",
        "projections and gates": True,
        "feed-forward": name != "seqboat",
        "input": False,
    }
    assert {part: bool(count.operations) for part, count in parts.items()} == wanted


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_attention_costs_what_the_chapters_formula_says(length):
    """2 (z + v) for each thing that a query looks at."""
    a_token = {name: count_parts(stack_of(name), tokens(length)) for name in ("mega", "mega-chunk", "transformer")}
    found = {name: parts["attention"].operations / length for name, parts in a_token.items()}
    assert found == {"mega": 320 * length, "mega-chunk": 320 * 128, "transformer": 256 * length}


def test_linear_layers_cost_what_their_weights_say(counts):
    parts = counts["transformer"][1024]
    assert parts["projections and gates"].operations == 2 * 1024 * 64 * 4 * 64
    assert parts["feed-forward"].operations == 2 * 1024 * 64 * 2 * 128
    assert counts["mega"][1024]["feed-forward"] == parts["feed-forward"]._replace(bytes=0)


def test_fft_bias_grows_by_a_step_at_each_doubling(counts):
    steps = np.diff([counts["fastrpb"][2**k]["positions"].operations / 2**k for k in range(10, 15)])
    np.testing.assert_allclose(steps, 2.5 * 2 * (64 + 64 + 4), rtol=1e-12)  # to waves, back, and the kernels of 4 heads


# ---- carried on


@pytest.mark.parametrize("name", QUADRATIC)
def test_what_is_carried_on_is_what_is_counted(name, panel):
    """At 16,384 tokens, which the panel has not seen."""
    counted = count_parts(stack_of(name), tokens(16384))
    assert panel.costs[name][16384] == counted


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_any_parabola_is_carried_on(a, b, c):
    def parts(length):
        return dict.fromkeys(PARTS, Count(a * length**2 + b * length + c, b * length + c))

    lengths = [2**k for k in range(4, 10)]
    whole = {length: parts(length) for length in lengths}
    panel = Systems({"transformer": whole, "short": {length: whole[length] for length in lengths[:4]}})
    assert panel.costs["short"] == whole


def test_no_parabola_no_guess(counts):
    less = {length: counts["spade"][length] for length in (1024, 2048, 4096, 8192)}
    with pytest.raises(ValueError, match=r"counts of spade that lie on a parabola.*Count spade at \[16384\] too"):
        Systems({"spade": less, "mega-chunk": counts["mega-chunk"], "transformer": counts["transformer"]})


# ---- the panel


@pytest.mark.parametrize("system", NAMES)
@pytest.mark.parametrize("length", [1024, 16384])
def test_it_says_what_the_counts_say(panel, counts, system, length):
    said = panel.set(system=system, length=length).say()
    assert panel.error is None
    assert said.startswith(f"{system} at {length:,} tokens. In thousand operations a token: ")
    for book in ("operations", "bytes"):
        parts = panel.a_token(system, length, book)
        if length in counts[system]:
            assert parts == {part: getattr(count, book) / length for part, count in counts[system][length].items()}
        words = ", ".join(f"{part} {fmt(cost / 1e3, 3)}" for part, cost in parts.items() if cost)
        assert f"{fmt(panel.together(system, length, book) / 1e3, 3)} ({words})" in said
    assert ("is carried on" in said) == (length == 16384)
    if system != "transformer":
        ratio = panel.together(system, length) / panel.together("transformer", length)
        assert f"Here {system} costs {fmt(ratio, 3)} times as much" in said


def test_a_move_of_the_slider_changes_words_and_picture(panel):
    first, picture = panel.set(system="mega-chunk", length=1024).say(), panel._png
    assert panel.set(length=4096).say() != first
    assert panel._png != picture
    assert panel.set(length=1024).say() == first


def test_a_key_press_leads_to_the_next_length(panel):
    panel.set(system="spade", length=2048)
    slider = panel._widgets["length"][0]
    slider.value = slider.value * 10**slider.step
    assert panel.say().startswith("spade at 4,096 tokens. ")


def test_between_two_lengths_it_takes_the_nearest_and_says_so(panel):
    said = panel.set(system="fastrpb", length=5000).say()
    assert said.startswith("fastrpb at 4,096 tokens, which is nearest to 5,000 of the lengths that were counted. ")


def test_dragging_computes_nothing(panel, monkeypatch):
    monkeypatch.setattr(nn.Module, "__call__", lambda *a, **k: pytest.fail("a model was called"))
    assert panel.set(system="longvq", length=8192).error is None


def flat(*a_token):
    """Counts at 16, 32, ... tokens of a system that has one part and these operations a token; bytes alike."""
    lengths = [16 * 2**i for i in range(len(a_token))]
    return {
        length: {part: Count(*2 * (round(length * cost) * (part == "attention"),)) for part in PARTS}
        for length, cost in zip(lengths, a_token, strict=True)
    }


@pytest.mark.parametrize(
    ("ours", "between", "side", "words"),
    [
        ((5, 5, 5, 5), (32, 64), -1, "less than theirs from 64 tokens on, but not at 32."),
        ((9, 9, 9, 9), None, 1, "more than theirs at every length from 16 tokens on."),
        ((1, 2, 6, 8), None, 0, "as much as theirs at every length from 16 tokens on."),
        ((0.5, 3, 3, 9), (64, 128), 1, "more than theirs from 128 tokens on, but not at 64."),
        ((1, 2, 6, 9), (64, 128), 1, "more than theirs from 128 tokens on, but not at 64."),
    ],
)
def test_where_they_cross(ours, between, side, words):
    panel = Systems({"ours": flat(*ours), "theirs": flat(1, 2, 6, 8)}, beside="theirs")
    assert panel.crossing("ours") == panel.crossing("ours", "bytes") == (between, side)
    assert panel.error is None
    assert panel.say().count(words.rstrip(".")) == 2
    fig = panel.figure(system="ours", length=64)
    crosses = [line for ax in fig.axes for line in ax.get_lines() if line.get_label() == "they cross"]
    assert len(crosses) == (2 if between else 0)
    for cross in crosses:
        x, y = (float(values[0]) for values in cross.get_data())
        assert between[0] <= x <= between[1]
        assert 0.999 * min(ours) <= 1e3 * y <= 1.001 * max(ours)


def test_the_one_beside_is_compared_with_nobody(panel):
    said = panel.set(system="transformer", length=4096).say()
    assert "times as much" not in said
    assert panel.crossing("transformer") == (None, 0)
    fig = panel.figure(system="transformer", length=4096)
    assert [len(ax.get_legend_handles_labels()[0]) for ax in fig.axes] == [0, 1, 0, 1]


def test_the_picture_has_units_and_every_part(panel):
    fig = panel.figure(system="mega", length=1024)
    parts, together, held, at_once = fig.axes
    assert parts.get_xlabel() == together.get_ylabel() == "thousand operations a token"
    assert held.get_xlabel() == at_once.get_ylabel() == "kilobytes a token"
    assert together.get_xlabel() == "length L (tokens)"
    assert parts.title.get_text() == "operations at 1,024 tokens"
    rows = [label.get_text() for label in parts.get_yticklabels()]
    assert rows == ["memory", "attention", "projections and gates", "feed-forward", "all together"]


def test_wrong_counts_and_names_are_refused(panel, counts):
    with pytest.raises(ValueError, match=r"counts, name -> .* of 'transformer'.*; got none"):
        Systems({})
    with pytest.raises(ValueError, match="mega at 4 lengths"):
        Systems({"mega": counts["mega"]})
    with pytest.raises(ValueError, match="at two lengths or more; got transformer at 1 lengths"):
        Systems({"transformer": {1024: counts["transformer"][1024]}})
    with pytest.raises(ValueError, match="mega at 0 lengths"):
        Systems({"mega": {}, "transformer": counts["transformer"]})
    with pytest.raises(ValueError, match=r"longvq counted at every length.*it lacks \[2048, 4096, 8192, 16384\]"):
        Systems(
            {"longvq": {1024: counts["longvq"][1024]}, "spade": counts["spade"], "transformer": counts["transformer"]}
        )
    with pytest.raises(ValueError, match=r"system wants one of .*; got 'rnn'"):
        panel.set(system="rnn")
    with pytest.raises(ValueError, match=r"length wants a number in \[1024, 16384\]; got 5"):
        panel.set(length=5)
    for wrong in (("rnn", 1024, "bytes"), ("mega", 1000, "bytes"), ("mega", 1024, "seconds")):
        with pytest.raises(ValueError, match=r"wanted one of mega, .* a length of \[1024, .*; got"):
            panel.a_token(*wrong)
