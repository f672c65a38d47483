"""Run folders: what a run of train.py keeps, so that it goes on where it was killed."""

import fcntl
import json
import math
import os
import re
from contextlib import suppress

import musicinfuser as mi

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class RunFolder:
    """config.json, state.safetensors, musicinfuser.safetensors and log.jsonl.

    A context: within it the folder is this process's alone. first: whether this is the one process
    of several that writes.
    """

    def __init__(self, folder, first):
        self.folder, self.first = folder, first
        self.adapter = self.path("musicinfuser.safetensors")
        self.state = self.path("state.safetensors")

    def path(self, name):
        return os.path.join(self.folder, name)

    def __enter__(self):
        if self.first:
            self.check_adapter()
            self.lock()
            mi.clear_temporaries(os.path.abspath(self.folder))
        return self

    def __exit__(self, *_):
        if self.first:
            with suppress(OSError):
                os.rmdir(self.folder)  # if nothing came of it
            os.close(self.handle)

    def check_adapter(self):
        """Raises InputError for one that this run would write over: not a run's own, which has a
        state beside it."""
        if os.path.exists(self.adapter) and not os.path.exists(self.state):
            state = os.path.basename(self.state)
            raise mi.InputError(f"{self.adapter} is there without a {state}; name another --out")

    def lock(self):
        """The system lets go of it however this process ends."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.handle = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.handle)
            busy = f"another train.py is at work in {self.folder}"
            raise mi.InputError(f"{busy}; wait for it, or name another --out") from error
        except OSError as error:
            raise mi.InputError(f"cannot use {self.folder}: {error.strerror}") from error

    def begin(self, config, defaults, free):
        """Go on only with the same run: its config may differ in the names of `free`.

        What an older run did not know had its default.
        """
        if not self.first:
            return
        # As they are in a file: tuples are lists, and paths are text
        config, defaults = json.loads(json.dumps([config, defaults], default=os.fspath))
        if os.path.exists(self.state):
            old = defaults | self.read_config()
            for name in [name for name in config if name not in free]:
                if old.get(name) != config[name]:
                    other = f"{name} {old.get(name)}, not {config[name]}"
                    raise mi.InputError(f"{self.folder} has a run of {other}; name another --out")
        mi.save_json(self.path("config.json"), config)

    def read_config(self):
        path = self.path("config.json")
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            if not isinstance(config, dict):
                raise ValueError("no object")
        except (OSError, ValueError, RecursionError) as error:
            raise mi.InputError(f"{path} cannot be read ({error}); name another --out") from error
        return config

    def save(self, dit, optimiser, step):
        """Raises InputError, and keeps the last good state, where a number is not finite."""
        state = {}
        for name, p in mi.adapter_parameters(dit).items():
            state[f"parameter.{name}"] = p
            for moment, value in optimiser.state.get(p, {}).items():
                state[f"{moment}.{name}"] = value
        for name, tensor in state.items():
            self.check_finite(tensor, f"{name} after step {step - 1}")
        mi.save_safetensors(self.state, state, {"step": str(step)})
        mi.save_adapter(dit, self.adapter)  # last, see check_adapter

    def check_finite(self, tensor, what):
        if tensor.isfinite().all():
            return
        last = "nothing was saved"
        if os.path.exists(self.state):
            last = f"the last good checkpoint is {self.state}"
        raise mi.InputError(f"not finite: {what}; {last}; a lower --lr may help")

    def load(self, dit, optimiser):
        """Back to the last save; returns its step, 0 for a new run."""
        step = 0
        if os.path.exists(self.state):
            step = self.load_state(mi.adapter_parameters(dit), optimiser)
        if self.first:
            self.cut_log(step)
        return step

    def load_state(self, parameters, optimiser):
        tensors, metadata = mi.read_safetensors(self.state)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        mi.check_names(self.state, shapes, self.shapes_of_state(parameters, tensors))
        if not re.fullmatch(r"\d{1,18}", metadata.get("step", "")):
            raise mi.InputError(f"{self.state} does not say its step; delete {self.folder}")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise mi.InputError(f"{self.state} is damaged at {name}; delete {self.folder}")
        for name, p in parameters.items():
            p.data.copy_(tensors[f"parameter.{name}"])
            if f"exp_avg.{name}" in tensors:
                moments = {m: tensors[f"{m}.{name}"].to(p.device, copy=True) for m in MOMENTS}
                optimiser.state[p] = moments | {"step": tensors[f"step.{name}"].clone()}
        return int(metadata["step"])

    def shapes_of_state(self, parameters, tensors):
        shapes = {}
        for name, p in parameters.items():
            shapes[f"parameter.{name}"] = p.shape
            if f"exp_avg.{name}" in tensors:  # absent from one that never had a gradient
                shapes |= {f"{m}.{name}": p.shape for m in MOMENTS} | {f"step.{name}": ()}
        return shapes

    def cut_log(self, step):
        """Leave out the steps after the last save, which come again, and a line cut short."""
        path, whole = self.path("log.jsonl"), []
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                whole = [line for line in file if step_of(line) < step]
        with mi.written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(whole)

    def log(self, line):
        path = self.path("log.jsonl")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise mi.InputError(f"cannot write {path}: {error.strerror}") from error


def step_of(line):
    """Of a line of the log; a damaged one comes after all others."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf
