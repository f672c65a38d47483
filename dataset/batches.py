"""Clips as batches: the kinds mixed, a prompt drawn, noise added."""

import functools
import random
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

import musicinfuser as mi
from dataset.aist import PLAIN
from dataset.cache import Cache


@dataclass
class Batch:
    z: torch.Tensor  # (B, 12, T, H/8, W/8) clean latents in DiT space
    sigma: torch.Tensor  # (B,)
    eps: torch.Tensor  # like z
    conditions: dict  # y_feat (B, L, D_text), y_mask (B, L), audio (B, A, D_audio)
    names: list  # of the clips

    def to(self, device):
        conditions = {name: tensor.to(device) for name, tensor in self.conditions.items()}
        z, sigma, eps = (tensor.to(device) for tensor in (self.z, self.sigma, self.eps))
        return replace(self, z=z, sigma=sigma, eps=eps, conditions=conditions)

    def rows(self, rows):
        """A part of the batch; rows: a slice, or a list of numbers."""
        conditions = {name: tensor[rows] for name, tensor in self.conditions.items()}
        return Batch(self.z[rows], self.sigma[rows], self.eps[rows], conditions, self.names)


class Samples:
    """The samples of a run. What the n-th is follows from the seed and n alone.

    folder: of the cache. texts: {prompt: its entry}, of Preprocessor.texts. config: the model's,
    for its mean and std. options: seed, wild_ratio, base_prompt_ratio, caption_dropout, beta and
    half_life.
    """

    def __init__(self, folder, clips, texts, config, options):
        self.cache, self.clips, self.texts = Cache(folder), clips, texts
        self.config, self.options = config, options
        self.kinds = {"aist": [], "wild": []}
        for clip in clips:
            self.kinds[clip.video.kind].append(clip)

    def digest(self):
        """Of all that a sample can be made of: latents, music, texts, by what made them."""
        made_of = []
        for clip in self.clips:
            texts = [self.texts[prompt] for prompt in clip.video.prompts]
            made_of.append([clip.latents, clip.music, clip.video.kind, *texts])
        return mi.digest(made_of)

    def choose(self, n):
        """(clip, prompt or None, generator) of sample n."""
        rng = random.Random(f"{self.options.seed} {n}")
        clips = self.kinds[self.choose_kind(rng)]
        clip = clips[self.choose_number(n, len(clips))]
        prompt = self.choose_prompt(clip.video, rng)
        if rng.random() < self.options.caption_dropout:
            prompt = None
        return clip, prompt, torch.Generator().manual_seed(rng.getrandbits(48))

    def choose_kind(self, rng):
        """Mixed at the ratio, where there are both."""
        if not self.kinds["wild"]:
            return "aist"
        if not self.kinds["aist"]:
            return "wild"
        ratio = self.options.wild_ratio
        return "wild" if rng.random() < ratio / (1 + ratio) else "aist"

    def choose_number(self, n, count):
        """A clip comes at most once in as many samples as there are clips of its kind."""
        return shuffled(count, f"{self.options.seed} epoch {n // count}")[n % count]

    def choose_prompt(self, video, rng):
        if rng.random() < self.options.base_prompt_ratio:
            return video.plain
        return rng.choice(video.prompts)

    def batch(self, numbers, step):
        """The samples of these numbers, noised as at this step."""
        rows = [self.sample(n, step) for n in numbers]
        return collate(rows, self.config)

    def sample(self, n, step):
        clip, prompt, generator = self.choose(n)
        latents = self.cache.read(clip.latents)
        mean, deviation = latents["mean"], (latents["logvar"] / 2).exp()
        z = mean + deviation * torch.randn(mean.shape, generator=generator)
        sigma = mi.beta_uniform(step, 1, self.options.beta, self.options.half_life, generator)[0]
        eps = torch.randn(mean.shape, generator=generator)
        return Batch(z, sigma, eps, self.conditions(clip, prompt), clip.name)

    def conditions(self, clip, prompt):
        """What the model hears and reads; another condition is another tensor here."""
        text = self.cache.read(self.texts[PLAIN if prompt is None else prompt])
        if prompt is None:
            text["y_mask"] = torch.zeros_like(text["y_mask"])
        return text | self.cache.read(clip.music)

    def held_out(self, clips, count):
        """(batch, the same with the music of other songs): the clips one song after another.

        None where there are fewer than two songs.
        """
        songs = sorted({clip.video.song for clip in clips})
        if len(songs) < 2:
            return None
        chosen = take_turns([[c for c in clips if c.video.song == song] for song in songs], count)
        rows = [self.held_out_sample(i, clip) for i, clip in enumerate(chosen)]
        batch = collate(rows, self.config)
        other = [another_song(chosen, i) for i in range(len(chosen))]
        conditions = batch.conditions | {"audio": batch.conditions["audio"][other]}
        return batch, replace(batch, conditions=conditions)

    def held_out_sample(self, i, clip):
        generator = torch.Generator().manual_seed((self.options.seed * 1000 + i) % 2**64)
        z = self.cache.read(clip.latents)["mean"]
        eps = torch.randn(z.shape, generator=generator)
        return Batch(z, torch.tensor(0.0), eps, self.conditions(clip, PLAIN), clip.name)


@functools.lru_cache(maxsize=4)  # two kinds of clips, where one epoch turns into the next
def shuffled(count, seed):
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def take_turns(groups, count):
    """The first of every group, the second of every group, ..., `count` in all."""
    longest = max(map(len, groups))
    turns = [group[i] for i in range(longest) for group in groups if i < len(group)]
    return turns[:count]


def another_song(clips, i):
    """The number of the clip nearest before clip i, around the end, that has another song."""
    others = (j % len(clips) for j in range(i - 1, i - len(clips), -1))
    return next(j for j in others if clips[j].video.song != clips[i].video.song)


def collate(rows, config):
    """One batch of samples."""
    # The official trainer leaves this out; the sampler works in DiT space
    z = mi.to_dit_space(torch.stack([row.z for row in rows]), config.mean, config.std)
    sigma = torch.stack([row.sigma for row in rows])
    eps = torch.stack([row.eps for row in rows])
    names = rows[0].conditions
    conditions = {name: stack([row.conditions[name] for row in rows]) for name in names}
    return Batch(z, sigma, eps, conditions, [row.names for row in rows])


def stack(tensors):
    """One tensor of all; texts of different lengths are padded at the end."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return pad_sequence(tensors, batch_first=True)
