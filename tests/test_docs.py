"""What the pages of docs/ show must run as it stands."""

import re
from pathlib import Path

import pytest
import torch

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    code = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert code, f"{page.name} shows no code"
    threads = torch.get_num_threads()
    names: dict[str, object] = {}
    try:
        for block in code:
            exec(compile(block, page.name, "exec"), names)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert page.name != "profiling.md" or re.search(r"largest tensor: \(\d+, .*\d+\)", said)
