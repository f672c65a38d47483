"""How exact is each solver, and at what cost?   python -m eval.solvers [SONG] [PROMPT]

Solves the same equation by every solver with several numbers of steps, and compares with a fine
solution: the RMS error of the latents, which deviate by 1, and the PSNR of the decoded video, over
evaluations. An evaluation is one of the guided velocity, of two passes through the transformer, or
three with --music-cfg: their number is what a video costs. Writes a table and errors.json, in
which all that was measured is kept, and errors.png where matplotlib is installed.

The flags are those of sample.py, but that --solver, --steps and --seed take several. The default
takes minutes with the model in tiny/; a GPU and Mochi's weights take the same command.
"""

import json
import os
import signal
from dataclasses import dataclass, fields
from functools import partial

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import numpy as np
import torch
from tqdm import tqdm

import musicinfuser as mi
import sample
from eval.plot import load_pyplot, read_json
from eval.tables import markdown
from musicinfuser import option

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = (5, 10, 15, 20, 30, 40)


@dataclass
class Options(sample.Options):
    song: str = option(os.path.join(ROOT, "tiny", "song.wav"), "any sound file", positional=True)
    prompt: str = option("a person dancing on a stage", "of the videos", positional=True)
    solver: tuple = option(tuple(mi.SOLVERS), "which are compared", parse=str, line="solver")
    steps: tuple = option(STEPS, "of each solver", parse=int, line="solver")
    seeds: tuple = option((0, 1), "a video for each", parse=int, flag="--seed", line="solver")
    fine: int = option(160, "steps of the fine solution", low=2, line="solver")
    fine_solver: str = option("heun", "of the fine solution", choices=tuple(mi.SOLVERS))
    out: str = option("outputs/solvers", "folder; the same command goes on in it")


def compare(**given):
    """Measure what is missing in the folder, print the table, draw the picture.

    given: the fields of Options. Returns what curves does. Raises musicinfuser.InputError.
    """
    several = {"solver": Options.solver, "steps": Options.steps}  # not the one that weights prefer
    options, dit = mi.begin(Options, "sampling", several | given)
    check(options, dit)
    results = read_results(options)
    missing = [case for case in cases_of(options) if name_of(*case) not in results["errors"]]
    mi.print_options(options)
    if missing:
        equation = Equation(options, dit)
        for seed in options.seeds:
            measure(equation, [case for case in missing if case[0] == seed], results)
    means = curves(options, results)
    print_table(options, means)
    picture(options, means)
    return means


def check(options, dit):
    """Raises InputError for what the options' limits do not rule out."""
    sample.check(options, dit)
    unknown = set(options.solver) - set(mi.SOLVERS)
    if unknown or not options.solver:
        raise mi.InputError(f"--solver takes {', '.join(mi.SOLVERS)}, not {list(options.solver)}")
    if options.whole_song or sample.plan_of(options):
        raise mi.InputError(f"films are made at once here, of up to {options.window_frames} frames")
    if not options.steps or min(options.steps) < 2:
        raise mi.InputError(f"--steps takes numbers from 2, not {list(options.steps)}")


def cases_of(options):
    """[(seed, solver, steps)]: all that is measured."""
    cases = []
    for seed in options.seeds:
        for solver in options.solver:
            cases += [(seed, solver, steps) for steps in sorted(set(options.steps))]
    return cases


def name_of(seed, solver, steps):
    return f"seed {seed}, {solver}, {steps} steps"


# ----------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------


class Equation:
    """A song and a prompt: dx = -v dsigma from a seed's noise, and what its solution looks like."""

    def __init__(self, options, dit):
        waveform = sample.window_of_song(options, dit.config.fps)
        self.options = options
        self.text, self.null, self.audio = sample.encode(options, dit, waveform)
        self.dit, self.decoder = sample.load(options)

    def solve(self, seed, solver, steps):
        """Latents (1, 12, T, H, W) in DiT space."""
        o = self.options
        noise = mi.noise_for(seed, self.dit.config, o.frames, o.size).to(o.device)
        guidance = {name: getattr(o, name) for name in GUIDANCE}
        sigmas = mi.linear_quadratic_schedule(steps)
        progress = partial(tqdm, desc=name_of(seed, solver, steps), leave=False)
        how = dict(sigmas=sigmas, solver=solver, progress=progress, **guidance)
        return mi.sample(self.dit, noise, self.text, self.null, self.audio, **how)

    @torch.inference_mode()
    def decode(self, z):
        """A video (1, 3, T, H, W) in [-1, 1]."""
        config = self.dit.config
        return self.decoder(mi.to_vae_space(z, config.mean, config.std)).clamp(-1, 1)

    def finely(self, seed):
        """The fine solution, computed once and kept."""
        path = os.path.join(self.options.out, f"fine-{seed}.safetensors")
        if os.path.exists(path):
            tensors, _ = mi.read_safetensors(path)
            return tensors["z"].to(self.options.device)
        z = self.solve(seed, self.options.fine_solver, self.options.fine)
        mi.save_safetensors(path, {"z": z})
        return z


