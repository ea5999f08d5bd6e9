"""Merges from disk to disk: `python tests/benchmarks/bench_merge_disk.py [--mergekit PATH] [--methods a,b] [--experts 5]`.

Makes a base and experts of the size of CLIP's ViT-B/32 visual tower (float32, 351 MB each, random weights) in a
temporary folder, which needs 2.5 GB of disk. Everything is then measured in this order with the files in the page
cache: reading all and writing one file, as whole files one after the other and as a bare loop over blocks that also brings
the output to the disk; `shiftproof merge`, each method in a process of its own; and, where its command is found,
mergekit-pytorch on the same files. mergekit pins other packages, so it wants an environment of its own: name its command
with --mergekit. Of several repeats the fastest counts. Load averages are printed: on a machine where something else runs,
quote ratios of neighbouring lines at most.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, LAYERS = 768, 12
MERGEKIT = {"task-arithmetic": ("task_arithmetic", "{weight: 1.0}"), "ties": ("ties", "{weight: 1.0, density: 0.2}")}
TARGETS = {"task-arithmetic": 2.0, "ties": 8.0}  # times as fast as mergekit, imports included
SECONDS = {"score": 30.0, "tsv": 25.0}
ABOVE_TORCH = 650  # MB of resident set above what importing torch takes
OURS = "from shiftproof.benchmark.cli.main import main; main()"

READ_AND_WRITE = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
*inputs, out = sys.argv[1:]
started = time.perf_counter()
for path in inputs:
    content = Path(path).read_bytes()
Path(out).write_bytes(content)
plain = time.perf_counter() - started
del content
os.unlink(out)
def read(path):
    file, buffer, at = os.open(path, os.O_RDONLY), bytearray(1 << 22), 0
    while count := os.preadv(file, [buffer], at):
        at += count
    os.close(file)
    return at
started = time.perf_counter()
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    sizes = list(pool.map(read, inputs))
file, block = os.open(out, os.O_RDWR | os.O_CREAT), bytes(1 << 22)
os.posix_fallocate(file, 0, sizes[0])
for at in range(0, sizes[0], len(block)):
    os.pwrite(file, block[: sizes[0] - at], at)
cached = time.perf_counter() - started
os.fsync(file)
print(f"{plain:.2f} s by whole files; {cached:.2f} s by blocks on all processors,", end=" ")
print(f"{time.perf_counter() - started:.2f} s with the output on the disk")
"""


@dataclass(frozen=True)
class Run:
    """One process: wall time in seconds, largest resident set in MB, what it printed, load average before it."""

    seconds: float
    megabytes: float
    printed: str
    load: float


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the visual tower."""
    w = WIDTH
    found: dict[str, tuple[int, ...]] = {"class_embedding": (w,), "positional_embedding": (50, w), "proj": (w, 512)}
    found["conv1.weight"] = (w, 3, 32, 32)
    for layer in range(LAYERS):
        block = {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,), "attn.out_proj.weight": (w, w)}
        block |= {"attn.out_proj.bias": (w,), "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,)}
        block |= {"mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,)}
        block |= {f"ln_{n}.{part}": (w,) for n in (1, 2) for part in ("weight", "bias")}
        found |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    return found | {f"ln_{which}.{part}": (w,) for which in ("pre", "post") for part in ("weight", "bias")}


def make(folder: Path, experts: int) -> None:
    """Write a base, and experts whose differences from it share a part and have one of their own."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> dict[str, torch.Tensor]:
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes().items()}

    base, common = noise(0.02), noise(5e-4)
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    for position in range(experts):
        own = noise(1e-3)
        expert = {name: base[name] + common[name] + own[name] for name in base}
        save_file(expert, folder / f"expert-{position}.safetensors", {"format": "pt"})


