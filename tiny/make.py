"""Everything in tiny/, from nothing, with fixed seeds. It can be stopped and started again.

python -m tiny.make                           every stage but choose and settings
python -m tiny.make vae text                  these stages
python -m tiny.make data toy                  the toy AIST set, for train.py
python -m tiny.make report --adapter FILE     what an adapter has learnt
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from string import ascii_uppercase

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import adaptability
import musicinfuser as mi
import train
from dataset.aist import TEST_SONGS, list_videos
from eval.quality import reference_statistics
from tiny import listen, music, recordings, world
from tiny.fit import fit, in_dtype, named
from tiny.studio import DTYPE, DTYPE_NAME, HERE, WORK, Captions, frozen_encoder, in_folder
from tiny.world import FPS, FRAMES, SIZE

# What the finished model prefers to Mochi's defaults, in sampling and in train.py
SAMPLING = {"size": [SIZE, SIZE], "frames": FRAMES, "solver": "ab2", "steps": 15}
SAMPLING |= {"cfg": 2.0, "music_cfg": 4.0, "music_above": 0.6}  # of `choose`
SAMPLING |= {"lora_scale": 0.75}  # at 1, dogs are less like dogs
TRAINING = {
    "layers": "all",
    "window": 0,
    "wild_ratio": 2.0,
    "rank": 8,  # of 64, a dog is no dog any more
    "alpha": 4,  # with 8, "a person" is often two, and anywhere, after so many steps
    "steps": 7000,
    "batch": 7,
    "lr": 2e-3,
    "base_prompt_ratio": 0.05,  # "a dance video" is anywhere, so at 0.2 all that names no place is
    "beta": 0.5,  # noise nearer to 1 from the first step to the last
    "half_life": 1e9,
    "audio_dropout": 0.1,
}


def generators(*numbers):
    """numpy's and torch's generators for a step."""
    return np.random.default_rng(numbers), torch.Generator().manual_seed(hash(numbers) % 2**31)


# --------------------------------------------------------------------------------------------------
# The video VAE
# --------------------------------------------------------------------------------------------------


def make_vae(options, steps=3000, seed=1):
    """Most of it on quarters of the pictures, which are faster, then on whole ones and longer."""
    torch.manual_seed(seed)
    encoder, decoder = fresh_vae()
    clips = cache(partial(silent_clips, 1600, seed))  # when the first step wants them

    def loss(step):
        rng, generator = generators(seed, step)
        early = step < 0.75 * steps
        frames, batch, side = (13, 6, SIZE // 2) if early else (25, 3, SIZE)
        video = crops(clips(), frames, batch, side, rng)
        return vae_loss(encoder, decoder, video, min(1, 2 * step / steps), generator)

    fit("vae", named(encoder=encoder, decoder=decoder), loss, steps, 4e-3)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        mi.save_safetensors(in_folder(f"{name}.safetensors"), mi.shrunk(module.state_dict()))
    print(f"VAE: PSNR {psnr(silent_clips(16, seed + 1000)):.2f} dB on 16 unseen clips")


def fresh_vae():
    attention = (False, False, False, True, True)
    encoder = mi.Encoder((24, 40, 72, 88), (0, 1, 2, 2, 1), attention=attention)
    decoder = mi.Decoder((88, 72, 56, 24), (2, 2, 2, 2, 0))
    return in_dtype(encoder), in_dtype(decoder)


def silent_clips(count, seed):
    """uint8 (count, FRAMES, SIZE, SIZE, 3)"""
    rng = np.random.default_rng(seed)
    clips = np.empty((count, FRAMES, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(count), "rendering", mininterval=10):
        clips[i] = world.render(world.draw_scene(rng), world.steady_beat(rng))
    return clips


def crops(clips, frames, batch, side, rng):
    """(batch, 3, frames, side, side) in [-1, 1]"""
    picked = []
    for i in rng.integers(len(clips), size=batch):
        first = rng.integers(FRAMES - frames + 1)
        top, left = rng.integers(SIZE - side + 1, size=2)
        part = clips[i, first : first + frames, top : top + side, left : left + side]
        picked.append(mi.from_pixels(part))
    return torch.stack(picked)


def vae_loss(encoder, decoder, video, warmth, generator):
    """warmth: how much of the KL's weight counts yet, from 0 to 1."""
    mean, logvar = encoder(video)
    logvar = logvar.clamp(-12, 4)
    z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
    error = decoder(z, chunk=99) - video
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = error.square().mean()
    numbers = {"dB": -10 * math.log10(mse.item() / 4), "kl": kl.item()}
    # with 1e-3 for 1e-2 it is 0.3 dB more, and the prior has half as much again to foretell
    return error.abs().mean() + 3 * mse + 1e-2 * warmth * kl, numbers