def measure(equation, cases, results):
    """The errors of one seed's cases, into the results and their file, one by one."""
    if not cases:
        return
    fine = equation.finely(cases[0][0])
    film = equation.decode(fine)
    for seed, solver, steps in tqdm(cases, f"seed {cases[0][0]}"):
        z = equation.solve(seed, solver, steps)
        results["errors"][name_of(seed, solver, steps)] = {
            "evaluations": evaluations(solver, steps),
            "rms": (z - fine).square().mean().sqrt().item(),
            "psnr": psnr(equation.decode(z), film),
        }
        mi.save_json(path_of(equation.options), results)


def psnr(video, wanted):
    """dB, of videos in [-1, 1]; 120 for equal ones."""
    error = ((video - wanted) / 2).square().mean().clamp(min=1e-12)
    return -10 * error.log10().item()


def evaluations(solver, steps):
    """How often a solver asks for the velocity."""
    asked = []

    def velocity(x, sigma):
        asked.append(sigma)
        return x

    sigmas = mi.linear_quadratic_schedule(steps).tolist()
    mi.SOLVERS[solver](velocity, 1.0, list(zip(sigmas, sigmas[1:])))
    return len(asked)


# ----------------------------------------------------------------------------------------------
# What is kept
# ----------------------------------------------------------------------------------------------


def path_of(options):
    return os.path.join(options.out, "errors.json")


GUIDANCE = [f.name for f in fields(mi.Guidance)]
IDENTITY = "prompt", "negative", "start", "speed", "size", "frames", "lora_scale", "dtype", "device"
IDENTITY += *GUIDANCE, "fine", "fine_solver"


def identity(options):
    """What decides the errors, files by their content."""
    found = {name: getattr(options, name) for name in IDENTITY}
    found["song"] = mi.file_digest(options.song)
    found["model"] = [mi.model_digest(path) for path in sample.files_of(options.weights)]
    if options.adapter != "none":
        found["adapter"] = mi.model_digest(options.adapter)
    return json.loads(json.dumps(found))  # as it is read again


def read_results(options):
    """{"of": identity, "errors": {name of a case: errors}}. Raises InputError for another's."""
    of, path = identity(options), path_of(options)
    if not os.path.exists(path):
        mi.save_json(path, {"of": of, "errors": {}})  # the fine solutions here are of this, too
    results = read_json(path)
    stored = results.get("of", {})
    changed = [name for name in of if stored.get(name) != of[name]]
    if changed:
        raise mi.InputError(f"{path} was measured with another {changed[0]}; name another --out")
    return results


# ----------------------------------------------------------------------------------------------
# The table and the picture
# ----------------------------------------------------------------------------------------------


def curves(options, results):
    """{solver: [{steps, evaluations, rms, psnr}]}: means over the seeds."""
    found = {}
    for solver in options.solver:
        found[solver] = []
        for steps in sorted(set(options.steps)):
            names = [name_of(seed, solver, steps) for seed in options.seeds]
            errors = [results["errors"][name] for name in names]
            point = {key: sum(e[key] for e in errors) / len(errors) for key in errors[0]}
            found[solver].append(point | {"steps": steps})
    return found


def print_table(options, curves):
    head = ["solver", "steps", "evaluations", "RMS error of the latents", "PSNR, dB"]
    rows = []
    for solver, points in curves.items():
        for point in points:
            cost = [solver, point["steps"], round(point["evaluations"])]
            rows.append(cost + [f"{point['rms']:.4f}", f"{point['psnr']:.1f}"])
    seeds = ", ".join(map(str, options.seeds))
    print(f"\nAgainst {options.fine} steps of {options.fine_solver}, the mean of seed {seeds}:\n")
    print(markdown(head, *rows))
    for solver in [solver for solver in curves if solver != options.solver[0]]:
        print_equals(options.solver[0], solver, curves)


def print_equals(first, solver, curves):
    """How many evaluations of a solver do what most of the first one's do."""
    most, points = curves[first][-1], curves[solver]
    *errors, wanted = (-np.log(max(point["rms"], 1e-12)) for point in [*points, most])
    costs = [np.log(point["evaluations"]) for point in points]
    if min(errors) <= wanted <= max(errors) and errors == sorted(errors):
        cost = np.exp(np.interp(wanted, errors, costs))
        print(f"\n{solver} errs like {most['evaluations']:.0f} of {first} after {cost:.0f}")


def draw(plt, curves, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for solver, points in curves.items():
        cost = [point["evaluations"] for point in points]
        left.loglog(cost, [point["rms"] for point in points], marker=".", label=solver)
        right.semilogx(cost, [point["psnr"] for point in points], marker=".", label=solver)
    left.set(xlabel="evaluations", ylabel="RMS error of the latents")
    right.set(xlabel="evaluations", ylabel="PSNR of the video, dB")
    numbers = sorted({point["steps"] for points in curves.values() for point in points})
    for axis in (left, right):
        axis.set_xticks(numbers, numbers)
        axis.minorticks_off()
    left.legend(frameon=False)
    figure.tight_layout()
    with mi.written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def picture(options, curves):
    path = os.path.join(options.out, "errors.png")
    try:
        draw(load_pyplot(), curves, path)
    except mi.InputError as error:
        print(f"\nno picture: {error}")
    else:
        print(f"\n{path}")


def main():
    parser = mi.parser_for(Options, "Errors of the solvers over what they cost.")
    compare(**vars(parser.parse_intermixed_args()))


if __name__ == "__main__":
    mi.main(main)
