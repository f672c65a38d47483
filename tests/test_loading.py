"""Model files: strict loading, damaged headers, memory, offloading."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, inputs, randomize, small_dit, with_header
from safetensors import safe_open
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

import musicinfuser as mi

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells")
NAMES = [
    "blocks.1.mlp_y.w1.weight",
    "pos_frequencies",
    "final_layer.mod.bias",
    "blocks.1.attn.proj_x.lora_A",
    "blocks.2.attn.qkv_y.lora_B",
    "audio_cross_attn_blocks.1.to_v.bias",
    "audio_projection.projection.2.weight",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_is_strict(weights, tmp_path, name, change, device):
    adapter = "lora" in name or name.startswith("audio")
    source = weights / ("musicinfuser.safetensors" if adapter else "dit.safetensors")
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    tensor = tensors[name] if change == "extra" else tensors.pop(name)
    if change != "missing":
        tensors[name + "x" * (change == "extra")] = torch.cat([tensor, tensor], -1)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(mi.InputError, match=name):
        if adapter:
            dit = mi.load_dit(weights / "dit.safetensors", device)
            mi.load_adapter(dit, tmp_path / "changed.safetensors")
        else:
            mi.load_dit(tmp_path / "changed.safetensors", device)


def test_meta_device_reads_shapes_only(weights):
    dit = mi.load_dit(weights / "dit.safetensors", "meta")
    mi.load_adapter(dit, weights / "musicinfuser.safetensors")
    assert all(p.is_meta for p in dit.parameters())
    assert (len(dit.blocks), dit.width, dit.adapter.layers) == (3, 32, [0, 2])


def test_matrices_take_the_dtype_and_the_rest_stays_float32(tmp_path):
    saved = small_dit()
    mi.save_dit(saved, tmp_path / "dit.safetensors", torch.float32)
    dit = mi.load_dit(tmp_path / "dit.safetensors", dtype=torch.bfloat16)
    for name, p in dit.named_parameters():
        kept = "norm" in name or name == "pos_frequencies"
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(p, saved.get_parameter(name).to(p.dtype))


def test_config_of_a_model_comes_back(tmp_path):
    dit = small_dit()
    dit.config = mi.ModelConfig(25, [0.5] * 12, [2.0] * 12, {"steps": 9}, {"lr": 0.1})
    mi.save_dit(dit, tmp_path / "dit.safetensors")
    assert mi.load_dit(tmp_path / "dit.safetensors").config == dit.config
    assert mi.ModelConfig() == mi.ModelConfig(30, mi.MOCHI_MEAN, mi.MOCHI_STD, {}, {})


def test_mochis_latents_have_the_statistics_that_diffusers_has():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = diffusers.AutoencoderKLMochi().config
    assert list(mi.MOCHI_MEAN) == list(config.latents_mean)
    assert list(mi.MOCHI_STD) == list(config.latents_std)


def test_an_adapter_that_names_no_layers_is_the_authors(tmp_path):
    """The authors' own, which their code has and their file does not say."""
    layers = [6, 7, 8, 9, 10, 21, 34, 35, 36, 38, 39, 43, 44, 45, 46, 47]
    sizes = dict(width=16, text_width=8, heads=2, t5_width=8)
    adapter = mi.infuse(mi.DiT(48, **sizes), layers, rank=1, audio_width=8)
    mi.save_safetensors(tmp_path / "a.safetensors", mi.adapter_parameters(adapter))
    assert mi.load_adapter(mi.DiT(48, **sizes), tmp_path / "a.safetensors").adapter.layers == layers
    with pytest.raises(mi.InputError, match="after which layers its ZICA goes; name them"):
        mi.load_adapter(mi.DiT(47, **sizes), tmp_path / "a.safetensors")


def test_every_depth_has_a_third():
    assert [mi.third_of(depth) for depth in (1, 2, 3, 12, 48)] == [1, 1, 1, 4, 16]
    assert mi.choose_layers("even", 1) == [0]


