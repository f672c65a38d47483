"""What the tests share: a weights folder of the smallest sizes, a song, dance videos; nothing is
fetched, and no trained weights are needed."""

import json
import os
import signal
import subprocess
import sys
import wave
from contextlib import contextmanager

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHONPATH = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, ROOT)

import musicinfuser as mi  # noqa: E402
from test_musicinfuser import close, inputs, randomize, small_dit  # noqa: E402, F401

PROMPT = "a dog dancing in the park"
MEAN, STD = [0.1 * i - 0.5 for i in range(12)], [0.5 + 0.1 * i for i in range(12)]  # not Mochi's


@pytest.fixture(autouse=True)
def seeded():  # not as inputs(), or a test's noise would be its latents
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights folder; its tokenizer is a SentencePiece file and a config, as Mochi's is."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dit = small_dit()
    dit.config.mean, dit.config.std = MEAN, STD
    dit.config.sampling = {"size": [32, 32], "frames": 7, "steps": 2, "cfg": 3.0}
    mi.save_dit(dit, folder / "dit.safetensors")
    randomize(mi.infuse(dit, [0, 2], rank=2, audio_width=16))
    mi.save_adapter(dit, folder / "musicinfuser.safetensors")
    sizes = (8,) * 4, (1,) * 5
    for name, part in (("encoder", mi.Encoder(*sizes)), ("decoder", mi.Decoder(*sizes))):
        mi.save_safetensors(folder / f"{name}.safetensors", randomize(part).state_dict())
    save_tokenizer(folder / "tokenizer")
    save_encoders(folder)
    return folder


def save_tokenizer(folder):
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "the person dances on a stage"] * 20),
        vocab_size=40,
        hard_vocab_limit=False,
        model_prefix=folder / "spiece",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    mi.save_json(folder / "tokenizer_config.json", config)


def save_encoders(folder):
    import transformers

    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    randomize(t5).save_pretrained(folder / "text_encoder")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder / "audio_encoder")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "audio_encoder")


def write_wav(path, *channels, rate=44100):
    samples = (np.stack(channels, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


@pytest.fixture(scope="session")
def song(tmp_path_factory):
    """3 s, stereo, sound on the left only: 400 Hz for a second, then 1000 Hz."""
    t = np.arange(3 * 44100) / 44100
    left = 0.5 * np.sin(2 * np.pi * np.where(t < 1, 400, 1000) * t)
    return write_wav(tmp_path_factory.mktemp("songs") / "song.wav", left, 0 * left)


def command(script, *arguments):
    """What a user's command did: returncode, stdout, stderr."""
    line = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


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


def header_of(whole):
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@contextmanager
def bounded(seconds=None, size=3 << 30):
    """Within it, what takes longer fails, and what allocates more, as on a small machine."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as file:
        (data,) = [line for line in file if line.startswith("VmData")]
    allowed = 1024 * int(data.split()[1]) + size
    before = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, limits[1]))
    signal.alarm(seconds or 0)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, before)


class TooLong(BaseException):
    """Unlike TimeoutError no OSError, which code under test may take for a file's."""


def too_long(*_):
    raise TooLong