@torch.no_grad()
def psnr(clips):
    """dB, of clips through the finished VAE."""
    encoder = mi.load_encoder(in_folder("encoder.safetensors"))
    decoder = mi.load_decoder(in_folder("decoder.safetensors"))
    errors = []
    for clip in clips:
        video = mi.from_pixels(clip)[None]
        error = decoder(encoder(video)[0], chunk=99).clamp(-1, 1) - video
        errors.append((error / 2).square().mean().item())
    return -10 * math.log10(np.mean(errors))


# --------------------------------------------------------------------------------------------------
# The text encoder: a small T5 learns to tell from a caption what it says of the scene
# --------------------------------------------------------------------------------------------------

# fmt: off
LABELS = {
    "subject": list(world.SUBJECTS), "count": [1, 2, 3], "colour": [*world.COLOURS, None],
    "place": [*world.PLACES, None], "genre": [*world.GENRES, None], "advanced": [False, True, None],
    "camera": ["01", "10", None],
}
# fmt: on


def make_text(options, steps=500, batch=48, seed=2):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 3, "num_heads": 4}
    shape = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes, **shape))
    heads = nn.ModuleDict({key: nn.Linear(96, len(values)) for key, values in LABELS.items()})

    def loss(step, seed=seed):
        rng, _ = generators(seed, step)
        captions = [world.caption(world.draw_scene(rng), rng) for _ in range(batch)]
        return text_loss(t5, heads, tokenizer, *zip(*captions))

    fit("text", named(t5=t5, heads=heads), loss, steps, 2e-3)
    t5.bfloat16().save_pretrained(in_folder("text_encoder"))
    t5.float()
    with torch.no_grad():
        right = np.mean([loss(i, seed + 1000)[1]["right"] for i in range(10)])
    print(f"text encoder: {right:.3f} of what unseen captions say is told right")


def text_loss(t5, heads, tokenizer, texts, told):
    """Every token is to know the whole caption."""
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    y = t5(**tokens).last_hidden_state  # (B, L, 96)
    weight = tokens.attention_mask / tokens.attention_mask.sum(1, keepdim=True)  # (B, L)
    total, right = 0, []
    for key, head in heads.items():
        logits = head(y)  # (B, L, values)
        target = torch.tensor([LABELS[key].index(values[key]) for values in told])
        each = target[:, None].expand(-1, y.shape[1])
        losses = F.cross_entropy(logits.transpose(1, 2), each, reduction="none")
        total = total + (losses * weight).sum(1).mean()
        guess = (logits * weight[..., None]).sum(1).argmax(1)
        right.append((guess == target).float().mean().item())
    return total, {"loss": total.item(), "right": np.mean(right)}


