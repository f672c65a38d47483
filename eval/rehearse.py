"""Mochi's size before Mochi itself:   python -m eval.rehearse DIR [--dtype bfloat16] [--blocks 4]

Writes a weights folder with the names, shapes and layout of the real one and random values, so that
sample.py, train.py and adaptability.py can be tried at full size before anything is downloaded:

    python -m eval.rehearse rehearsal --dtype bfloat16 --frames 7
    python sample.py tiny/song.wav "a dog dancing" --weights rehearsal --offload --steps 2

64 GB in float32, half in bfloat16. They are written a few million numbers at a time, so that it
takes little memory. What is there already is left alone: the same command goes on after a stop.
"""

import filecmp
import json
import math
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from types import SimpleNamespace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import torch
from tqdm import tqdm

import musicinfuser as mi
from musicinfuser import option

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NUMBERS_AT_ONCE = 1 << 22
SHARD = 5_000_000_000  # bytes of a file of transformers, as its own save_pretrained cuts them
ALIGNMENT = 8  # bytes, of a safetensors header


@dataclass
class Options:
    folder: str = option("", "weights folder to write", positional=True)
    dtype: str = option("float32", "of the matrices in the files", choices=tuple(mi.DTYPES))
    blocks: int = option(None, "of the transformer; default: Mochi's 48", low=1)
    frames: int = option(None, "natural length, 6k + 1; default: not said, which is Mochi's 73")
    size: tuple = option(None, "natural size, such as 240x432; default: Mochi's 480x848")
    small: bool = option(False, "all widths as small as a test's")


# ----------------------------------------------------------------------------------------------
# The sizes: Mochi's, as musicinfuser.py has them; google/t5-v1_1-xxl; facebook/wav2vec2-base-960h
# ----------------------------------------------------------------------------------------------

FULL = SimpleNamespace(
    dit=mi.MODELS["mochi"],
    vae={},
    text=dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    audio={},
)
SMALL = SimpleNamespace(
    dit=dict(depth=48, width=64, text_width=32, heads=2, t5_width=16),
    vae=dict(channels=(8, 8, 8, 8), blocks=(1, 1, 1, 1, 1)),
    text=dict(vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
    audio=dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    ),
)


@dataclass
class File:
    """A safetensors file to be: where, its tensors on the meta device, and its metadata."""

    path: str
    tensors: dict
    metadata: dict | None = None

    def size(self):
        return len(header_of(self)) + sum(tensor.nbytes for tensor in self.tensors.values())


def plan(options, sizes, encoders):
    """[File]: all of a weights folder that is random; encoders: {folder: model of transformers}."""
    dtype = mi.DTYPES[options.dtype]
    with torch.device("meta"):
        files = transformer_files(options, sizes)
        files += [File("encoder.safetensors", mi.Encoder(**sizes.vae).state_dict())]
        files += [File("decoder.safetensors", mi.Decoder(**sizes.vae).state_dict())]
    for file in files:
        file.tensors = mi.shrunk(file.tensors, dtype)
    for folder, model in encoders.items():
        files += pretrained_files(folder, model, dtype)
    for file in files:
        file.path = os.path.join(options.folder, file.path)
    return files


def transformer_files(options, sizes):
    """The transformer, and the adapter that its authors' layers make."""
    depth = options.blocks or sizes.dit["depth"]
    dit = mi.DiT(**sizes.dit | {"depth": depth})
    tensors = dit.state_dict()
    layers = [layer for layer in mi.MUSICINFUSER_LAYERS if layer < depth] or [0]
    audio_width = sizes.audio.get("hidden_size", 768)
    mi.infuse(dit, layers, audio_width=audio_width)
    adapter = {"musicinfuser": json.dumps(asdict(dit.adapter))}
    return [
        File("dit.safetensors", tensors, natural(options)),
        File("musicinfuser.safetensors", mi.adapter_parameters(dit), adapter),
    ]


def natural(options):
    """Metadata for another length or size than Mochi's, which its own file does not mention."""
    sampling = {name: getattr(options, name) for name in ("frames", "size")}
    sampling = {name: value for name, value in sampling.items() if value}
    if not sampling:
        return None
    return {"config": json.dumps(asdict(mi.ModelConfig(sampling=sampling)))}


def make_encoders(sizes):
    """{folder: model of transformers, on the meta device}"""
    import transformers  # here, because it takes seconds

    text = transformers.T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes.text)
    audio = transformers.Wav2Vec2Config(**sizes.audio)
    with torch.device("meta"):
        return {
            "text_encoder": transformers.T5EncoderModel(text),
            "audio_encoder": transformers.Wav2Vec2Model(audio),
        }


def pretrained_files(folder, model, dtype):
    """The weights of a model of transformers, in shards with an index where they are large.

    All are of one dtype, as save_pretrained has them.
    """
    named = model.named_parameters()  # what is tied to another comes once
    tensors = {name: p.to(dtype) for name, p in named}
    shards = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and nbytes(shards[-1] | {name: tensor}) > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return [File(f"{folder}/model.safetensors", tensors, {"format": "pt"})]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = zip(names, shards, strict=True)
    return [File(f"{folder}/{name}", shard, {"format": "pt"}) for name, shard in files]


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


# ----------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------