def measured(command: Sequence[str | Path], repeats: int = 1) -> Run:
    """The fastest of several runs. Raises RuntimeError with what it printed where a run fails."""
    runs = []
    for _ in range(repeats):
        load, started = os.getloadavg()[0], time.perf_counter()
        with tempfile.TemporaryFile("w+") as printed:
            child = subprocess.Popen([str(part) for part in command], stdout=printed, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            printed.seek(0)
            runs.append(Run(seconds, usage.ru_maxrss / 1000 * 1.024, printed.read(), load))
        if child.returncode:
            raise RuntimeError(f"{command[0]} ended with {child.returncode}: {runs[-1].printed[-500:]}")
    return min(runs, key=lambda run: run.seconds)


def ours(method: str, files: Sequence[Path], folder: Path, repeats: int) -> Run:
    """`shiftproof merge` of the files."""
    experts = [part for file in files[1:] for part in ("--expert", file)]
    command = [sys.executable, "-c", OURS, "merge", method, "--base", files[0], *experts, "--out", folder / "out.safetensors"]
    return measured([*command, "--force"], repeats)


def theirs(command: str, method: str, files: Sequence[Path], folder: Path) -> Run:
    """mergekit-pytorch on the same files with the same knobs."""
    name, parameters = MERGEKIT[method]
    lines = [f"merge_method: {name}", f"base_model: {files[0]}", "dtype: float32", "parameters: {normalize: false}", "models:"]
    lines += [f"  - model: {file}\n    parameters: {parameters}" for file in files[1:]]
    config = folder / "mergekit.yml"
    config.write_text("\n".join(lines) + "\n")
    return measured([command, "--quiet", config, folder / "mergekit"])


def main() -> None:
    """Print every time, resident set and ratio."""
    parser = argparse.ArgumentParser(description="Merges from disk to disk, beside mergekit where it is found.")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-pytorch"), help="the command mergekit-pytorch")
    parser.add_argument("--methods", default="task-arithmetic,ties,score,tsv")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds; mergekit, score and tsv run once")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.experts)
        return
    subprocess.run(
        [sys.executable, "-c", OURS, "list", "strategies"], check=True, stdout=subprocess.DEVNULL
    )  # a warm catalogue
    torch_alone = measured([sys.executable, "-c", "import torch"], arguments.repeats)
    print(f"importing torch: {torch_alone.seconds:.1f} s, {torch_alone.megabytes:.0f} MB, load {torch_alone.load:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: on Linux the largest resident set of a child begins with that of its parent.
        subprocess.run([sys.executable, __file__, "--make", folder, "--experts", str(arguments.experts)], check=True)
        files = [folder / "base.safetensors", *sorted(folder.glob("expert-*.safetensors"))]
        print(f"files: {len(files)} of {files[0].stat().st_size / 1e6:.0f} MB, {os.cpu_count()} processors")
        bare = measured([sys.executable, "-c", READ_AND_WRITE, *files, folder / "copy"], arguments.repeats)
        print(f"reading all and writing one: {bare.printed.strip()}, load {bare.load:.1f}")
        for method in arguments.methods.split(","):
            run = ours(method, files, folder, 1 if method in SECONDS else arguments.repeats)
            (merging,) = re.findall(r"merged by .* in ([\d.]+) s", run.printed)
            above = run.megabytes - torch_alone.megabytes
            print(f"{method}: {run.seconds:.1f} s, of which merging {merging} s", end="; ")
            print(f"{run.megabytes:.0f} MB, {above:.0f} above torch (wanted: {ABOVE_TORCH}), load {run.load:.1f}", end="")
            print(f"; wanted: {SECONDS[method]:.0f} s" if method in SECONDS else "")
            if method in MERGEKIT and arguments.mergekit:
                other = theirs(arguments.mergekit, method, files, folder)
                print(
                    f"  mergekit-pytorch: {other.seconds:.1f} s, {other.megabytes:.0f} MB, load {other.load:.1f}: ours takes",
                    end=" ",
                )
                print(f"1/{other.seconds / run.seconds:.1f} of its time (wanted: 1/{TARGETS[method]:.0f})")
    if not arguments.mergekit:
        print("mergekit-pytorch was not found: name it with --mergekit")


if __name__ == "__main__":
    main()
