"""Small pieces on a CPU; few large ones elsewhere, and for whoever compiles."""

import torch
from torch._dynamo.utils import counters

from longseq_tutorial.mechanisms.devices import LARGE, at_once, in_pieces, uncompiled


def test_small_pieces_are_for_a_cpu_alone():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    assert in_pieces(here) and not in_pieces(there)
    assert (at_once(here, 7), at_once(there, 7)) == (7, LARGE)


def test_who_compiles_gets_large_pieces():
    compiled = torch.compile(lambda x: x + at_once(x, 7), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == LARGE


def test_a_part_can_be_left_out_of_a_graph():
    def count(x):
        """On the way there are as many numbers as x says, which no graph can know."""
        return torch.ones(int(x.sum())).sum()

    assert uncompiled(count) is count, "nobody compiles"
    counters.clear()
    compiled = torch.compile(lambda x: uncompiled(count)(x.abs()) * 2, backend="eager", dynamic=False)
    assert [compiled(torch.full((2,), float(n))).item() for n in (1, 2, 3)] == [4, 8, 12]
    assert counters["stats"]["unique_graphs"] == 2, "before and after, not for every size"
