"""--compile: nothing is compiled again after the first steps, whatever comes."""

import pytest
import torch
from conftest import randomize, small_dit
from torch._dynamo.testing import CompileCounter

import musicinfuser as mi


@pytest.fixture
def counter(monkeypatch):
    """compile_blocks makes graphs, but no machine code of them; their number is counted."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.nn.Module.compile

    def traced(block, **how):
        compile(block, backend=counter, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counter


def to_train():
    dit = small_dit().requires_grad_(False)
    mi.infuse(dit, [0, 2], rank=2, audio_width=24)
    randomize(torch.nn.ParameterList(mi.adapter_parameters(dit).values()))
    return dit


def batch(frames, texts, audio):
    """Latents, noise levels, and prompts of so many tokens; music unless audio is 0."""
    longest = max(texts)
    x = torch.randn(len(texts), 12, frames, 4, 6)
    y_feat = torch.randn(len(texts), longest, 16)
    y_mask = torch.arange(longest) < torch.tensor(texts)[:, None]
    music = torch.randn(len(texts), audio, 24) if audio else None
    return x, torch.rand(len(texts)), y_feat, y_mask, music


def use(dit, *sizes):
    """The passes of training, of an evaluation and of guided sampling; returns the gradients."""
    inputs = batch(*sizes)
    dit.zero_grad()
    dit(*inputs).square().sum().backward()
    with torch.no_grad():
        for skip in ((), (0,)):
            dit(*inputs, skip)
    return {name: p.grad for name, p in mi.adapter_parameters(dit).items() if p.grad is not None}


def test_nothing_is_compiled_after_the_first_steps(counter):
    dit, plain = to_train(), to_train()
    mi.compile_blocks(dit)
    for model in (dit, plain):
        mi.checkpoint_layers(model)
    for texts in ([0, 0], [4, 4], [4, 2]):  # no prompt, prompts of a length, and of several
        use(dit, 3, texts, 9)
    first = counter.frame_count
    assert 0 < first <= torch._dynamo.config.recompile_limit
    for sizes in [
        (3, [9, 9], 9),
        (4, [3, 17], 12),
        (2, [5, 5], 0),
        (2, [30, 0], 5),
        (5, [0, 0], 9),
    ]:
        torch.manual_seed(0)
        compiled = use(dit, *sizes)
        torch.manual_seed(0)
        wanted = use(plain, *sizes)
        assert compiled.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(compiled[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    assert counter.frame_count == first