def test_equal_files_are_equal_byte_by_byte(tmp_path):
    metadata = {name: name for name in "abcdefgh"}
    for i in range(5):
        mi.save_safetensors(tmp_path / str(i), {"x": torch.zeros(3)}, metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1


def test_an_older_adapter_has_the_defaults_of_what_it_lacks(weights, tmp_path):
    tensors, metadata = mi.read_safetensors(weights / "musicinfuser.safetensors")
    stored = json.loads(metadata["musicinfuser"])
    older = {"layers": stored["layers"], "heads": 8}
    mi.save_safetensors(tmp_path / "older", tensors, metadata | {"musicinfuser": json.dumps(older)})
    dit = mi.load_dit(weights / "dit.safetensors")
    mi.load_adapter(dit, tmp_path / "older")
    assert dit.adapter.window is None and dit.adapter.rank == 2
    newer = json.dumps(stored | {"flavour": 3})
    mi.save_safetensors(tmp_path / "newer", tensors, metadata | {"musicinfuser": newer})
    with pytest.raises(mi.InputError, match="flavour"):
        mi.load_adapter(dit, tmp_path / "newer")


def test_an_adapter_may_lack_a_kind_of_lora(weights, tmp_path):
    dit = mi.load_dit(weights / "dit.safetensors")
    mi.load_adapter(dit, weights / "musicinfuser.safetensors")
    for kind, other in (("qkv_proj", "out_proj"), ("out_proj", "qkv_proj")):
        mi.attach_lora(dit, kind, 3, 6.0)
        randomize(dit.blocks)
        mi.attach_lora(dit, other, 0, 0.0)
        mi.save_adapter(dit, tmp_path / kind)
        loaded = mi.load_adapter(mi.load_dit(weights / "dit.safetensors"), tmp_path / kind)
        assert (loaded.adapter.rank, loaded.adapter.alpha) == (3, 6.0)


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------


ENTRY = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HEADERS = {
    "names twice": f'{{"a":{ENTRY},"a":{ENTRY}}}',
    "metadata null and a twin": f'{{"__metadata__":null,"a":{ENTRY},"a":{ENTRY}}}',
    "metadata a list": f'{{"__metadata__":[1],"a":{ENTRY}}}',
    "negative shape": '{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
    "two negatives": '{"a":{"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]}}',
    "offsets backwards": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}',
    "offsets too far": '{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
    "overlap": f'{{"a":{ENTRY},"b":{ENTRY}}}',
    "unknown dtype": '{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}',
    "deep": "[" * 100_000,
    "no object": "[1, 2]",
    "integers of 16 bits": '{"a":{"dtype":"I16","shape":[0],"data_offsets":[0,0]},"b":'
    + ENTRY
    + "}",
    "float 8": '{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_cannot_be_are_one_line(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(HEADERS[kind].encode(), b"x"))
    with pytest.raises(mi.InputError, match="a.safetensors"):
        mi.read_safetensors(path)


def test_what_a_header_says_beside_what_is_needed_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = ENTRY.replace("{", '{"note":1,')
    path.write_bytes(with_header(f'{{"a":{entry}}}'.encode(), b"x"))
    assert mi.read_safetensors(path)[0]["a"].tolist() == [ord("x")]


@pytest.mark.parametrize("length", [0, 7, 8, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_one_line(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little")[: length if length < 8 else 8] + b"{}")
    with pytest.raises(mi.InputError, match="a.safetensors"):
        mi.read_safetensors(path)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [(), (1,)])
def test_offloading_changes_no_bit(tmp_path, dtype, skip):
    mi.save_dit(small_dit(), tmp_path / "dit.safetensors", torch.float32)
    arguments, audio = inputs()
    results = []
    for offload in (False, True):
        dit = mi.load_dit(tmp_path / "dit.safetensors", dtype=dtype, offload=offload)
        torch.manual_seed(0)
        mi.infuse(dit, [0, 2], rank=2, audio_width=24)
        for p in mi.adapter_parameters(dit).values():
            torch.nn.init.normal_(p, std=0.1)
        mi.checkpoint_layers(dit)
        velocity = dit(*arguments, audio, skip)
        velocity.square().sum().backward()
        gradients = [p.grad for p in mi.adapter_parameters(dit).values() if p.grad is not None]
        results.append([velocity.detach(), *gradients])
    assert len(results[0]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_checkpointing_changes_no_bit():
    results = []
    for checkpointing in (False, True):
        dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24)
        randomize(dit)
        if checkpointing:
            mi.checkpoint_layers(dit)
        arguments, audio = inputs()
        dit(*arguments, audio).square().sum().backward()
        results.append([p.grad for p in mi.adapter_parameters(dit).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("order", ["sampling", "skipping", "training"])
def test_offloading_fetches_the_next_block_ahead(order):
    passes = {"sampling": [*range(5)] * 2, "skipping": [0, 2, 3, 4] * 2}
    passes["training"] = [*range(5), *reversed(range(5)), *range(5)]
    offload = object.__new__(mi.Offload)
    offload.blocks, offload.last = range(5), 0
    ahead, right = None, 0
    for i in passes[order]:
        right += i == ahead
        ahead = offload.following(i)
        offload.last = i
        assert 0 <= ahead < 5
    turns = {"sampling": 1, "skipping": 3, "training": 3}[order]  # where nobody can know
    assert right >= len(passes[order]) - turns


@pytest.mark.parametrize("skip", [(), (2, 3)])
def test_offloading_never_holds_three_blocks(monkeypatch, skip):
    """The copies of a GPU's offloading, made in host memory; their storages are counted."""
    copied, copies, most = mi.Offload.copied, [], [0]

    def counted(offload, i):
        weights = {name: weight.clone() for name, weight in copied(offload, i).items()}
        copies.append(StorageWeakRef(weights["attn.qkv_x.weight"].untyped_storage()))
        most.append(sum(not copy.expired() for copy in copies))
        return weights

    stream = SimpleNamespace(synchronize=int, wait_stream=id)  # which do nothing
    monkeypatch.setattr(mi.Offload, "copied", counted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    dit = mi.infuse(small_dit(depth=6), [0, 2], rank=2, audio_width=24)
    offload = mi.Offload(dit, torch.device("cpu"), torch.float32)
    mi.checkpoint_layers(dit)
    offload.stream = stream
    arguments, audio = inputs()
    for _ in range(2):
        dit(*arguments, audio, skip).square().sum().backward()
        with torch.no_grad():
            dit(*arguments, audio, skip)
    assert len(copies) > 4 * 4 and max(most) == 2


WITHIN = """
import resource, sys, torch, musicinfuser as mi
path, offload, room = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
mi.load_dit(path, "meta")
text = torch.ones(1, 2, 64), torch.ones(1, 2).bool()
data = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
dit = mi.load_dit(path, offload=offload)
print(mi.sample(dit, torch.ones(1, 12, 2, 4, 4), text, text, sigmas=[1, 0.5, 0]).sum().item())
"""


@LINUX
def test_offloading_samples_with_a_model_larger_than_memory(tmp_path):
    path = tmp_path / "dit.safetensors"  # all zeros, a hole in the disk
    with torch.device("meta"):
        dit = mi.DiT(16, 1024, 512, 8, 64)
    header, size = {}, 0
    for name, tensor in dit.state_dict().items():
        end = size + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    path.write_bytes(with_header(header, b""))
    os.truncate(path, os.path.getsize(path) + size)
    room = 300_000_000
    assert 2 * size > 4 * room  # as float32

    def run(offload):
        line = [sys.executable, "-c", WITHIN, path, str(offload), str(room)]
        how = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}  # a thread takes memory
        return subprocess.run(line, **how, capture_output=True, text=True)

    assert run(True).stdout == "384.0\n"
    assert run(False).returncode != 0


LOAD = """
import sys, musicinfuser as mi, torch
mi.load_dit(sys.argv[1], "meta")  # what the first use of everything costs
before = mi.peak_memory("cpu")
dit = mi.load_dit(sys.argv[1], dtype=torch.bfloat16)
print(mi.peak_memory("cpu") - before, sum(p.nbytes for p in dit.parameters()) / 1e9)
"""


@LINUX
def test_loading_as_bfloat16_needs_little_more_than_the_model(tmp_path):
    with torch.device("meta"):
        dit = mi.DiT(5, 768, 256, 6, 256)
    mi.save_dit(dit.to_empty(device="cpu"), tmp_path / "dit.safetensors", torch.float32)
    assert os.path.getsize(tmp_path / "dit.safetensors") > 180e6
    line = [sys.executable, "-c", LOAD, tmp_path / "dit.safetensors"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
    peak, model = map(float, run.stdout.split())
    assert 0.8 * model < peak < 1.15 * model + 0.02


@LINUX
def test_small_files_keep_no_file_open(tmp_path):
    path = tmp_path / "a"
    mi.save_safetensors(path, {"x": torch.zeros(9)})
    held = [mi.read_safetensors(path) for _ in range(50)]
    assert len(held) == 50 and path not in open_files()
    with open(path, "rb"):
        assert path in open_files()


def open_files():
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # listdir's own
            found.add(pathlib.Path(os.readlink(f"/proc/self/fd/{number}")))
    return found
