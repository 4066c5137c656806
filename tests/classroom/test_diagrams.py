import matplotlib.pyplot as plt
import pytest

from longseq_tutorial.classroom.diagrams import KINDS, draw_diagram, legend_of_kinds, system_diagrams


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.mark.parametrize("name", system_diagrams())
def test_every_system_goes_from_x_to_y(ax, name):
    nodes, edges = system_diagrams()[name]
    draw_diagram(ax, nodes, edges, name)
    reached, before = {"x"}, set()
    while reached != before:
        before, reached = reached, reached | {end for start, end in edges if start in reached}
    unfed = {box for box, (_, _, _, kind) in nodes.items() if kind == "position" and box not in {e for _, e in edges}}
    assert reached | unfed == set(nodes), "every box is fed, or holds learned numbers of its own"
    assert all(any(start == box for start, _ in edges) for box in nodes if box != "y"), "no box leads nowhere"
    assert {"attention", "position"} <= {kind for _, _, _, kind in nodes.values()}
    places = [(x, y) for x, y, _, _ in nodes.values()]
    assert len(set(places)) == len(places), "no two boxes in one place"


def test_words_fit_their_boxes(ax):
    from longseq_tutorial.classroom.diagrams import WIDTH

    for name, (nodes, edges) in system_diagrams().items():
        ax.clear()
        ax.figure.set_size_inches(3.8, 4.3)
        draw_diagram(ax, nodes, edges, name)
        ax.figure.canvas.draw()
        wide = ax.transData.transform((WIDTH, 0))[0] - ax.transData.transform((0, 0))[0]
        for text in ax.texts:
            assert text.get_window_extent().width <= wide, f"{name}: {text.get_text()!r} is wider than its box"


def test_refusals_and_legend(ax):
    with pytest.raises(ValueError, match="kind of a box must be one of memory"):
        draw_diagram(ax, {"a": (0, 0, "a", "magic")}, [], "")
    with pytest.raises(ValueError, match="an arrow names b; the boxes are a"):
        draw_diagram(ax, {"a": (0, 0, "a", "plain")}, [("a", "b")], "")
    assert [handle.get_label() for handle in legend_of_kinds()] == [name for _, name in KINDS.values()]
