"""What only a GPU can show; skipped where there is none."""

import os

import pytest
import torch
from conftest import PROMPT, ROOT, inputs, randomize, small_dit
from safetensors.torch import load_file

import adaptability
import musicinfuser as mi
import sample
import train

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def infused(device, dtype):
    """The same model anywhere, its adapter in float32 as in training."""
    torch.manual_seed(0)
    dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24)
    randomize(torch.nn.ParameterList(mi.adapter_parameters(dit).values()))
    for name, p in dit.named_parameters():
        trained = name in mi.adapter_parameters(dit)
        p.requires_grad_(trained)
        p.data = p.data.to(device, torch.float32 if trained else mi.dtype_in(dit, name, dtype))
    return dit


def velocity_and_gradients(dit):
    """Of an infused model: two tensors on a CPU, all gradients in one."""
    device = dit.pos_frequencies.device
    arguments, audio = inputs()
    v = dit(*(x.to(device) for x in arguments), audio.to(device))
    v.square().mean().backward()
    gradients = [p.grad.flatten() for p in mi.adapter_parameters(dit).values()]
    return v.detach().cpu(), torch.cat(gradients).cpu()


def apart(found, wanted):
    """The size of their difference, of the wanted's own."""
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_velocity_and_gradients_are_a_cpus(dtype, error):
    wanted = velocity_and_gradients(infused("cpu", torch.float32))
    found = velocity_and_gradients(infused(GPU, dtype))
    assert apart(found[0], wanted[0]) < error and apart(found[1], wanted[1]) < error


@pytest.mark.parametrize("dtype", mi.DTYPES.values())
@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_blocks_give_the_same_bits(dtype, checkpointed):
    results = []
    for offload in (False, True):
        dit = infused("cpu" if offload else GPU, dtype)
        if offload:
            for name, p in dit.named_parameters():
                if not name.startswith("blocks.") or "lora_" in name:
                    p.data = p.data.to(GPU)
            mi.Offload(dit, torch.device(GPU), dtype)
        if checkpointed:
            mi.checkpoint_layers(dit)
        results.append(velocity_and_gradients(dit))
    for resident, offloaded in zip(*results, strict=True):
        assert torch.equal(resident, offloaded)


def test_compiled_blocks_give_the_same():
    wanted, compiled = infused(GPU, torch.float32), infused(GPU, torch.float32)
    mi.compile_blocks(compiled)
    mi.checkpoint_layers(compiled)
    for a, b in zip(*map(velocity_and_gradients, (compiled, wanted)), strict=True):
        assert apart(a, b) < 1e-5


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-3), (torch.bfloat16, 0.05)])
def test_the_vae_is_a_cpus(dtype, error):
    x = torch.rand(1, 3, 7, 64, 64) * 2 - 1
    for load, name in ((mi.load_encoder, "encoder"), (mi.load_decoder, "decoder")):
        path = os.path.join(ROOT, "tiny", f"{name}.safetensors")
        with torch.inference_mode():
            wanted, found = load(path)(x), load(path, GPU, dtype)(x.to(GPU))
        if name == "encoder":  # means, which are the decoder's input, and logarithms of variances
            (wanted, _), (found, _) = wanted, found
        assert apart(found.float().cpu(), wanted) < error
        x = wanted


@pytest.mark.parametrize("dtype", mi.DTYPES)
def test_a_seed_makes_the_same_video_offloaded_or_not(weights, song, tmp_path, dtype):
    def video(**more):
        how = {"weights": str(weights), "out": str(tmp_path), "device": GPU, "dtype": dtype}
        [path] = sample.generate(str(song), PROMPT, **how | more)
        with open(path, "rb") as file:
            return file.read()

    assert video() == video() == video(offload=True)


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_that_is_gone_on_with_ends_the_same(weights, dance_videos, tmp_path, offload):
    options = {"weights": str(weights), "layers": "0,2", "rank": 2, "save_every": 2, "batch": 2}
    options |= {"steps": 6, "device": GPU, "dtype": "bfloat16", "wild": str(dance_videos / "wild")}

    def fit(out, **more):
        return train.train(str(dance_videos / "aist"), out=str(tmp_path / out), **options | more)

    def stop(trainer, step, step_of=train.Trainer.step):
        if step == 4:
            raise KeyboardInterrupt
        return step_of(trainer, step)

    whole = fit("whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "step", stop)
        fit("broken", offload=offload)
    again = load_file(fit("broken", offload=offload))
    for name, tensor in load_file(whole).items():
        assert torch.equal(again[name], tensor), name


def test_layers_are_ranked(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(mi, "brightness", lambda video: video.mean().item(), raising=False)
    options = {"weights": str(weights), "metric": "musicinfuser:brightness", "seeds": (0, 1)}
    report = adaptability.rank(out=str(tmp_path), prompts=(PROMPT,), device=GPU, **options)
    assert sorted(report["ranking"]) == [0, 1, 2]
