"""The loop that trains every stage of tiny/make.py: resumable, and the same whether it was
stopped or not."""

import math
import os
import time

import torch
import torch.nn as nn
from tqdm import tqdm

import musicinfuser as mi
from tiny.studio import DTYPE, WORK

NEXT = {"prior": "further", "audio": "hear"}  # the stage that goes on from what one makes


def fit(name, parameters, loss, steps, lr, made_of=(), warmup=50, save_every=60):
    """Train `parameters`, {name: tensor}, in place; they end as the moving average of the weights.

    loss(step) -> (loss, {name: number to show}): its randomness must follow from the step alone,
    so that a run that was stopped goes on as if it had not been. The rate falls with a cosine.
    made_of: files that the loss stands on; with others a run that was stopped does not go on.
    Saved every `save_every` seconds. Returns whether any step was left to take. Raises InputError.
    """
    run = Fit(name, parameters, [steps, lr, [mi.file_digest(path) for path in made_of]])
    start, saved, shown = run.resume(), time.time(), {}
    if start == steps:
        print(f"{name}: all steps were taken before; without {run.path} it is trained anew")
    if start == 0 and name in NEXT and os.path.exists(path_of(NEXT[name])):
        os.remove(path_of(NEXT[name]))  # it went on from another
    bar = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=10)
    for step in bar:
        run.put(run.masters)
        value, numbers = loss(step)
        value.backward()
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        run.update(step, lr * min((step + 1) / warmup, cosine))
        for key, number in numbers.items():
            if not math.isnan(number):
                shown[key] = 0.95 * shown.get(key, float(number)) + 0.05 * float(number)
        text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        bar.set_postfix_str(text, refresh=False)
        if time.time() - saved > save_every or step == steps - 1:
            run.save(step + 1)
            saved = time.time()
    run.put(run.average)
    return start < steps


class Fit:
    """Muon for the matrices, AdamW for the rest, on float32 copies of the parameters, so that
    bfloat16 ones lose nothing; and the moving average of the copies."""

    def __init__(self, name, parameters, made_by, decay=0.998):
        self.path = path_of(name)
        self.parameters, self.decay = parameters, decay
        self.key = mi.digest([made_by, {key: p.shape for key, p in parameters.items()}])
        self.masters = {}
        for key, p in parameters.items():
            flat = p.detach().float().flatten(1 if p.ndim > 1 else 0)
            self.masters[key] = flat.clone().requires_grad_()
        self.average = {key: m.detach().clone() for key, m in self.masters.items()}
        hidden = [m for m in self.masters.values() if is_matrix(m)]
        others = [m for m in self.masters.values() if not is_matrix(m)]
        self.muon = Muon(hidden)
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0, fused=True)

    def optimiser_of(self, master):
        return self.muon if is_matrix(master) else self.adamw

    def put(self, weights):
        for key, p in self.parameters.items():
            p.data.copy_(weights[key].view_as(p))

    def update(self, step, rate):
        for key, p in self.parameters.items():
            master = self.masters[key]
            master.grad = None if p.grad is None else p.grad.float().view_as(master)
            p.grad = None
        nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimiser in (self.muon, self.adamw):
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        keep = min(self.decay, (1 + step) / (10 + step))
        masters = [m.detach() for m in self.masters.values()]
        torch._foreach_lerp_(list(self.average.values()), masters, 1 - keep)

    def save(self, step):
        state = {}
        for key, master in self.masters.items():
            state[f"master.{key}"] = master
            state[f"average.{key}"] = self.average[key]
            moments = self.optimiser_of(master).state.get(master, {})
            state |= {f"{name}.{key}": moment for name, moment in moments.items() if name != "step"}
        mi.save_safetensors(self.path, state, {"step": str(step), "key": self.key})

    def resume(self):
        """The step to go on from. Raises InputError for the state of another run."""
        if not os.path.exists(self.path):
            return 0
        tensors, metadata = mi.read_safetensors(self.path)
        if metadata.get("key") != self.key:
            other = "of a run of other steps, sizes or files that it stands on, or of older code"
            raise mi.InputError(f"{self.path} is {other}; remove it to begin anew")
        step = int(metadata["step"])
        for key, master in self.masters.items():
            master.data.copy_(tensors[f"master.{key}"])
            self.average[key].copy_(tensors[f"average.{key}"])
            names = ["momentum_buffer"] if is_matrix(master) else ["exp_avg", "exp_avg_sq"]
            if f"{names[0]}.{key}" not in tensors:  # a parameter that never had a gradient
                continue
            moments = {name: tensors[f"{name}.{key}"].clone() for name in names}
            if not is_matrix(master):
                moments["step"] = torch.tensor(float(step))
            self.optimiser_of(master).state[master] = moments
        return step


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and no weight decay, but in float32:
    PyTorch's computes in bfloat16, a hundred times as slow where the CPU has no AVX-512."""

    def __init__(self, parameters, momentum=0.95):
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(buffer, momentum))  # Nesterov's
                p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])


def orthogonal(matrix, steps=5):
    """The matrix with all singular values near 1, by Newton-Schulz with Keller Jordan's numbers."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, steps).T  # the smaller product
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def path_of(name):
    return os.path.join(WORK, f"{name}.safetensors")


def is_matrix(master):
    return master.ndim > 1 and min(master.shape) > 16


def named(**modules):
    """{name: parameter} of several modules."""
    parameters = {}
    for name, module in modules.items():
        parameters |= {f"{name}.{key}": p for key, p in module.named_parameters()}
    return parameters


def in_dtype(module):
    """The matrices in DTYPE, as load_dit does; trainable."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            layer.to(DTYPE)
    return module.requires_grad_(True)