def make_tokenizer(seed):
    """tiny/tokenizer: T5's two files, spiece.model and tokenizer.json, from one list of pieces."""
    import sentencepiece

    rng = np.random.default_rng(seed)
    lines = [world.caption(world.draw_scene(rng), rng)[0] for _ in range(20000)]
    words = {word for line in lines for word in re.findall("[a-z]+", line.lower())}
    lines += [2 * word for word in sorted(words)]  # a piece has to occur in two words
    folder = in_folder("tokenizer")
    shutil.rmtree(
        folder, ignore_errors=True
    )  # a tokenizer.json of other captions would be taken for this one's
    os.makedirs(folder)
    rules = os.path.join(folder, "lower.tsv")
    with open(rules, "w") as file:  # in place of NFKC's 240 kB
        file.writelines(f"{ord(letter):X}\t{ord(letter.lower()):X}\n" for letter in ascii_uppercase)
        file.writelines(f"{ord(space):X}\t20\n" for space in "\t\n\r\xa0")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=os.path.join(folder, "spiece"),
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_tsv=rules,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-",
        minloglevel=2,
    )
    for name in ("lower.tsv", "spiece.vocab"):
        os.remove(os.path.join(folder, name))
    forget_paths(os.path.join(folder, "spiece.model"))
    return write_tokenizer_json(folder)


def forget_paths(path):
    """SentencePiece notes where it was trained: the same pieces are the same file anywhere."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as file:
        model.ParseFromString(file.read())
    model.trainer_spec.ClearField("model_prefix")
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    with mi.written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(model.SerializeToString(deterministic=True))


def write_tokenizer_json(folder):
    """tokenizer.json beside the folder's spiece.model, every piece with the same number; returns
    the tokenizer."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer

    model = sentencepiece_model_pb2.ModelProto()
    with open(os.path.join(folder, "spiece.model"), "rb") as file:
        model.ParseFromString(file.read())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    rules = model.normalizer_spec.precompiled_charsmap
    tokenizer = T5Tokenizer(pieces, extra_ids=0, _spm_precompiled_charsmap=rules)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_audio(options):
    listen.teach()


def make_hear(options):
    listen.hear_more(options.sounds)


# --------------------------------------------------------------------------------------------------
# The prior: text to silent video, on all subjects
# --------------------------------------------------------------------------------------------------

SHORT, LONG, UNSEEN = (8000, FRAMES, 4), (240, 271, 104), (200, FRAMES, 204)  # clips, frames, seed


def make_prior(options, steps=2400, seed=4):
    """On the first 19 frames of the clips: many pictures a second, and what moves between them."""
    mean, std = (moment.tolist() for moment in moments(latents_of(*SHORT)[0]))
    dit = in_dtype(fresh_dit(seed))
    dit.config = mi.ModelConfig(FPS, tuple(mean), tuple(std), SAMPLING, TRAINING)
    fit_prior("prior", dit, steps, 2e-3, seed, brief)


def make_further(options, steps=2400, seed=14):
    """dit.safetensors goes on from the weights that are there, on whole clips."""
    dit = in_dtype(mi.load_dit(in_folder("dit.safetensors")))
    dit.config = dataclasses.replace(dit.config, sampling=SAMPLING, training=TRAINING)
    fit_prior("further", dit, steps, 1.5e-3, seed, whole)


def make_settings(options):
    """dit.safetensors prefers what stands above; its weights stay to the bit."""
    path = in_folder("dit.safetensors")
    tensors, metadata = mi.read_safetensors(path)
    config = json.loads(metadata["config"]) | {"sampling": SAMPLING, "training": TRAINING}
    mi.save_safetensors(path, tensors, {"config": json.dumps(config)})


def fit_prior(name, dit, steps, lr, seed, sizes):
    """Flow matching on captioned clips, text dropped in one of ten.

    sizes(step) -> (latent frames, clips)"""
    captions, statistics = Captions(), (dit.config.mean, dit.config.std)
    sets = [latents_of(*SHORT), latents_of(*LONG)]
    sets = [(mi.to_dit_space(z, *statistics), scenes) for z, scenes in sets]
    dit.pos_frequencies.requires_grad_(False)

    def loss(step):
        rng, generator = generators(seed, step)
        T, batch = sizes(step)
        z, scenes = sets[T > 13]
        picked = rng.integers(len(z), size=batch)
        y, mask = captions(world.caption(scenes[i], rng)[0] for i in picked)
        mask = mask & torch.from_numpy(rng.random(batch) > 0.1)[:, None]
        z = z[picked, :, :T]
        eps = torch.randn(z.shape, generator=generator)
        losses = mi.flow_matching_loss(dit, z, spread(batch, generator), eps, y, mask)
        return losses.mean(), {f"loss{T}": losses.mean().item()}

    parameters = {key: p for key, p in dit.named_parameters() if p.requires_grad}
    made_of = [in_folder("encoder.safetensors"), in_folder("text_encoder/model.safetensors")]
    made_of.append(world.__file__)
    with fastest(dit):
        fit(name, parameters, loss, steps, lr, made_of, warmup=100)
        found = ", ".join(f"{unseen_loss(dit, captions, T):.3f} of {T}" for T in (4, 13))
    mi.save_dit(dit, in_folder("dit.safetensors"))
    print(f"{name}: loss {found} latent frames of {UNSEEN[0]} unseen clips")


