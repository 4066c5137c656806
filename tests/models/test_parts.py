import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.models.parts import NORMS, Norm, PatchEmbedding, SampleEmbedding, TokenEmbedding, mean_pool
from tests import golden_numbers as golden


@pytest.mark.parametrize("kind", NORMS)
def test_authors_norms_in_eval_and_training(kind):
    arrays = golden.load("mega_norms_and_embedding")
    own = {k.removeprefix(f"{kind}."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(f"{kind}.")}
    norm = Norm(kind, 6).double().eval()
    if kind == "scalenorm":
        norm.scale.data = own["param.norm.scalar"]
    else:
        norm.norm.load_state_dict(
            {
                k.removeprefix("param.norm.").removeprefix("buffer_before.norm."): v
                for k, v in own.items()
                if k.startswith(("param.", "buffer_before."))
            },
            strict=False,
        )
    x = golden.batch_first(arrays["x"])
    for mode in ("eval", "train"):
        norm.train(mode == "train")
        want = golden.batch_first(arrays[f"{kind}.y_{mode}"])
        torch.testing.assert_close(norm(x), want, rtol=0, atol=1e-9)
    if kind == "batchnorm":
        torch.testing.assert_close(norm.norm.running_mean, own["buffer_after.norm.running_mean"])
        torch.testing.assert_close(norm.norm.running_var, own["buffer_after.norm.running_var"])


@pytest.mark.parametrize("kind", NORMS)
def test_padding_never_changes_real_positions_even_in_training(kind):
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 4), value=99.0)
    mask = torch.arange(10).expand(2, 10) < 6
    one, two = Norm(kind, 5).double(), Norm(kind, 5).double()
    torch.testing.assert_close(one(padded, mask)[:, :6], two(x))


def test_authors_embedding_of_numbers():
    arrays = golden.load("mega_norms_and_embedding")
    embedding = SampleEmbedding(6).double()
    embedding.weight.data = torch.from_numpy(arrays["real_embedding.param.weight"])[None]
    embedding.bias.data = torch.from_numpy(arrays["real_embedding.param.bias"])
    y, _ = embedding(torch.from_numpy(arrays["real_embedding.x"]))
    np.testing.assert_allclose(y.detach().numpy(), arrays["real_embedding.y"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23])
def test_patches_with_kernel_equal_to_stride_are_a_linear_map_of_each_patch(length):
    embedding = PatchEmbedding(7, ((4, 4),)).double()
    x = torch.randn(2, length, dtype=torch.float64)
    y, _ = embedding(x)
    patches = F.pad(x, (0, -length % 4)).unflatten(1, (-1, 4))
    conv = embedding.filters[0]
    torch.testing.assert_close(y, embedding.norm(patches / embedding.level @ conv.weight[:, 0].T + conv.bias))


@pytest.mark.parametrize("stages", [((6, 3),), ((5, 2), (4, 4))])
@pytest.mark.parametrize("length", [1, 7, 16, 41])
def test_patches_see_nothing_after_themselves_and_padding_is_silent(stages, length):
    embedding = PatchEmbedding(4, stages).double()
    x = torch.randn(1, length, dtype=torch.float64)
    y, _ = embedding(x)
    assert y.shape[1] == -(-length // embedding.patch)
    padded = torch.cat([x, torch.full((1, 30), torch.nan, dtype=torch.float64)], dim=1)
    mask = torch.arange(length + 30)[None] < length
    got, kept = embedding(padded, mask)
    assert kept.sum() == y.shape[1]
    torch.testing.assert_close(got[:, : y.shape[1]], y)
    later = x.clone()
    later[:, embedding.patch :] += 5
    torch.testing.assert_close(embedding(later)[0][:, 0], y[:, 0])


def test_two_channels():
    x = torch.randn(2, 9, 2)
    assert SampleEmbedding(5, channels=2)(x)[0].shape == (2, 9, 5)
    assert PatchEmbedding(5, ((3, 3),), channels=2)(x)[0].shape == (2, 3, 5)


def test_mean_pool_counts_real_positions_only():
    h = torch.randn(3, 5, 2)
    mask = torch.arange(5).expand(3, 5) < torch.tensor([[5], [2], [0]])
    got = mean_pool(h, mask)
    torch.testing.assert_close(got[0], h[0].mean(0))
    torch.testing.assert_close(got[1], h[1, :2].mean(0))
    assert got[2].abs().sum() == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Norm("instancenorm", 3), "layernorm, batchnorm, scalenorm, rmsnorm"),
        (lambda: TokenEmbedding(5, 3)(torch.ones(2, 4)), "wanted integers"),
        (lambda: SampleEmbedding(3)(torch.ones(2, 4, dtype=torch.long)), "wanted floats"),
        (lambda: SampleEmbedding(3)(torch.ones(2, 4, 2)), "wanted floats"),
        (lambda: PatchEmbedding(3, ()), "pairs"),
        (lambda: PatchEmbedding(3, ((2, 4),)), "kernel >= stride"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
