"""The models of tiny/ for many videos at once, made as sample.py makes one."""

import os
from functools import cache

import numpy as np
import torch

import musicinfuser as mi
from tiny.world import FPS, FRAMES

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(HERE, "work")  # unfinished stages, songs that nothing was trained on
# Of the matrices: four times as fast where the CPU has AMX, a hundred times as slow without AVX-512
DTYPE_NAME = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
DTYPE = mi.DTYPES[DTYPE_NAME]


def in_folder(name):
    return os.path.join(HERE, name)


@cache
def frozen_encoder():
    return mi.load_encoder(in_folder("encoder.safetensors"), dtype=DTYPE)


class Captions:
    """Captions to T5 features, as sampling makes them, but for many at once."""

    def __init__(self):
        self.tokenizer = mi.from_pretrained("AutoTokenizer", in_folder("tokenizer"))
        self.t5 = mi.load_pretrained_model("T5EncoderModel", in_folder("text_encoder"), "cpu")

    @torch.no_grad()
    def __call__(self, texts):
        """((B, L, D), (B, L) bool)"""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return self.t5(**tokens).last_hidden_state, tokens.attention_mask.bool()


class Studio:
    def __init__(self, adapter=None):
        """adapter: a file, or None for the prior alone. float32, as sample.py has it on a CPU."""
        self.dit = mi.load_dit(in_folder("dit.safetensors"))
        self.decoder = mi.load_decoder(in_folder("decoder.safetensors"))
        self.captions, self.listen = Captions(), mi.AudioEncoder(HERE)
        if adapter:
            mi.load_adapter(self.dit, adapter)

    def film(self, prompts, songs=None, seed=0, together=16, **given):
        """uint8 (len(prompts), T, H, W, 3). songs: [(file, start, speed)], or None for silence;
        given: fields of musicinfuser.SamplingOptions."""
        options = mi.settle(mi.SamplingOptions, self.dit.config.sampling, given)
        films = []
        for i in range(0, len(prompts), together):
            y, mask = self.captions(prompts[i : i + together])
            audio = self.hear(songs[i : i + together], options.frames) if songs else None
            seeds = range(seed + i, seed + i + len(y))
            noise = [mi.noise_for(s, self.dit.config, options.frames, options.size) for s in seeds]
            text, null = (y, mask), (y, mask & False)
            videos = mi.noise_to_video(
                self.dit, self.decoder, torch.cat(noise), text, null, audio, options
            )
            films += [mi.to_pixels(video) for video in videos]
        return np.stack(films)

    def hear(self, songs, frames=FRAMES):
        windows = [
            mi.music_window(path, frames, FPS, start, speed)[0] for path, start, speed in songs
        ]
        return torch.cat([self.listen(window) for window in windows])
