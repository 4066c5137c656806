import math

import pytest
import torch

from longseq_tutorial.mechanisms import vector_quantizer as module
from longseq_tutorial.mechanisms.vector_quantizer import VectorQuantizer, codewords, nearest_code, perplexity
from tests import golden_numbers as golden


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- names for keys --------------------------------------------------------------------------------------------------


def test_nearest_code_is_the_nearest(monkeypatch):
    k, codebook = draw(2, 2, 50, 3), draw(2, 6, 3, seed=1)
    codebook[-1, -1] = 1e4
    distance = (k.unsqueeze(3) - codebook[:, None]).square().sum(-1)
    assert torch.equal(nearest_code(k, codebook), distance.argmin(-1))
    monkeypatch.setattr(module, "WORKING_SET", 100)  # in many pieces
    assert torch.equal(nearest_code(k, codebook), distance.argmin(-1))


def test_the_codeword_comes_bit_for_bit_and_the_gradient_straight_through():
    k = (1e3 * draw(2, 2, 30, 3)).float().requires_grad_()
    quantizer = VectorQuantizer(2, 5, 3)
    quantizer.train()(k)  # makes the codebook
    k_hat, z, _ = quantizer.eval()(k)
    assert torch.equal(k_hat, codewords(quantizer.codebook, z))
    weight = torch.randn_like(k_hat)
    assert torch.equal(torch.autograd.grad((k_hat * weight).sum(), k)[0], weight)


def test_perplexity():
    assert perplexity(torch.full((5,), 3.0)).item() == pytest.approx(5)
    assert perplexity(torch.tensor([[0, 7, 0], [1, 1, 0]])).tolist() == pytest.approx([1, 2])
    assert perplexity(torch.zeros(4)).item() == 1


# ---- the codes follow the keys ---------------------------------------------------------------------------------------


def test_learns_in_training_only_and_keeps_no_graph():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(2, 4, 3).double()
    k = draw(2, 2, 30, 3).requires_grad_()
    before = quantizer.eval().codebook
    quantizer(k)
    assert torch.equal(quantizer.codebook, before) and not quantizer.started
    quantizer.train()(k)
    assert quantizer.started and not torch.equal(quantizer.codebook, before)
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("start", ["kmeans++", "keys", "normal"])
def test_padding_enters_neither_sums_counts_nor_loss(start):
    k = draw(2, 2, 30, 3)
    padded = torch.full((2, 2, 45, 3), math.nan, dtype=torch.float64)
    padded[:, :, 5:35] = k
    mask = torch.zeros(2, 45, dtype=torch.bool)
    mask[:, 5:35] = True
    results = []
    for keys, m in ((k, None), (padded, mask)):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(2, 6, 3, start=start).double()
        for _ in range(3):
            _, _, loss = quantizer(keys, m)
        results.append([quantizer.code_sum, quantizer.code_count, loss])
    assert_same(*results)


def test_starts_from_real_keys_and_kmeans_plus_plus_covers_the_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    k = (centres.repeat(25, 1) + torch.randn(100, 2))[None, None]
    for start in ("keys", "kmeans++"):
        quantizer = VectorQuantizer(1, 4, 2, start=start)
        quantizer.set_up(k)
        assert all((code == k[0, 0]).all(-1).any() for code in quantizer.codebook[0])
    assert sorted(torch.cdist(quantizer.codebook[0], centres).argmin(1).tolist()) == [0, 1, 2, 3]
    few = VectorQuantizer(1, 4, 2)
    few.set_up(k[:, :, :2])  # fewer keys than codes
    assert few.codebook.isfinite().all()


def test_dead_codes_restart_at_keys_of_the_batch():
    torch.manual_seed(0)
    k = torch.randn(1, 1, 200, 2)
    far = torch.cat([k[0, :, :3], torch.full((1, 5, 2), 1e3)], dim=1)
    used = {}
    for restart in (0.0, 0.05):
        quantizer = VectorQuantizer(1, 8, 2, decay=0.9, restart=restart)
        quantizer.set_codebook(far)
        for _ in range(60):
            _, z, _ = quantizer(k)
        used[restart] = len(z.unique())
        assert quantizer.codebook.isfinite().all()
    assert used == {0.0: 3, 0.05: 8}
    assert quantizer.perplexity() > 4


def test_learning_lowers_the_error():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(1, 16, 2, decay=0.8, start="keys")
    losses = [quantizer(torch.randn(1, 1, 400, 2))[2].item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_several_processes_add_up():
    """Two processes that see the same batch are one that sees it twice."""

    class Two(VectorQuantizer):
        def all_reduce(self, x):
            return x.mul_(2)

    torch.manual_seed(0)
    two, one = Two(2, 4, 3, start="normal", restart=0), VectorQuantizer(2, 4, 3, start="normal", restart=0)
    one.load_state_dict(two.state_dict())
    k = torch.randn(2, 2, 9, 3)
    two(k)
    one(torch.cat([k, k]))
    torch.testing.assert_close(two.code_sum, one.code_sum)
    torch.testing.assert_close(two.code_count, one.code_count)


def test_averages_stay_in_float32_when_the_module_is_cast():
    quantizer = VectorQuantizer(1, 4, 3).bfloat16()
    k = torch.randn(1, 1, 20, 3).bfloat16()
    k_hat, _, _ = quantizer(k)
    assert quantizer.code_sum.dtype == quantizer.code_count.dtype == torch.float32
    assert k_hat.dtype == torch.bfloat16
    assert quantizer.double().code_sum.dtype == torch.float64


def test_authors_codebook_over_three_updates():
    arrays = {key: torch.from_numpy(a) for key, a in golden.load("vq_codes").items()}
    quantizer = VectorQuantizer(2, 6, 4, arrays["gamma"].item(), start="normal", restart=0).double()
    quantizer.code_sum.copy_(arrays["c_sum0"])
    quantizer.code_count.copy_(arrays["c_count0"])
    for t in range(3):
        step = {key.removeprefix(f"step{t}_"): a for key, a in arrays.items() if key.startswith(f"step{t}_")}
        k, mask = step["vecs"].requires_grad_(), step["mask"].bool()
        assert_same([quantizer.codebook], [step["codebook"]], 1e-9)
        k_hat, z, loss = quantizer(k, mask)
        assert torch.equal(z, step["z"].long())
        assert_same(
            [(k - k_hat).detach().square().sum(-1)[mask[:, None].expand_as(z)]],
            [step["errs2"][mask[:, None].expand_as(z)]],
            1e-9,
        )
        real = mask[:, None, :, None].expand_as(k)
        assert_same([k_hat[real]], [step["quantized"][real]], 1e-9)
        loss = loss * mask.double().mean()  # the authors divide by all positions, we by the real ones
        (grad,) = torch.autograd.grad(loss, k)
        assert_same([loss, grad], [step["l_commit"], step["grad_commit_vecs"]], 1e-9)
        assert_same([quantizer.code_sum, quantizer.code_count], [step["c_sum_next"], step["c_count_next"]], 1e-9)


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: VectorQuantizer(1, 0, 3), "codes, key_dim >= 1"),
        (lambda: VectorQuantizer(1, 2, 3, start="zeros"), "kmeans"),
        (lambda: VectorQuantizer(1, 2, 3)(torch.ones(1, 2, 4, 3)), "codebook must be"),
        (lambda: VectorQuantizer(1, 2, 3)(torch.ones(1, 1, 4, 3), torch.ones(4)), "mask must be bool"),
    ],
)
def test_wrong_input_is_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
