"""What a checkpoint of every recipe takes on the disk, counted without training."""

from pathlib import Path

import pytest
import torch

from longseq_tutorial import models
from longseq_tutorial.training import RECIPES, Recipe, Unfinished, checkpoint, fit
from longseq_tutorial.training.checkpoint import LARGEST

from . import tiny
from .test_recipes import CONFIGS

# Models whose published size is too large for one file: weights, two moments of Adam and the best weights are 16 bytes
# a parameter, so that 15 MB hold 0.9 million (1.2 million where the last weights are kept). Their checkpoints come in
# several files, none above 15 MB. Halving the moments' precision would do for few of them, and would no longer go on
# as if nothing had happened.
MEGAS = {"mega", "mega-chunk"}
SEVERAL_FILES: dict[tuple[str, str], set[str]] = {
    ("listops", "paper"): {"fastrpb", "transformer"},  # 19 and 9 million parameters: 231 and 108 MB
    ("text", "paper"): {*MEGAS, "fastrpb"},
    ("retrieval", "paper"): {*MEGAS, "seqboat"},
    ("image", "paper"): {*MEGAS, "seqboat"},
    ("pathfinder", "paper"): MEGAS,
    ("text", "gpu-30min"): {*MEGAS, "longvq"},
    ("retrieval", "gpu-30min"): {*MEGAS, "seqboat", "longvq", "fastrpb", "spade"},
    ("image", "gpu-30min"): {*MEGAS, "seqboat", "longvq", "fastrpb", "spade", "transformer"},
    ("pathfinder", "gpu-30min"): {*MEGAS, "longvq"},
    ("speech", "gpu-30min"): {"fastrpb"},
}
RANDOM = {f"random.0.{name}": state for name, state in checkpoint.random_states().items()}


def contents(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this recipe after its first validation, with other numbers in them."""
    model = models.build(recipe.model, CONFIGS[recipe.task], **recipe.overrides)
    state = model.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    for name, parameter in model.named_parameters():
        moments = {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        trained = moments.items() if parameter.requires_grad else ()
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in trained}
    if recipe.select == "best":
        tensors |= {f"best.{name}": tensor for name, tensor in state.items()}
    return tensors | RANDOM


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_count_is_that_of_a_real_checkpoint(tmp_path: Path, select: str) -> None:
    recipe = tiny.recipe(select=select)
    CONFIGS["tiny"] = tiny.task().config
    try:
        expected = contents(recipe)
    finally:
        del CONFIGS["tiny"]
    with pytest.raises(Unfinished):
        fit(recipe, out=tmp_path, task=tiny.task(), progress=False, cpu=True, max_seconds=0)
    path = tmp_path / "tiny-mega-test-seed0" / checkpoint.NEWEST
    held, _, _ = checkpoint.load(path.parent)
    for name in expected.keys() | held.keys():
        if not name.startswith("random."):  # text of numbers, whose length varies by a few bytes
            assert (held[name].shape, held[name].dtype) == (expected[name].shape, expected[name].dtype), name
    assert abs(size(held) - size(expected)) < 2_000 and size(held) < path.stat().st_size < size(held) + 50_000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.run_name)
def test_no_file_of_a_checkpoint_exceeds_15_mb(recipe: Recipe) -> None:
    tensors = contents(recipe)
    groups = checkpoint.split(tensors)
    assert all(size(group) <= LARGEST - 200_000 for group in groups) and sum(map(size, groups)) == size(tensors)
    several = recipe.model in SEVERAL_FILES.get((recipe.task, recipe.name), ())
    assert (len(groups) > 1) == several, f"{size(tensors) / 1e6:.1f} MB in {len(groups)} files"
    assert not (several and recipe.name == "laptop")
