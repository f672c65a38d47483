"""Tensors that are computed once and kept in a folder, whole or not at all.

An entry is a file of named tensors whose metadata has their checksum, so that one that was
damaged is noticed and made again. Its name tells what made it, so nothing here is ever out of date.
"""

import hashlib
import json
import os
import zlib
from contextlib import contextmanager

import torch

import musicinfuser as mi


class CannotGoOn(mi.InputError):
    """Not one video's fault: the disk is full, or an encoder is missing."""


@contextmanager
def needed_by_all():
    """What fails within it would fail for every video."""
    try:
        yield
    except (mi.InputError, OSError) as error:
        raise CannotGoOn(str(error)) from error


class Cache:
    def __init__(self, folder):
        self.folder = folder
        with needed_by_all():
            os.makedirs(folder, exist_ok=True)
            mi.clear_temporaries(os.path.abspath(folder))
        self.index = Index(self.path("index.jsonl"))

    def path(self, name):
        return os.path.join(self.folder, name)

    def holds(self, name):
        """Whether an entry is there and whole; all of it is read, once."""
        path = self.path(name)
        return os.path.isfile(path) and self.index.recall("whole", path, is_whole)

    def write(self, name, tensors):
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with needed_by_all():
            mi.save_safetensors(self.path(name), tensors, {"checksum": checksum(name, tensors)})
        self.holds(name)  # reads it while it is at hand, so that the next run need not

    def read(self, name):
        """{name: tensor} of an entry, in memory: no file stays open."""
        path = self.path(name)
        if os.path.isfile(path) and not is_whole(path):
            os.remove(path)  # or its size and date would vouch for it
            raise mi.InputError(f"{path} was damaged and is gone; the same command makes it again")
        tensors, _ = mi.read_safetensors(path)
        return {key: tensor.clone() for key, tensor in tensors.items()}

    def digest_of(self, path):
        """Of a file's content. Raises InputError where it cannot be read."""
        return self.index.recall("digest", path, mi.file_digest)

    def digest_of_model(self, folder):
        """Of the files that transformers reads, whatever else a download brought."""
        if not os.path.isdir(folder):
            raise mi.InputError(f"no such folder: {folder}")
        names = sorted(
            n for n in os.listdir(folder) if n.endswith((".json", ".safetensors", ".model"))
        )
        return mi.digest([[name, self.digest_of(os.path.join(folder, name))] for name in names])


class Index:
    """What reading the whole of a file told, remembered for as long as its size and date stay."""

    def __init__(self, path):
        self.path = path
        self.known = {}
        lines = []
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        for line in lines:
            check, _, fact = line.partition(" ")
            if check == check_of(fact):  # else it was cut short or damaged
                key, value = json.loads(fact)
                self.known[key] = value

    def recall(self, what, path, find):
        """find(path), or what it was before."""
        try:
            state = os.stat(path)
            key = f"{what} {os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"
            if key in self.known:
                return self.known[key]
            value = find(path)
        except OSError as error:
            raise mi.InputError(f"{path} cannot be read ({error.strerror})") from error
        self.known[key] = value
        self.append(json.dumps([key, value]))
        return value

    def append(self, fact):
        with needed_by_all(), open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{check_of(fact)} {fact}\n")  # on a line of its own after one cut short


def check_of(text):
    return f"{zlib.crc32(text.encode()):08x}"


def is_whole(path):
    try:
        tensors, metadata = mi.read_safetensors(path)
    except mi.InputError:
        return False
    return metadata.get("checksum") == checksum(os.path.basename(path), tensors)


def checksum(name, tensors):
    """Of an entry's own name too: under another one it answers another question."""
    shapes = [[key, str(t.dtype), list(t.shape)] for key, t in sorted(tensors.items())]
    state = hashlib.sha256(json.dumps([name, shapes]).encode())
    for _, tensor in sorted(tensors.items()):
        state.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