def rehearse(folder, **given):
    """Write the folder; given: the fields of Options. Raises musicinfuser.InputError."""
    options = mi.settle(Options, {}, given | {"folder": folder})
    mi.check_sizes(options.frames or 7, options.size or (16, 16))
    sizes = SMALL if options.small else FULL
    encoders = make_encoders(sizes)
    files = plan(options, sizes, encoders)
    missing = [file for file in files if not is_written(file)]
    check_folder(options.folder, files)
    check_space(options.folder, sum(file.size() for file in missing))
    write_configs(options.folder, encoders)
    write_indices(files)
    write_all(files, missing, options.folder)


def write_all(files, missing, folder):
    total = sum(file.size() for file in files)
    there = total - sum(file.size() for file in missing)
    with tqdm(total=total, initial=there, unit="B", unit_scale=True) as progress:
        for file in missing:
            progress.set_description(os.path.relpath(file.path, folder))
            write_random(file, progress)
    print(f"{folder}: {total / 1e9:.1f} GB")


def is_written(file):
    """Whether it is there. Raises InputError where another file is, which may be a real one."""
    if not os.path.exists(file.path):
        return False
    header = header_of(file)
    with open(file.path, "rb") as existing:
        alike = existing.read(len(header)) == header
    if not alike or os.path.getsize(file.path) != file.size():
        raise mi.InputError(f"{file.path} is there, and is another file; name another folder")
    return True


def check_space(folder, needed):
    """Raises InputError where the disk has less than that many bytes left."""
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    if needed > free:
        missing = f"{folder} takes {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
        raise mi.InputError(f"{missing}; --dtype bfloat16 takes half, --blocks takes fewer")


def check_folder(folder, files):
    """Raises InputError for what is there and is not of a rehearsal: it may be a real model's."""
    ours = {file.path for file in files}
    others = []
    for name in ("text_encoder", "audio_encoder"):
        others += set(mi.safetensors_in(os.path.join(folder, name))) - ours
    own, tokenizer = os.path.join(folder, "tokenizer"), os.path.join(ROOT, "tiny", "tokenizer")
    names = os.listdir(own) if os.path.isdir(own) else []
    _, changed, lacking = filecmp.cmpfiles(own, tokenizer, names, shallow=False)
    others += [os.path.join(own, name) for name in changed + lacking]
    if others:
        raise mi.InputError(f"{min(others)} is there, and is another file; name another folder")


def write_configs(folder, encoders):
    """What is not weights: the encoders' configs, the music's preprocessor, tiny's tokenizer."""
    import transformers

    for name, model in encoders.items():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(os.path.join(folder, name))
    preprocessor = transformers.Wav2Vec2FeatureExtractor()
    preprocessor.save_pretrained(os.path.join(folder, "audio_encoder"))
    tokenizer = os.path.join(ROOT, "tiny", "tokenizer")
    shutil.copytree(tokenizer, os.path.join(folder, "tokenizer"), dirs_exist_ok=True)


def write_indices(files):
    """model.safetensors.index.json beside shards: which file has which tensor."""
    for first in files:
        if "-00001-of-" not in first.path:
            continue
        folder = os.path.dirname(first.path)
        shards = [file for file in files if os.path.dirname(file.path) == folder]
        place = {name: os.path.basename(file.path) for file in shards for name in file.tensors}
        size = sum(tensor.nbytes for file in shards for tensor in file.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": place}
        mi.save_json(os.path.join(folder, "model.safetensors.index.json"), index)


def write_random(file, progress):
    """The whole file or nothing, piece by piece: no tensor is ever in memory whole."""
    generator = torch.Generator().manual_seed(0)
    with mi.written_whole(file.path) as temporary, open(temporary, "wb") as out:
        progress.update(out.write(header_of(file)))
        for name, tensor in in_order(file.tensors):
            for piece in random_pieces(name, tensor, generator):
                progress.update(out.write(piece.view(torch.uint8).numpy()))


def header_of(file):
    """A safetensors file's first bytes: their count, and JSON of names, types, shapes, places."""
    dtypes = {dtype: name for name, dtype in mi.SAFETENSORS_DTYPES.items()}
    header, end = {}, 0
    if file.metadata:
        header["__metadata__"] = file.metadata
    for name, tensor in in_order(file.tensors):
        start, end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": dtypes[tensor.dtype]} | place
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def in_order(tensors):
    """The widest types first, as the library does, so that every number is aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))


def random_pieces(name, tensor, generator):
    """Yield a tensor's numbers, flat; of a scale at which no activation grows or dies."""
    mean, deviation = 0.0, 0.1
    if tensor.ndim > 1:
        deviation = math.prod(tensor.shape[1:]) ** -0.5
    elif name.endswith("weight"):  # a norm's
        mean = 1.0
    for start in range(0, tensor.numel(), NUMBERS_AT_ONCE):
        count = min(NUMBERS_AT_ONCE, tensor.numel() - start)
        piece = torch.randn(count, generator=generator)
        yield piece.mul_(deviation).add_(mean).to(tensor.dtype)


def main():
    parser = mi.parser_for(Options, "A weights folder of Mochi's layout, with random values.")
    given = vars(parser.parse_args())
    if "folder" not in given:
        parser.error("name a folder to write")
    rehearse(**given)


if __name__ == "__main__":
    mi.main(main)