@torch.no_grad()
def unseen_loss(dit, captions, T, seed=9):
    """The mean over clips that nothing is trained on and six noise levels, always the same."""
    z, scenes = latents_of(*UNSEEN)
    z = mi.to_dit_space(z[:, :, :T], dit.config.mean, dit.config.std)
    rng, generator = generators(seed)
    y, mask = captions(world.caption(scene, rng)[0] for scene in scenes)
    eps = torch.randn(z.shape, generator=generator)
    losses = []
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.85, 0.95):
        at = torch.full((len(z),), sigma)
        losses.append(mi.flow_matching_loss(dit, z, at, eps, y, mask).mean().item())
    return np.mean(losses)


def brief(step):
    return 4, 40


def whole(step):
    """One step in five has longer videos."""
    if step % 5 < 4:
        return 13, 32
    return (25, 16) if step % 10 == 4 else (46, 9)


def fastest(dit):
    """The attention kernel to train the DiT with, on a CPU; in bfloat16 its blocks are compiled."""
    if DTYPE == torch.float32:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if shutil.which("g++"):  # a third faster
        print("compiling the blocks, which takes a minute")
        mi.compile_blocks(dit)
    # without it, PyTorch's plain kernel goes by float32; its flash kernel is slower backwards
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel(SDPBackend.MATH)


def moments(z):
    return z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))


def latents_of(count, frames, seed, part=1000):
    """Latents (count, 12, T, 8, 8), VAE space, of silent clips, and their scenes; kept in work/,
    in parts."""
    files = in_folder("encoder.safetensors"), world.__file__
    made_by = mi.digest([count, seed, *map(mi.file_digest, files)])[:12]
    latents, scenes = [], []
    for first in range(0, count, part):
        clips = range(first, min(first + part, count))
        path = os.path.join(WORK, f"latents-{frames}-{made_by}-{first}.safetensors")
        if not os.path.exists(path):
            save_latents(path, clips, frames, seed)
        tensors, metadata = mi.read_safetensors(path)
        latents.append(tensors["latents"])
        scenes += json.loads(metadata["scenes"])
    return torch.cat(latents), scenes


