"""The method a second time: its formulas by another way, and the official code's numbers.

`pytest test_musicinfuser.py` takes a minute; run it while you change things. Everything is small
and random. What surrounds the method (files, commands, training, scores) is tested in tests/.
"""

import hashlib
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import musicinfuser as mi

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "golden.safetensors")


def randomize(module, seed=0):
    """Every parameter at random, also the norms and what starts at zero: no term can hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        deviation = 0.3 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5
        w = deviation * torch.randn(p.shape, generator=generator)
        p.data.copy_(1 + w if p.ndim == 1 and name.endswith("weight") else w)
    return module


def small_dit(depth=3, seed=0, **sizes):
    return randomize(mi.DiT(depth, 32, 16, 2, 16, **sizes), seed)


def infused(*arguments, **options):
    return randomize(mi.infuse(small_dit(), *arguments, audio_width=24, **options), seed=1)


def inputs(seed=0, t=3, h=4, w=6):
    """(x, sigma, y_feat, y_mask), audio; the two texts have 4 and 2 of 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 12, t, h, w, generator=generator)
    y_feat = torch.randn(2, 5, 16, generator=generator)
    y_mask = torch.arange(5) < torch.tensor([[4], [2]])
    audio = torch.randn(2, 13, 24, generator=generator)
    return (x, torch.tensor([0.9, 0.3]), y_feat, y_mask), audio


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


@pytest.fixture(autouse=True)
def seeded():  # not as inputs(), or a test's noise would be its latents
    torch.manual_seed(1234)


# ----------------------------------------------------------------------------------------------
# The official code's outputs, for weights that a formula makes
# ----------------------------------------------------------------------------------------------


