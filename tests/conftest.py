"""What several files of tests need: a weights folder of the smallest sizes, a song, dance videos."""

import math
import os
import sys
import wave

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import musicinfuser as mi

PROMPT = "a dog dancing in the park"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


def randomize(module, seed=0):
    """Every parameter at random, also the norms and what starts at zero, so that no term can hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        scale = 0.3 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5
        w = torch.randn(p.shape, generator=generator) * scale
        p.data.copy_(1 + w if p.ndim == 1 and name.endswith("weight") else w)
    return module


def write_wav(path, *channels, rate=44100):
    samples = (np.stack(channels, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights folder of the smallest sizes; its tokenizer is a SentencePiece file, as Mochi's."""
    import sentencepiece
    from transformers import (
        T5Config,
        T5EncoderModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dit = randomize(mi.DiT(3, 32, 16, 2, 16))
    dit.natural = mi.Natural(height=32, width=32, frames=7, steps=2, cfg=3.0)
    mi.save_dit(dit, folder / "dit.safetensors")
    mi.infuse(dit, [0, 2], rank=2, audio_width=16, zero_init=False)
    mi.save_adapter(dit, folder / "musicinfuser.safetensors")
    encoder, decoder = mi.Encoder((8,) * 4, (1,) * 5), mi.Decoder((8,) * 4, (1,) * 5)
    mi.save_safetensors(folder / "encoder.safetensors", randomize(encoder).state_dict())
    mi.save_safetensors(folder / "decoder.safetensors", randomize(decoder).state_dict())

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "the person dances on a stage"] * 20),
        vocab_size=40,
        hard_vocab_limit=False,
        model_prefix=tokenizer / "spiece",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tokenizer / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    mi.save_json(tokenizer / "tokenizer_config.json", config)
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    randomize(T5EncoderModel(t5)).save_pretrained(folder / "text_encoder")
    wav2vec = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(wav2vec).save_pretrained(folder / "audio_encoder")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "audio_encoder")
    return folder


@pytest.fixture(scope="session")
def song(tmp_path_factory):
    """3 s, stereo, sound on the left only: 400 Hz for a second, then 1000 Hz."""
    t = np.arange(3 * 44100) / 44100
    left = 0.5 * np.sin(2 * np.pi * np.where(t < 1, 400, 1000) * t)
    return write_wav(tmp_path_factory.mktemp("songs") / "song.wav", left, 0 * left)


DANCES = (
    "gBR_sBM_c01_d01_mBR1_ch01",
    "gHO_sFM_c10_d04_d02_mHO2_ch02",
    "gPO_sGR_c01_d07_mPO0_ch03",
    "gKR_sBM_c01_d30_mKR1_ch04",
    "gBR_sBM_c01_d05_mBR0_ch05",  # of a test song, as the next
    "gHO_sBM_c10_d06_mHO5_ch06",
    "gBR_sBM_c05_d01_mBR1_ch01",  # of another camera
)


@pytest.fixture(scope="session")
def dance_videos(song, tmp_path_factory):
    """aist/: four videos to train on, two of test songs, one of another camera, one broken;
    wild/: two, one described. 20 frames of 48x96 each."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate([f"aist/{name}" for name in DANCES] + ["wild/a", "wild/b"]):
        noise = torch.rand(3, 20, 48, 96, generator=torch.Generator().manual_seed(i))
        mi.save_video(folder / f"{name}.mp4", noise * 2 - 1, song=song, start=0.1 * i)
    (folder / "aist" / "gBR_sBM_c01_d02_mBR2_ch09.mp4").write_bytes(b"not a video")
    (folder / "wild" / "a.txt").write_text("a dog on a stage\n")
    return folder
