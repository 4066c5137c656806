import pytest
import torch

from longseq_tutorial.models import build, record
from tests.models.any_task import SMALL, TOKENS, VARIANTS, inputs


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_recording_sees_weights_and_changes_nothing(name, options):
    model = build(name, TOKENS, **SMALL[name], **options).double().eval()
    x, mask = inputs(TOKENS), torch.arange(13).expand(3, 13) < 10
    want = model(x, mask)
    with record(model) as tape:
        got = model(x, mask)
    assert torch.equal(got, want)
    weights = [tape[n] for n in tape.names("weights")]
    hidden = name == "longvq" or (name == "fastrpb" and options.get("attention") != "softmax")  # never computed at all
    assert len(weights) == (0 if hidden else 2)
    for w in weights:
        assert not w.requires_grad
        if options.get("attention", "softmax") == "softmax":  # rows sum to 1
            total = w.sum(-1)
            rest = total == 0 if name == "seqboat" else torch.zeros_like(total, dtype=torch.bool)  # rows that fill up
            torch.testing.assert_close(total.masked_fill(rest, 1), torch.ones_like(total))
    if name.startswith("mega") or name in ("seqboat", "longvq"):
        assert len(tape.names("kernel_seen")) == 2
    if name == "spade":
        assert len(tape.names("kernel_seen")) == options.get("s4_layers", 1)
    if name == "longvq":
        assert len(tape.names("codes_seen")) == len(tape.names("update_gate")) == 2
    if name == "fastrpb":
        assert len(tape.names("lags_seen")) == (0 if options.get("bias") == "none" else 2)
        assert len(tape.names("queries")) == (2 if hidden else 0)
    if name.startswith("mega"):
        assert len(tape.names("update_gate")) == 2
    if name == "seqboat":
        switches = 0 if options.get("always_active") else 2
        assert len(tape.names("active_seen")) == len(tape.names("confidence_seen")) == switches
    length = len(tape)
    model(x, mask)
    assert len(tape) == length and all(len(tape.all(n)) == 1 for n in tape)


def test_recorder_says_what_it_knows():
    with pytest.raises(ValueError, match="nothing to record"), record(torch.nn.Linear(2, 2)):
        pass
    model = build("mega", TOKENS, **SMALL["mega"])
    with record(model) as tape:
        model(inputs(TOKENS))
    with pytest.raises(KeyError, match="names 2 recordings"):
        tape["weights"]
    assert "layers.1.mega.attention.weights" in tape
    assert "encoder.layers.0.mega.attention.weights: 1 x (3, 13, 13)" in repr(tape)