def formula_weights(shapes):
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        i = np.arange(math.prod(shape), dtype=np.float64)
        u = 43758.5453 * np.sin(12.9898 * i + 78.233 * (k + 1))
        w = (2 * (u - np.floor(u)) - 1).reshape(shape)
        if len(shape) == 1:
            w = 0.3 * w + name.endswith("weight")
        else:
            w = w * math.sqrt(3 / math.prod(shape[1:]))
        yield name, torch.from_numpy(w).float()


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Stored inputs and outputs, and the modules as loaded: encoder, decoder, dit, adapted."""
    folder, stored = tmp_path_factory.mktemp("golden"), load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        shapes, adapter = (json.loads(file.metadata()[key]) for key in ("shapes", "adapter"))
    for kind in shapes:
        metadata = {"kwargs": json.dumps(adapter["kwargs"])} if kind == "adapter" else None
        save_file(dict(formula_weights(shapes[kind])), folder / f"{kind}.safetensors", metadata)
    stored["encoder"] = mi.load_encoder(folder / "encoder.safetensors")
    stored["decoder"] = mi.load_decoder(folder / "decoder.safetensors")
    stored["dit"], adapted = (mi.load_dit(folder / "dit.safetensors") for _ in range(2))
    path = folder / "adapter.safetensors"
    stored["adapted"] = mi.load_adapter(adapted, path, adapter["layers"])
    return stored


@pytest.mark.parametrize("out, skip", [("base", ()), ("skip_1", (1,)), ("adapted", ())])
def test_transformer_is_the_official_one(golden, out, skip):
    dit, audio = golden["dit"], None
    if out == "adapted":
        dit, audio = golden["adapted"], golden["in.audio"]
    arguments = [golden[f"in.{name}"] for name in ("x", "sigma", "y_feat", "y_mask")]
    close(dit(*arguments, audio, skip), golden[f"out.{out}"], 3e-4)


def test_sampler_is_the_official_one(golden):
    y_feat, y_mask = golden["in.y_feat"], golden["in.y_mask"]
    text, null = ((y_feat[i : i + 1], y_mask[i : i + 1]) for i in (0, 1))
    noise, sigmas = golden["in.x"][:1], mi.linear_quadratic_schedule(4)
    z = mi.sample(golden["adapted"], noise, text, null, golden["in.audio"], sigmas=sigmas, cfg=6.0)
    close(z, golden["out.sampled"], 2e-3)


def test_vae_is_the_official_one(golden):
    mean, logvar = golden["encoder"](golden["in.video"])
    close(mean, golden["out.mean"], 5e-4)
    close(logvar, golden["out.logvar"], 5e-4)
    close(golden["decoder"](golden["in.latents"]), golden["out.decoded"], 5e-4)


PIECES = [(1, 25), (2, 13), (3, 19), (4, 25), (7, 7), (6, 1)]


@pytest.mark.parametrize("chunk, frames", PIECES)
def test_encoding_in_pieces_changes_nothing(golden, chunk, frames):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, frames, 32, 48, generator=generator) * 2 - 1
    wanted = golden["encoder"](video, chunk=99)
    for one, other in zip(golden["encoder"](video, chunk=chunk), wanted):
        assert one.shape == (2, 12, (frames - 1) // 6 + 1, 4, 6)
        close(one, other, 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_decoding_in_pieces_changes_nothing(golden, chunk):
    latents = torch.randn(1, 12, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    whole = golden["decoder"](latents, chunk=99)
    assert whole.shape == (1, 3, 25, 16, 32)
    close(golden["decoder"](latents, chunk=chunk), whole, 1e-5)
    first = golden["decoder"](latents[:, :, :1])  # the first frame is the first latent's alone
    close(first, whole[:, :, :1], 1e-5)


# ----------------------------------------------------------------------------------------------
# diffusers, where it is installed, on the same random weights
# ----------------------------------------------------------------------------------------------

# fmt: off
DIFFUSERS_NAMES = [
    ("x_embedder", "patch_embed"),
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("t5_y_embedder", "time_embed.pooler"), ("t5_yproj", "time_embed.caption_proj"),
    ("final_layer.linear", "proj_out"), ("final_layer.mod", "norm_out.linear"),
    ("blocks.", "transformer_blocks."), ("attn.", "attn1."),
    ("mod_x", "norm1.linear"), ("mod_y", "norm1_context.linear"),
    ("q_norm_x", "norm_q"), ("k_norm_x", "norm_k"),
    ("q_norm_y", "norm_added_q"), ("k_norm_y", "norm_added_k"),
    ("proj_x", "to_out.0"), ("proj_y", "to_add_out"),
    ("mlp_x.w1", "ff.net.0.proj"), ("mlp_x.w2", "ff.net.2"),
    ("mlp_y.w1", "ff_context.net.0.proj"), ("mlp_y.w2", "ff_context.net.2"),
    ("blocks.2.norm1_context.linear", "blocks.2.norm1_context.linear_1"),  # the last of three
]
# fmt: on
THIRDS = {"qkv_x": ("to_q", "to_k", "to_v"), "qkv_y": ("add_q_proj", "add_k_proj", "add_v_proj")}


def to_diffusers(state):
    """q, k and v apart; the feed-forward's gate and the final shift in the second half."""
    for name, w in state.items():
        if ".w1." in name or "final_layer.mod" in name:
            w = w.roll(len(w) // 2, 0)
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        fused = [part for part in THIRDS if part in name]
        if not fused:
            yield name, w
            continue
        for third, part in zip(THIRDS[fused[0]], w.chunk(3)):
            yield name.replace(fused[0], third), part


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("seed, t, h, w", [(1, 3, 4, 6), (2, 1, 8, 2)])
def test_transformer_is_that_of_diffusers(seed, t, h, w):
    diffusers = pytest.importorskip("diffusers")
    ours = small_dit(seed=seed, hidden=(85, 42)).requires_grad_(False)  # not rounded there
    theirs = diffusers.MochiTransformer3DModel(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        pooled_projection_dim=16,
        text_embed_dim=16,
    ).requires_grad_(False)
    theirs.load_state_dict(dict(to_diffusers(ours.state_dict())))
    (x, sigma, y_feat, y_mask), _ = inputs(seed, t, h, w)
    wanted = theirs(x, y_feat, 1000 * (1 - sigma), y_mask, return_dict=False)[0]
    close(ours(x, sigma, y_feat, y_mask), wanted, 1e-4)
    cut = ours(x[1:], sigma[1:], y_feat[1:, :2], y_mask[1:, :2])  # padding changes nothing
    close(cut, wanted[1:], 1e-4)


@pytest.mark.parametrize("seed, frames, height", [(1, 13, 16), (2, 1, 32)])
def test_encoder_is_that_of_diffusers(seed, frames, height):
    diffusers = pytest.importorskip("diffusers")
    sizes = (32, 64, 96, 64), (1,) * 5  # one block a stage: both list tensors in the same order
    ours = randomize(mi.Encoder(*sizes), seed).requires_grad_(False)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=sizes[0],
        layers_per_block=sizes[1],
        decoder_block_out_channels=(32,) * 4,
    ).requires_grad_(False)
    split = []
    for name, w in ours.state_dict().items():
        split += w.chunk(3 if ".qkv." in name else 1)
    vae.encoder.load_state_dict(dict(zip(vae.encoder.state_dict(), split, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(1, 3, frames, height, 24, generator=generator) * 2 - 1
    close(torch.cat(ours(video), 1), vae.encoder(video)[0], 1e-4)


# ----------------------------------------------------------------------------------------------
# The adapter: ZICA (Eq. 6), LoRA, the zeros
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 0, 1])
def test_zica_is_equation_6(window):
    options = mi.AdapterOptions(heads=8, window=window)
    zica = randomize(mi.ZICA(32, options), seed=3).requires_grad_(False)
    x, music = torch.randn(2, 4 * 6, 32), torch.randn(1, 4, 32)  # four latent frames of six tokens
    q, k, v = zica.to_q(x), zica.to_k(music), zica.to_v(music)
    o = torch.zeros_like(x)
    for token in range(24):
        frames = [t for t in range(4) if window is None or abs(t - token // 6) <= window]
        for head in (slice(4 * h, 4 * h + 4) for h in range(8)):
            scores = k[0, frames, head] @ q[:, token, head].T / math.sqrt(4)  # (frames, B)
            o[:, token, head] = scores.softmax(0).T @ v[0, frames, head]
    wanted = x + o @ zica.to_out.weight.T + zica.to_out.bias
    close(zica(x, zica.keys_and_values(music), torch.arange(24) // 6), wanted, 1e-5)


def test_feature_addition_gives_each_token_its_frames_music():
    add = randomize(mi.FeatureAddition(32, mi.AdapterOptions())).requires_grad_(False)
    x, music = torch.randn(2, 3 * 5, 32), torch.randn(1, 3, 32)
    frames = torch.arange(15) // 5
    wanted = x + (music @ add.to_out.weight.T + add.to_out.bias)[:, frames]
    close(add(x, add.keys_and_values(music), frames), wanted, 1e-5)


@pytest.mark.parametrize("tokens, frames", [(31, 3), (27, 4), (125, 13), (3, 5), (4, 4)])
def test_music_is_resized_to_the_nearest_token(tokens, frames):
    project = randomize(mi.AudioProjection(24, 32)).requires_grad_(False)
    audio = torch.randn(2, tokens, 24)
    first, _, second = project.projection
    hidden = F.silu(F.linear(audio, first.weight, first.bias))
    nearest = [i * tokens // frames for i in range(frames)]
    wanted = F.linear(hidden, second.weight, second.bias)[:, nearest]
    close(project(audio, frames), wanted, 1e-6)


@pytest.mark.parametrize("frames, fps", [(13, 30), (46, 30), (4, 24), (3, 60)])
def test_a_frame_that_hears_its_own_moment_hears_what_sounds_with_its_pictures(frames, fps):
    """Every token says when it is heard; by this clock the frames' pictures are shown."""
    count = int(50 * mi.audio_seconds(6 * (frames - 1) + 1, fps))
    project = mi.AudioProjection(1, 1).requires_grad_(False)
    project.projection = torch.nn.Identity()
    heard = (0.02 * torch.arange(count) + 0.0125)[None, :, None]  # seconds
    found = project(heard, frames, fps)[0, :, 0]
    pictures = [[0]] + [range(6 * t - 5, 6 * t + 1) for t in range(1, frames)]
    shown = torch.tensor([sum(several) / len(several) / fps for several in pictures])
    assert (found[1:] - shown[1:]).abs().max() < 0.01001 and found[0] == heard[0, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_lora_is_scaled_by_alpha_over_rank(bias):
    plain = torch.nn.Linear(6, 9, bias=bias)
    linear = randomize(mi.LoRALinear(plain, rank=3, alpha=5)).requires_grad_(False)
    x = torch.randn(4, 6)
    wanted = x @ plain.weight.T + 5 / 3 * (x @ linear.lora_A.T) @ linear.lora_B.T
    close(linear(x), wanted + plain.bias if bias else wanted, 1e-5)


CHANGES = [([0, 2], 4, None, "zica"), ([1], 0, 1, "zica"), ([0, 1, 2], 2, 0, "add")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers, rank, window, kind", CHANGES)
def test_a_fresh_adapter_changes_no_bit(tmp_path, layers, rank, window, kind, dtype):
    mi.save_dit(small_dit(), tmp_path / "dit.safetensors")
    dit = mi.load_dit(tmp_path / "dit.safetensors", dtype=dtype)
    arguments, audio = inputs()
    before = dit(*arguments)
    mi.infuse(dit, layers, rank, window, adapter=kind, audio_width=24)
    assert torch.equal(dit(*arguments, audio), before)
    assert torch.equal(dit(*arguments), before)
    randomize(dit.audio_cross_attn_blocks)
    assert not torch.allclose(dit(*arguments, audio), before, atol=1e-3)
    assert torch.equal(dit(*arguments), before)  # no music, no ZICA


def test_random_init_is_of_the_cross_attention_alone():
    dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24, random_init=True)
    assert all(block.to_out.weight.abs().max() > 0 for block in dit.audio_cross_attn_blocks)
    lora_b = [p for name, p in dit.named_parameters() if name.endswith("lora_B")]
    assert len(lora_b) == 11 and not any(p.any() for p in lora_b)


def test_infusing_again_replaces_what_was_there():
    dit, arguments = small_dit(), inputs()[0]
    names, before = set(dit.state_dict()), dit(*arguments)
    randomize(mi.infuse(dit, [0, 1], rank=2, audio_width=24).audio_projection)
    mi.infuse(dit, [2], rank=0, audio_width=24)
    assert set(dit.state_dict()) == names | set(mi.adapter_parameters(dit))
    close(dit(*arguments), before, 1e-5)


def test_only_the_adapter_is_trained_and_music_reaches_it():
    dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24)
    for name, p in mi.adapter_parameters(dit).items():
        torch.nn.init.normal_(p)
    arguments, audio = inputs()
    dit(*arguments, audio).square().mean().backward()
    trained = {name for name, p in dit.named_parameters() if p.requires_grad}
    reached = {name for name, p in dit.named_parameters() if p.grad is not None}
    assert trained == reached == set(mi.adapter_parameters(dit))
    assert len(trained) == 4 + 2 * 8 + 2 * (3 * 4 - 1)  # the last block has no proj_y


@pytest.mark.parametrize("skip", [(0,), (1,), (0, 2)])
def test_layers_left_out_take_their_zica_along(skip):
    dit, idle = infused([1], rank=0), infused([1], rank=0)
    for i in skip:
        idle.blocks[i].forward = lambda x, y, *_: (x, y)
    arguments, audio = inputs()
    wanted = idle(*arguments, None if 1 in skip else audio)
    assert torch.equal(dit(*arguments, audio, skip), wanted)


def test_conditions_belong_to_the_tensors_they_were_made_of():
    """One tensor sliced in a loop: what was prepared of one slice is never used for another."""
    dit = infused([0, 2], rank=2)
    (x, sigma, y_feat, y_mask), audio = inputs()
    whole = dit(x, sigma, y_feat, y_mask, audio)
    for i in (slice(0, 1), slice(1, 2), slice(0, 1)):
        close(dit(x[i], sigma[i], y_feat[i], y_mask[i], audio[i]), whole[i], 1e-5)
    conditions = dit.prepare(x.shape, y_feat, y_mask, audio)
    for skip in ((), (1,)):
        wanted = dit(x, sigma, y_feat, y_mask, audio, skip)
        assert torch.equal(dit.velocity(x, sigma, conditions, skip), wanted)


ADAPTERS = [([2, 0], 2, {"window": 1, "alpha": 7, "heads": 4}), ([1], 0, {"adapter": "add"})]


@pytest.mark.parametrize("layers, rank, options", ADAPTERS)
def test_adapter_file_round_trip(tmp_path, layers, rank, options):
    dit = infused(layers, rank, **options)
    mi.save_dit(dit, tmp_path / "dit.safetensors", torch.float32)
    mi.save_adapter(dit, tmp_path / "a.safetensors")
    again = mi.load_dit(tmp_path / "dit.safetensors")
    mi.load_adapter(again, tmp_path / "a.safetensors")
    saved, loaded = mi.adapter_parameters(dit), mi.adapter_parameters(again)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert again.adapter == dit.adapter and again.adapter.layers == sorted(layers)
    arguments, audio = inputs()
    close(again(*arguments, audio), dit(*arguments, audio), 1e-5)


def test_lora_scale_multiplies_the_update(tmp_path):
    dit = infused([1], rank=2, alpha=3)
    mi.save_dit(dit, tmp_path / "dit.safetensors", torch.float32)
    mi.save_adapter(dit, tmp_path / "a.safetensors")
    again = mi.load_dit(tmp_path / "dit.safetensors")
    mi.load_adapter(again, tmp_path / "a.safetensors", lora_scale=0.5)
    for name, p in dit.named_parameters():
        if name.endswith("lora_B"):
            p.data.mul_(0.5)
    arguments, audio = inputs()
    close(again(*arguments, audio), dit(*arguments, audio), 1e-5)


def test_the_papers_choices_of_layers():
    assert mi.choose_layers("all", 12) == list(range(12))
    assert mi.choose_layers("first", 48, 16) == list(range(16))
    assert mi.choose_layers("middle", 48, 16) == list(range(16, 32))
    assert mi.choose_layers("last", 48, 16) == list(range(32, 48))
    assert mi.choose_layers("even", 48, 16) == list(range(1, 48, 3))
    assert mi.choose_layers("even", 12) == [1, 4, 7, 10]  # a third


RELEASED = {  # how many tensors and numbers, and the digest of all names and shapes, in their order
    "dit": (879, 10_027_677_744, "a512ec0822d0a331"),
    "encoder": (243, 97_222_016, "ccefa51bb09ae376"),
    "decoder": (162, 362_526_595, "4b882876e24a326b"),
    "musicinfuser": (514, 719_493_120, "ea38f35147425811"),
}


def summary(tensors):
    shapes = sorted((name, list(p.shape)) for name, p in tensors.items())
    names_and_shapes = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    return len(tensors), sum(p.numel() for p in tensors.values()), names_and_shapes


def test_names_and_shapes_are_those_of_the_released_files():
    with torch.device("meta"):
        dit, encoder, decoder = mi.DiT(**mi.MODELS["mochi"]), mi.Encoder(), mi.Decoder()
        assert summary(dit.state_dict()) == RELEASED["dit"]
        assert summary(encoder.state_dict()) == RELEASED["encoder"]
        assert summary(decoder.state_dict()) == RELEASED["decoder"]
        mi.infuse(dit, mi.MUSICINFUSER_LAYERS)
    assert summary(mi.adapter_parameters(dit)) == RELEASED["musicinfuser"]


def test_the_hidden_width_of_a_feed_forward():
    assert mi.FeedForward(100).w2.in_features == 512  # 8/3 of the width, a multiple of 256


# ----------------------------------------------------------------------------------------------
# Noise and loss
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, b", [(0, 3), (200, 2), (400, 1.5), (100_000, 1)])
def test_beta_uniform_is_a_beta_distribution(step, b):
    n, generator = 20_000, torch.Generator().manual_seed(step)
    sigma = mi.beta_uniform(step, n, generator=generator).double().sort().values
    assert sigma.shape == (n,) and 0 <= sigma[0] and sigma[-1] <= 1
    empirical = (torch.arange(n) + 0.5) / n
    distance = (1 - (1 - sigma) ** b - empirical).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in a thousand


def draw(step, **options):
    return mi.beta_uniform(step, 9, **options, generator=torch.Generator().manual_seed(1))


def test_beta_uniform_halves_and_is_seeded():
    assert torch.equal(draw(50, half_life=50), draw(200))
    assert torch.equal(draw(200), draw(0, beta=2))
    assert torch.equal(draw(0, beta=1), draw(700, beta=1))  # uniform throughout
    assert not torch.equal(draw(0), draw(200))


def test_loss_is_the_squared_error_of_the_velocity():
    (z, sigma, y_feat, y_mask), _ = inputs()
    eps = torch.randn_like(z)

    def doubling(x, sigma, *_):
        return 2 * x

    loss = mi.flow_matching_loss(doubling, z, sigma, eps, y_feat, y_mask)
    for b, s in enumerate((0.9, 0.3)):
        x = (1 - s) * z[b] + s * eps[b]
        wanted = (2 * x - z[b] + eps[b]).pow(2).mean()
        assert loss[b].item() == pytest.approx(wanted.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------
# Schedule, guidance, solvers
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 34, 64, 65])
def test_schedule_is_linear_then_quadratic(steps):
    sigmas, half = mi.linear_quadratic_schedule(steps), steps // 2
    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    linear = torch.linspace(1, 0.975, half + 1, dtype=torch.float64)
    close(sigmas[: half + 1], linear, 1e-9)
    i = torch.arange(steps - half + 1).double()
    bend = (sigmas[half] - 0.025 / half * i - sigmas[half:])[1:] / i[1:] ** 2
    close(bend, bend[:1].expand_as(bend), 1e-9)  # smooth at the joint, then one square


def test_schedule_of_four_steps_is_the_official_one():
    wanted = torch.tensor([1, 0.9875, 0.975, 0.725, 0]).double()
    close(mi.linear_quadratic_schedule(4), wanted, 1e-7)


def fake_dit(x, sigma, y_feat, y_mask, audio=None, skip=()):
    """A velocity that tells its branches apart: a number for each of the inputs, times x."""
    music = 0 if audio is None else audio.sum()
    return x * (y_feat.sum() + music - sum(0.01 * layer for layer in skip))


# text 0.3, null 0.1, audio 0.2
GUIDED = [
    ({"cfg": 1}, 0.5),
    ({"cfg": 6.0}, 0.3 + 6 * 0.2),
    ({"cfg": 0}, 0.3),
    ({"cfg": 1, "music_cfg": 2}, 0.5 + 2 * 0.2),
    ({"cfg": 1, "skip": (1, 2), "skip_scale": 4}, 0.5 + 4 * 0.03),
    ({"cfg": 1, "skip": (1,)}, 0.5),
    (
        {"cfg": 3, "music_cfg": 2, "skip": (2,), "skip_scale": 5},
        0.3 + 3 * 0.2 + 2 * 0.2 + 5 * 0.02,
    ),
]


@pytest.mark.parametrize("guidance, factor", GUIDED)
def test_guidance_is_equations_3_and_4(guidance, factor):
    noise, mask = torch.randn(2, 12, 1, 2, 2), torch.ones(1, 1, dtype=torch.bool)
    text, null, audio = (torch.full((1, 1, 1), value) for value in (0.3, 0.1, 0.2))
    sigmas = [1, 0.7, 0.2, 0]
    z = mi.sample(fake_dit, noise, (text, mask), (null, mask), audio, sigmas=sigmas, **guidance)
    close(z, noise * math.prod(1 + h * factor for h in (0.3, 0.5, 0.2)), 1e-4)


def test_music_guides_down_to_a_noise_level():
    noise, mask = torch.randn(2, 12, 1, 2, 2), torch.ones(1, 1, dtype=torch.bool)
    text, audio = (torch.full((1, 1, 1), 0.3), mask), torch.full((1, 1, 1), 0.2)
    guidance = {"cfg": 1, "music_cfg": 2, "music_above": 0.7}
    z = mi.sample(fake_dit, noise, text, text, audio, sigmas=[1, 0.7, 0.2, 0], **guidance)
    close(z, noise * (1 + 0.3 * 0.9) * (1 + 0.5 * 0.9) * (1 + 0.2 * 0.5), 1e-4)


def test_guidance_that_is_misspelt_is_an_error():
    with pytest.raises(TypeError, match="cgf"):
        mi.sample(fake_dit, torch.randn(1, 12, 1, 2, 2), (), (), sigmas=[1, 0], cgf=3)


@pytest.mark.parametrize("solver", mi.SOLVERS)
def test_solvers_are_exact_for_a_constant_velocity(solver):
    noise, z = torch.randn(2, 1, 12, 1, 2, 2)
    seen = []

    def still(x, sigma, *_):
        seen.append(float(sigma))
        return z - noise

    sigmas = mi.linear_quadratic_schedule(5)
    close(mi.sample(still, noise, (), (), sigmas=sigmas, solver=solver, cfg=1), z, 1e-6)
    evaluations = 2 * 5 - 1 if solver == "heun" else 5
    assert len(seen) == evaluations and sorted(set(seen)) == sorted(sigmas[:-1].float().tolist())


ORDERS = {"euler": 1, "ab2": 2, "heun": 2}


@pytest.mark.parametrize("solver", mi.SOLVERS)
def test_solvers_are_of_their_order(solver):
    """dx = -v dsigma with v = (sigma + 1/2) x has x(0) = e x(1); half the steps, 2^order errors."""

    def velocity(x, sigma):
        return (sigma + 0.5) * x

    errors = []
    for steps in (40, 80, 160):
        sigmas = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** 1.5  # uneven
        x = torch.ones(1, dtype=torch.float64)
        solved = mi.SOLVERS[solver](velocity, x, itertools.pairwise(sigmas.tolist()))
        errors.append(abs(solved.item() - math.e))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.15)


def test_ab2_extrapolates_no_further_than_its_last_step():
    """At the bend of Mochi's schedule 4 steps grow 20-fold, and 30 steps 3.5-fold."""
    for steps in (4, 30):
        lengths = -mi.linear_quadratic_schedule(steps).diff()
        at_bend = lengths[steps // 2] / lengths[steps // 2 - 1]
        assert at_bend.item() == pytest.approx(1 + 76 / steps)
    velocities = iter([1.0, 0.0])
    x = mi.ab2(lambda *_: next(velocities), 0.0, [(1.0, 0.99), (0.99, 0.0)])
    assert x == pytest.approx(0.01 + 0.99 * (0 + (0 - 1)))


def test_latents_are_normalised_channel_by_channel():
    z = torch.randn(2, 12, 2, 3, 4)
    normal = mi.to_dit_space(z)
    close(normal[:, 7], (z[:, 7] + 0.09346305707025976) / 1.3720942357788521, 1e-6)
    close(mi.to_vae_space(normal), z, 1e-6)
    close(mi.to_dit_space(z, range(12), [2.0] * 12)[:, 11], (z[:, 11] - 11) / 2, 1e-6)


@pytest.mark.parametrize("channels, groups", [(8, 8), (20, 4), (48, 8), (7, 1), (64, 32), (96, 32)])
def test_group_norm_is_frame_by_frame(channels, groups):
    norm = randomize(mi.GroupNorm(channels)).requires_grad_(False)
    x = torch.randn(2, channels, 3, 4, 5) * torch.tensor([1, 9, 0.1])[:, None, None]
    wanted = [F.group_norm(x[:, :, t], groups, norm.weight, norm.bias, 1e-5) for t in range(3)]
    close(norm(x), torch.stack(wanted, 2), 1e-5)


def test_attention_of_the_encoder_leaves_its_input_as_it_is(monkeypatch):
    block = randomize(mi.AttentionBlock(32)).requires_grad_(False)
    x = torch.randn(1, 32, 3, 4, 5)
    before, whole = x.clone(), block(x)
    with torch.no_grad():
        for limit in ("ELEMENTS_AT_ONCE", "SEQUENCES_AT_ONCE"):
            monkeypatch.setattr(mi.AttentionBlock, limit, 1)  # row by row
            close(block(x), whole, 1e-6)
    assert torch.equal(x, before)


def test_cudnn_attention_is_never_chosen():
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its gradients became NaN for the authors