def save_latents(path, clips, frames, seed):
    jobs = [[seed] * len(clips), clips, [frames] * len(clips)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(latents_of_one, *jobs, chunksize=8)
        what = f"latents {clips[0]} to {clips[-1]} of {frames} frames"
        latents, scenes = zip(*tqdm(found, what, len(clips), mininterval=10))
    mi.save_safetensors(
        path, {"latents": torch.from_numpy(np.stack(latents))}, {"scenes": json.dumps(scenes)}
    )


@torch.no_grad()
def latents_of_one(seed, i, frames):
    torch.set_num_threads(1)
    rng = np.random.default_rng((seed, i))
    scene = world.draw_scene(rng)
    clip = world.render(scene, world.steady_beat(rng, frames))
    return frozen_encoder()(mi.from_pixels(clip)[None])[0][0].numpy(), scene


def fresh_dit(seed):
    torch.manual_seed(seed)
    dit = mi.DiT(depth=12, width=160, text_width=80, heads=4, t5_width=96)
    with torch.no_grad():
        # Each axis' share of a head's angles, and their speeds, in radians per latent position
        time = slice(0, 8), 1.5, 0.03
        height = slice(8, 14), 0.06, 0.006
        width = slice(14, 20), 0.06, 0.006
        for axis, (part, high, low) in enumerate((time, height, width)):
            count = part.stop - part.start
            speeds = high * (low / high) ** (torch.arange(count) / (count - 1))
            dit.pos_frequencies[axis, :, part] = speeds
        for block in dit.blocks:  # every block begins as the identity
            for modulation in (block.mod_x, block.mod_y):
                nn.init.zeros_(modulation.weight)
                nn.init.zeros_(modulation.bias)
        nn.init.zeros_(dit.final_layer.linear.weight)
        nn.init.zeros_(dit.final_layer.linear.bias)
    return dit


def spread(size, generator):
    """Noise levels (size,), uniform, one in each of `size` bins."""
    order = torch.randperm(size, generator=generator)
    return (order + torch.rand(size, generator=generator)) / size


# --------------------------------------------------------------------------------------------------
# Which layers should listen, by the Frechet distance to the world's own clips
# --------------------------------------------------------------------------------------------------


def make_layers(options, clips=200, seeds=2):
    """reference.safetensors, the statistics of the world's clips, and adaptability.json, the
    ranking by them."""
    rng = np.random.default_rng(88)
    pictures = (world.render(world.draw_scene(rng), world.steady_beat(rng)) for _ in range(clips))
    videos = (
        mi.from_pixels(frames) for frames in tqdm(pictures, "reference", clips, mininterval=10)
    )
    mi.save_safetensors(
        in_folder("reference.safetensors"), *reference_statistics(videos, frozen_encoder())
    )
    out = os.path.join(WORK, "adaptability")
    adaptability.rank(weights=HERE, seeds=range(seeds), out=out, dtype=DTYPE_NAME)
    shutil.copyfile(os.path.join(out, "adaptability.json"), in_folder("adaptability.json"))


# --------------------------------------------------------------------------------------------------
# The toy AIST set, as mp4s with sound, and the adapters that train.py makes of it
# --------------------------------------------------------------------------------------------------

SONGS = 24  # of each genre, as mBR0, mBR1, ...: AIST has six
UNHEARD = 100  # what those that AIST's split holds out are numbered from, when they are composed


def make_data(options, seed=5):
    """FOLDER/aist: people in the studio, framed as AIST's are; FOLDER/wild: people and rabbits
    anywhere, with captions. Dogs are nowhere."""
    rng = np.random.default_rng(seed)
    folder = os.path.abspath(options.folder)
    mi.check_writable(folder)
    check_folder(folder, options.videos)
    songs = Songs(os.path.join(folder, "songs"), options.sounds)
    aist = options.videos - options.videos // 2
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        films = []
        for i in tqdm(range(options.videos), "songs", mininterval=10):
            drawn = draw_aist(rng, i, aist) if i < aist else draw_wild(rng, i - aist)
            path, scene, song, text = drawn
            danced = songs.dance(*song, int(rng.integers(86, 130)), rng)
            path = os.path.join(folder, path)
            films.append(pool.submit(film_dance, path, scene, text, *danced))
        for film in tqdm(films, "toy data", mininterval=10):
            film.result()


def check_folder(folder, count):
    """Raises InputError for more videos than are made: train.py would take all."""
    kinds = [path for kind in ("aist", "wild") if os.path.isdir(path := os.path.join(folder, kind))]
    found = sum(len(list_videos(path)) for path in kinds)
    if found > count:
        raise mi.InputError(f"{folder} has {found} videos; name another folder, or remove it")


def draw_aist(rng, i, count):
    """(path, scene, song, None) of a video of AIST's kind; song: (name, genre, number). The first
    are two of each song that AIST's split holds out, to which nobody else dances."""
    scene = world.draw_scene(rng, subject="person", place="studio")
    number = int(rng.integers(SONGS))
    if i < min(2 * len(TEST_SONGS), count // 2):
        name = TEST_SONGS[i // 2]
        scene["genre"], number = name[1:3], int(name[3:])
    path = os.path.join("aist", world.aist_name(scene, f"{scene['genre']}{number}", rng))
    name = f"m{scene['genre']}{number}"
    if name in TEST_SONGS:
        number += UNHEARD
    return path, scene, (name, scene["genre"], number), None


def draw_wild(rng, i):
    """The same of another video, with its caption."""
    who, where = str(rng.choice(["person", "rabbit"])), str(rng.choice(world.PLACES))
    scene = world.draw_scene(rng, subject=who, place=where)
    number = int(rng.integers(SONGS))
    name = f"m{scene['genre']}{number}"
    if name in TEST_SONGS:
        name = f"wild-{name}"
    path, song = os.path.join("wild", f"wild-{i:04d}"), (name, scene["genre"], number)
    return path, scene, song, world.caption(scene, rng, genre=0)[0]  # that is for the music to say


def film_dance(path, scene, text, song, start, beat):
    """path.mp4: the scene, danced to a song from `start`; path.txt, where there is a text."""
    torch.set_num_threads(1)
    video = mi.from_pixels(world.render(scene, beat))
    if text is None:  # 172x96: AIST's crop finds the 64x64
        video = F.pad(video, (54, 54, 24, 8), mode="replicate")
    else:
        with mi.written_whole(f"{path}.txt") as temporary, open(temporary, "w") as file:
            file.write(text + "\n")
    mi.save_video(f"{path}.mp4", video, FPS, song, start)


class Songs:
    """The world's songs as files, by four makers in turn: the synthesiser, the same as if it were
    recorded, sampled instruments, and real recordings, which have no genre of their own."""

    def __init__(self, folder, sounds, seconds=20.0):
        self.folder, self.seconds, self.made = folder, seconds, {}
        self.instruments = installed(listen.sampled_instruments, sounds)
        found = installed(recordings.pieces_of, sounds, recordings.TRAINING) or []
        self.recordings = [piece for piece in found if len(piece.samples) > 7 * music.RATE]

    def dance(self, name, genre, number, frames, rng):
        """(path of the song of that name, a start in it in seconds, the position of each of so
        many frames in beats)"""
        path = os.path.join(self.folder, f"{name}.wav")
        if path not in self.made:
            song, beats = self.make(genre, number)
            music.save_wav(path, song)
            self.made[path] = len(song) / music.RATE, beats
        seconds, beats = self.made[path]
        start = rng.uniform(0, seconds - 6)
        times = start + np.arange(frames) / FPS
        return path, start, torch.from_numpy(recordings.beat_at(beats, times)).float()

    def make(self, genre, number):
        """(samples, beats in seconds)"""
        seed = 10_000 * (list(world.GENRES).index(genre) + 1) + number
        rng, maker = np.random.default_rng(seed), number % 4
        if maker == 3 and self.recordings and number < UNHEARD:  # others dance to each recording
            piece = self.recordings[rng.integers(len(self.recordings))]
            samples = piece.samples[: int(self.seconds * music.RATE)]
            return music.level(samples.astype(np.float32)), piece.beats
        tempo = math.exp(rng.uniform(math.log(60), math.log(180)))
        if maker == 2 and self.instruments:
            song = music.play_sampled(genre, tempo, seed, self.seconds, *self.instruments)
        else:
            song = music.compose(genre, tempo, seed, self.seconds)
        if maker > 0:
            song = music.recorded(song, rng)
        return song, np.arange(0, self.seconds + 5, 60 / tempo)


def installed(find, *where):
    """What `find` gives, or None where the packages that it wants are not there."""
    try:
        return find(*where)
    except mi.InputError as error:
        print(f"the synthesiser plays in their place: {error}")
        return None


def make_adapter(options):
    """musicinfuser.safetensors, by train.py as this folder prefers to be trained."""
    train_adapter(options, "musicinfuser", os.path.join(WORK, "musicinfuser"))


def make_plain(options):
    """plain.safetensors: the paper's own ZICA, without a window; of fewer steps."""
    train_adapter(options, "plain", os.path.join(WORK, "plain"), window=None, steps=4000)


def train_adapter(options, name, out, **given):
    data, wild = (os.path.join(options.folder, kind) for kind in ("aist", "wild"))
    path = train.train(data, wild=wild, weights=HERE, out=out, **given)
    tensors, metadata = mi.read_safetensors(path)
    mi.save_safetensors(in_folder(f"{name}.safetensors"), mi.shrunk(tensors), metadata)


def make_song(options, tempo=112, seconds=12, rate=22050):
    """song.wav: disco at 112 BPM, the first beat at 0 s."""
    song = music.compose("WA", tempo, 6, 2 * seconds, rate)  # of half its length, it is another
    music.save_wav(in_folder("song.wav"), song[: seconds * rate], rate)


def make_report(options):
    from tiny import report

    if options.prompts:
        report.of_prompts(options.prompts, options.adapter, options.songs)
    else:
        report.report(options.adapter, options.songs, options.sounds)


def make_choice(options):
    from tiny import report

    report.choose(options.adapter, options.songs)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

# fmt: off
STAGES = {
    "vae": (make_vae, "encoder.safetensors, decoder.safetensors: the video VAE"),
    "text": (make_text, "text_encoder/, tokenizer/: what does the caption say?"),
    "audio": (make_audio, "audio_encoder/: where is the beat?"),
    "hear": (make_hear, "audio_encoder/ goes on with every kind of music (takes --sounds)"),
    "song": (make_song, "song.wav"),
    "prior": (make_prior, "dit.safetensors: captions to silent videos, of 19 frames"),
    "further": (make_further, "dit.safetensors goes on, on videos of 73 to 271 frames"),
    "layers": (make_layers, "reference.safetensors, adaptability.json"),
    "data": (make_data, "FOLDER/aist, FOLDER/wild: the toy AIST set (FOLDER, --videos, --sounds)"),
    "adapter": (make_adapter, "musicinfuser.safetensors, by train.py on toy/"),
    "plain": (make_plain, "plain.safetensors: the paper's own ZICA, without a window"),
    "report": (make_report, "the figures and the pictures (takes --adapter, --songs, --sounds)"),
    "choose": (make_choice, "r over guidance, on other songs than the report's"),
    "settings": (make_settings, "dit.safetensors: its preferences in sampling and training alone"),
}
EXTRA = ("choose", "settings")  # only when they are named
# fmt: on


def parse(arguments=None):
    lines = [f"  {name:8} {what}" for name, (_, what) in STAGES.items()]
    parser = argparse.ArgumentParser(
        prog="python -m tiny.make",
        description=__doc__ + "\nstages:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "stages",
        nargs="*",
        metavar="STAGE",
        help="default: all but choose and settings; after data, its FOLDER",
    )
    add("--videos", type=int, default=1600, help="of data, half of AIST's kind (default 1600)")
    add(
        "--sounds",
        default="/usr/share",
        help="where fluidsynth's and Debian's sounds are (default /usr/share)",
    )
    add("--adapter", help="of report and choose: another adapter's file")
    add("--songs", type=int, default=32, help="of report and choose: how many (default 32)")
    add("--prompts", nargs="+", help="of report: only these, such as 'a person dancing in a park'")
    options = parser.parse_args(arguments)
    options.folder = "toy"
    if (
        options.stages[:1] == ["data"]
        and len(options.stages) == 2
        and options.stages[1] not in STAGES
    ):
        options.folder = options.stages.pop()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise mi.InputError(f"no stage {unknown[0]}; there are {', '.join(STAGES)}")
    if options.videos < 1 or options.songs < 2:
        raise mi.InputError("--videos takes 1 or more, --songs 2 or more")
    return options


def main():
    options = parse()
    print(f"device   cpu, dtype {DTYPE_NAME} in training, float32 in filming", flush=True)
    stages = options.stages or [stage for stage in STAGES if stage not in EXTRA]
    if "hear" in stages:
        listen.check_sounds(options.sounds)
    for stage in stages:
        STAGES[stage][0](options)


if __name__ == "__main__":
    mi.main(main)
