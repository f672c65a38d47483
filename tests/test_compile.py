"""--compile: nothing is compiled again after the first steps, whatever comes."""

import pytest
import torch
from conftest import randomize, small_dit
from torch._dynamo.testing import CompileCounter

import musicinfuser as mi


@pytest.fixture
def compiled(monkeypatch):
    """A model to train, whose blocks become graphs but no machine code; and those are counted."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.nn.Module.compile

    def traced(block, **how):
        compile(block, backend=counter, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    dit = randomize(mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24))
    for name, p in dit.named_parameters():
        p.requires_grad_("lora_" in name or "audio" in name)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        mi.compile_blocks(dit)
        mi.checkpoint_layers(dit)
        yield dit, counter


def batch(frames, texts, audio):
    """Latents, noise levels, and prompts of so many tokens; music unless audio is 0."""
    longest = max(texts)
    x = torch.randn(len(texts), 12, frames, 4, 6)
    y_feat = torch.randn(len(texts), longest, 16)
    y_mask = torch.arange(longest) < torch.tensor(texts)[:, None]
    music = torch.randn(len(texts), audio, 24) if audio else None
    return x, torch.rand(len(texts)), y_feat, y_mask, music


def use(dit, texts, frames, audio):
    """A step of training, an evaluation, and the passes of guided sampling."""
    x, *conditions = batch(frames, texts, audio)
    eps = torch.randn_like(x)
    mi.flow_matching_loss(dit, x, *conditions[:1], eps, *conditions[1:]).sum().backward()
    with torch.no_grad():
        for skip in ((), (0,), (1,)):
            dit(x, *conditions, skip)


# What differs in kind: padded or not, a prompt of no token, of one, of several, for each batch size
KINDS = {1: [[0], [1], [4]], 3: [[0, 0, 0], [1, 1, 1], [1, 0, 1], [4, 4, 4], [4, 2, 0]]}
OTHERS = {1: [[9], [2]], 3: [[9, 9, 9], [3, 17, 0]]}


@pytest.mark.parametrize("size", KINDS)
def test_nothing_is_compiled_after_the_first_steps(compiled, size):
    dit, counter = compiled
    for texts in KINDS[size]:
        use(dit, texts, frames=3, audio=9)
    first = counter.frame_count
    assert 0 < first <= torch._dynamo.config.recompile_limit
    for texts in OTHERS[size]:
        for frames, audio in [(4, 12), (2, 0)]:
            use(dit, texts, frames, audio)
    assert counter.frame_count == first


def test_compiled_blocks_give_the_same_gradients(compiled):
    dit, counter = compiled
    plain = randomize(mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24))
    x, *conditions = batch(3, [4, 2], 9)
    for model in (dit, plain):
        model(x, *conditions).square().sum().backward()
    assert counter.frame_count > 0
    for name, p in mi.adapter_parameters(plain).items():
        torch.testing.assert_close(mi.adapter_parameters(dit)[name].grad, p.grad, msg=name)
