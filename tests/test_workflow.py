"""The workflow as a user runs it: Snakemake and DVC as processes, on the bundled model."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.settings import choices
from tests.conftest import PROJECT
from tests.hub_server import HubServer

pytestmark = pytest.mark.workflow
REVISION = "0123456789abcdef0123456789abcdef01234567"
SNAKEMAKE = [sys.executable, "-m", "snakemake"]


def snakemake(directory, *arguments, **keywords):
    """With Snakemake's own blocks for each job, which `jobs_of` reads and profiles/default leaves out."""
    blocks = [] if "--quiet" in arguments else ["--quiet", "host"]
    return subprocess.run([*SNAKEMAKE, *blocks, "--directory", str(directory), "-s", str(PROJECT / "Snakefile"), *arguments],
                          cwd=PROJECT, capture_output=True, text=True, **keywords)


def workdir(path: Path) -> Path:
    """A working directory with the project's inputs but results of its own."""
    path.mkdir(parents=True)
    for name in ("tests", "stages", "kernels", "conf"):
        (path / name).symlink_to(PROJECT / name)
    return path


def manifest(directory, recipe="mxfp4_experts"):
    return (directory / "results" / "step37_tiny" / recipe / "release" / "manifest.json").read_bytes()


def jobs_of(ran) -> set[str]:
    """Names of the rules that ran or would run; those of a group are indented."""
    return set(re.findall(r"^\s*(?:local)?rule (\w+):", ran.stdout + ran.stderr, re.M))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of the workflow with default settings."""
    directory = workdir(tmp_path_factory.mktemp("workflow") / "run")
    ran = snakemake(directory, "--cores", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return directory


def test_the_whole_workflow_makes_a_proven_release_and_a_report(finished):
    run_directory = finished / "results/step37_tiny/mxfp4_experts"
    assert json.loads((run_directory / "verify.json").read_text())["passed"]
    for name in ("report.html", "card.md", "gemm.json", "sqnr.json", "perplexity.json", "serving.json", "metrics.json",
                 "settings.yaml"):
        assert (run_directory / name).stat().st_size > 0
    assert json.loads((run_directory / "perplexity.json").read_text())["release"]["perplexity"] > 1
    assert {row["backend"] for row in json.loads((run_directory / "gemm.json").read_text())["rows"]} >= {"cpu"}


def test_the_plan_counts_the_jobs_of_a_whole_run(finished):
    shown = snakemake(finished, "-n", "--forceall", "--cores", "2")
    made = json.loads((finished / "results/step37_tiny/mxfp4_experts/plan.json").read_text())
    assert made["jobs"] == int(re.search(r"^total +(\d+)", shown.stdout + shown.stderr, re.M)[1])


def test_a_local_source_is_read_where_it_lies(finished):
    assert not (finished / "results/step37_tiny/mxfp4_experts/source").exists()


def test_a_second_run_has_nothing_to_do(finished):
    ran = snakemake(finished, "--cores", "2")
    assert ran.returncode == 0 and "Nothing to be done" in ran.stdout + ran.stderr


def test_changing_the_evaluation_does_not_convert_again(finished):
    ran = snakemake(finished, "-n", "--cores", "2", "--config", "overrides=[evaluation.maximum_tokens=300]")
    jobs = jobs_of(ran)
    assert ran.returncode == 0 and jobs == {"evaluate", "report", "all"}, ran.stdout + ran.stderr


@pytest.mark.parametrize("override, jobs", [
    ("source.license=mit", {"report"}), ("source.origin=somebody/original", {"report"}), ("release.minimum_sqnr_db=16", {"verify_release", "report"}),
    ("evaluation.gemm_tokens=48", {"validate_gemm", "report"}),
    ("evaluation.gemm_tensors=64,evaluation.gemm_tokens=4", {"validate_gemm", "report"}),  # exchanged
    ("serving.output_tokens=64", {"serve_bench", "report"}),
])
def test_only_what_depends_on_a_setting_runs_again(finished, override, jobs):
    ran = snakemake(finished, "-n", "--cores", "2", "--config", f"overrides=[{override}]")
    found = jobs_of(ran)
    assert ran.returncode == 0 and found == jobs | {"all"}, ran.stdout + ran.stderr


def test_a_deleted_shard_is_made_again_alone(finished):
    before = manifest(finished)
    run_directory = finished / "results/step37_tiny/mxfp4_experts"
    (run_directory / "shards/model-00003.safetensors").unlink()
    ran = snakemake(finished, "--cores", "2", "--until", "verify_release")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(r"^quantize_experts \| (\S+):", ran.stdout, re.M) == ["model-00003.safetensors"]
    assert manifest(finished) == before


def test_a_changed_file_of_a_local_source_is_noticed(finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    (source / "assets").mkdir()
    for name in ("more.json", "{braces}.json"):
        (source / "assets" / name).write_text("{}")
    directory = workdir(tmp_path / "changed")
    settings = ["--config", "source=local", f"overrides=[source.path={source}]"]
    assert snakemake(directory, "--cores", "2", "--until", "plan", *settings).returncode == 0
    time.sleep(1)
    nothing = snakemake(directory, "-n", "--cores", "2", "--until", "plan", *settings)
    assert nothing.returncode == 0 and "download_metadata" not in nothing.stdout + nothing.stderr
    (source / "assets" / "more.json").write_text("[]")
    ran = snakemake(directory, "-n", "--cores", "2", "--until", "plan", *settings)
    assert "download_metadata" in ran.stdout + ran.stderr


def test_a_hub_repository_is_converted_into_a_directory_with_a_space(finished, tmp_path):
    """The command for Step-3.7, with a hub on loopback."""
    directory = workdir(tmp_path / "from a hub")
    settings = ["--cores", "2", "--config", "source=hub", "results=my results", "overrides=[source.repository=somebody/tiny]"]
    with HubServer(PROJECT / "tests/tiny/step37_tiny", "somebody/tiny", REVISION) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        ran = snakemake(directory, "--until", "verify_release", *settings, env=environment)
        shown = snakemake(directory, "-n", "--forceall", *settings, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    jobs = json.loads((directory / "my results/tiny/mxfp4_experts/plan.json").read_text())["jobs"]
    assert jobs == int(re.search(r"^total +(\d+)", shown.stdout + shown.stderr, re.M)[1])
    made = directory / "my results/tiny/mxfp4_experts"
    theirs = finished / "results/step37_tiny/mxfp4_experts"
    assert not list((made / "source").glob("*")), "downloaded shards are deleted behind their conversion"
    for shard in (theirs / "shards").glob("*.safetensors"):
        assert (made / "release" / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_a_dry_run_is_one_screen_and_a_run_that_stops_says_how_to_go_on(tmp_path):
    directory = workdir(tmp_path / "plain")
    command = [*SNAKEMAKE, "--directory", str(directory), "-s", str(PROJECT / "Snakefile"), "--cores", "1"]
    ran = subprocess.run([*command, "-n"], cwd=PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0 and len((ran.stdout + ran.stderr).splitlines()) < 60 and "quantize_experts         6" in ran.stdout + ran.stderr
    ran = subprocess.run([*command, "--until", "plan", "--config", 'overrides=["recipe.groups=[{roles: [attenton]}]"]'], cwd=PROJECT, capture_output=True,
                         text=True)
    assert ran.returncode != 0 and "| error: " in ran.stdout + ran.stderr and "run the same command again" in ran.stderr, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", ["$(touch PWNED).safetensors", "a b.safetensors", "a;b.safetensors", "-x.safetensors"])
def test_a_shard_whose_name_a_shell_would_read_is_refused(tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    (source / "model-00003.safetensors").rename(source / name)
    directory = workdir(tmp_path / "run")
    ran = snakemake(directory, "--cores", "2", "--config", "source=local", f"overrides=[source.path={source}]")
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode != 0 and repr(name) in line and "rename" in line
    assert not list(tmp_path.rglob("PWNED"))

def test_bytes_do_not_depend_on_the_number_of_cores(finished, tmp_path):
    directory = workdir(tmp_path / "single")
    ran = snakemake(directory, "--cores", "1", "--until", "assemble_release")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert manifest(directory) == manifest(finished)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(finished, tmp_path):
    directory = workdir(tmp_path / "killed")
    process = subprocess.Popen(
        [*SNAKEMAKE, "--directory", str(directory), "-s", str(PROJECT / "Snakefile"), "--cores", "1"], cwd=PROJECT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    shards = directory / "results/step37_tiny/mxfp4_experts/shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "results/step37_tiny/mxfp4_experts/release").exists(), "killed too late to show anything"
    unlock = snakemake(directory, "--unlock")
    assert unlock.returncode == 0, unlock.stderr
    ran = snakemake(directory, "--cores", "2", "--rerun-incomplete", "--until", "verify_release")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert manifest(directory) == manifest(finished)


@pytest.mark.parametrize(("source", "recipe"), [
    *(("step37_tiny", recipe) for recipe in choices("recipe")),
    ("step37_fp8", "mxfp4_experts"), ("step37_bf16", "mxfp4_experts"),
])
def test_every_recipe_and_every_pinned_source_dry_runs(tmp_path, source, recipe):
    ran = snakemake(workdir(tmp_path / "dry"), "-n", "--quiet", "all", "--config", f"source={source}", f"recipe={recipe}")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_patterns_and_flags_may_hold_braces(tmp_path):
    overrides = ["recipe.groups=[{scheme: mxfp4, patterns: ['model[.]layers[.][0-9]{1}[.]moe[.](up|down|gate)_proj[.]weight']}]",
                 "serving.variables={A: '{b} {c'}"]
    ran = snakemake(workdir(tmp_path / "dry"), "-n", "--quiet", "all", "--config", f"overrides={json.dumps(overrides)}")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("config", "words"), [
    (["recip=mxfp4_experts"], "recip=mxfp4_experts: unknown"),
    (["recipe=mxfp5"], "no recipe 'mxfp5'"),
    (["overrides=[recipe.layot=stacked]"], "did you mean 'recipe.layout'"),
    (["source=local", "overrides=[source.path=/nonexistent]"], "/nonexistent"),
    (["overrides=[evaluation.text=/nonexistent]"], "/nonexistent"),
    (["results=007"], "results=7: Snakemake reads"),
    (["results="], "results=None: Snakemake reads"),
    (["overrides=[evaluation.via=vllm,serving.environment=nonexistent]"], "evaluation.via=vllm needs a server: run make serve-env"),
])
def test_a_mistake_on_the_command_line_is_one_clear_line(tmp_path, config, words):
    ran = snakemake(workdir(tmp_path / "mistake"), "--cores", "1", "--config", *config)
    assert ran.returncode != 0 and "Traceback" not in ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if words in line]
    assert line.startswith("error: ")


def test_the_lane_bounds_how_many_source_shards_are_on_disk(tmp_path):
    """`lane=1`: at no moment do two downloaded shards lie in the staging area."""
    directory = workdir(tmp_path / "lane")
    with HubServer(PROJECT / "tests/tiny/step37_tiny", "somebody/tiny", REVISION) as hub:
        process = subprocess.Popen(
            [*SNAKEMAKE, "--directory", str(directory), "-s", str(PROJECT / "Snakefile"), "--cores", "2", "--until", "assemble_release", "--config",
             "source=hub", "overrides=[device.lane=1,source.repository=somebody/tiny]"], cwd=PROJECT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"})
        staging, most = directory / "results/tiny/mxfp4_experts/source", 0
        while process.poll() is None:
            most = max(most, len(list(staging.glob("*.safetensors"))))
            time.sleep(0.005)
    assert process.returncode == 0, process.stdout.read()
    assert most == 1


# --- DVC --------------------------------------------------------------------------------------------------------------


def run(command, directory):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
    return ran.stdout + ran.stderr


def release_hashes(lock: Path) -> dict:
    yaml = pytest.importorskip("yaml")
    return {name: out["md5"] for name, stage in yaml.safe_load(lock.read_text())["stages"].items() for out in stage["outs"]}


@pytest.fixture
def clone(tmp_path):
    """A fresh clone of the working tree's tracked files, with a repository of its own."""
    directory = tmp_path / "mxforge"
    directory.mkdir()
    names = run(["git", "ls-files", "-z"], PROJECT).split("\0")
    for name in filter(None, names):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).exists():
            shutil.copyfile(PROJECT / name, target)
    for command in (["git", "init", "-q"], ["git", "add", "-A"],
                    ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "clone"]):
        run(command, directory)
    return directory


def test_dvc_rebuilds_the_pinned_releases_to_the_committed_hashes_then_does_nothing_and_then_what_has_changed(clone):
    committed, lock = release_hashes(clone / "dvc.lock"), (clone / "dvc.lock").read_text()
    assert committed and "step37_tiny" in " ".join(committed)
    run(["dvc", "repro"], clone)
    assert release_hashes(clone / "dvc.lock") == committed
    assert (clone / "dvc.lock").read_text() == lock, "code that dvc.yaml names has changed: run dvc repro and commit dvc.lock"
    again = run(["dvc", "repro"], clone)
    assert "Running stage" not in again and "up to date" in again
    assert "Nothing to be done" in run(["snakemake", "--cores", "2", "--config", "serving=none"], clone)
    shown = run(["dvc", "metrics", "show"], clone)
    assert "release_perplexity" in shown and "sqnr_db" in shown
    release = clone / "results/step37_tiny/mxfp4_experts/release/model-00002.safetensors"
    shard = clone / "results/step37_tiny/mxfp4_experts/shards/model-00002.safetensors"
    assert release.stat().st_ino == shard.stat().st_ino and release.stat().st_nlink == 3, "three names, one copy on disk"

    recipe = clone / "conf/recipe/mxfp4_experts_stacked.yaml"
    recipe.write_text(recipe.read_text() + "exponent_rule: ocp_floor\n")
    output = run(["dvc", "repro"], clone)
    after = release_hashes(clone / "dvc.lock")
    assert {name for name in committed if committed[name] != after[name]} == {"release@step37_tiny-mxfp4_experts_stacked"}
    assert len(re.findall(r"^quantize_experts \|", output, re.M)) == 6, "the shards of one release"
    code = clone / "kernels/mxfp4/reference.py"
    code.write_text(code.read_text() + "\n# changed\n")
    status = run(["dvc", "status"], clone)
    assert all(f"{name}:" in status for name in committed) and "kernels/mxfp4" in status
    planned = run(["snakemake", "-n", "--quiet", "host", "--cores", "2", "--config", "serving=none"], clone)
    assert re.search(r"^quantize_experts +6$", planned, re.M), f"code that converts was changed: {planned}"
    code = clone / "stages/sources/index.py"
    code.write_text(code.read_text() + "\n# changed\n")
    assert "rule download_metadata:" in run(["snakemake", "-n", "--quiet", "host", "--cores", "2"], clone), "what lists the source was changed"


def test_results_of_other_settings_are_not_taken_for_these_where_snakemake_has_lost_its_records(finished, tmp_path):
    directory = workdir(tmp_path / "fresh")
    shutil.copytree(finished / "results", directory / "results", symlinks=True)
    ran = snakemake(directory, "--cores", "2", "--config", "overrides=[recipe.exponent_rule=even]")
    assert ran.returncode != 0 and "plan.json was made for other settings" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", tmp_path / "step37_tiny")
    ran = snakemake(directory, "--cores", "2", "--config", "source=local", f"overrides=[source.path={tmp_path / 'step37_tiny'}]")
    assert ran.returncode != 0 and f"listing.json: the results there are of {PROJECT / 'tests/tiny/step37_tiny'}, not of " in ran.stderr, ran.stdout + ran.stderr


def test_a_source_of_the_same_name_in_another_place_does_not_replace_the_results(copied, tmp_path):
    """Snakemake would take it for another path of the same source, and make everything again in its place."""
    (tmp_path / "moved").mkdir()
    source = tmp_path / "moved/step37_tiny"
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    settings = ["--cores", "2", "--config", "source=local"]
    ran = snakemake(copied, *settings, f"overrides=[source.path={source}]")
    (line,) = [line for line in ran.stderr.splitlines() if "step37_tiny" in line]
    assert ran.returncode != 0 and line.startswith("error: ") and f"not of {source}: set source.name" in line, ran.stdout + ran.stderr
    ran = snakemake(copied, "-n", *settings, f"overrides=[source.path={source},source.name=another]")
    assert ran.returncode == 0 and "download_metadata" in jobs_of(ran), ran.stdout + ran.stderr
    link = tmp_path / "step37_tiny"  # the same directory by another way
    link.symlink_to(PROJECT / "tests/tiny/step37_tiny")
    ran = snakemake(copied, "-n", *settings, f"overrides=[source.path={link}]")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shutil.rmtree(copied / "results/step37_tiny/source")  # as the line says
    ran = snakemake(copied, "--until", "plan", *settings, f"overrides=[source.path={source}]")
    assert ran.returncode == 0 and {"download_metadata", "plan"} <= jobs_of(ran), ran.stdout + ran.stderr


def test_a_link_that_was_turned_to_another_checkpoint_is_another_source(tmp_path):
    source, directory = tmp_path / "source", workdir(tmp_path / "run")
    source.symlink_to(PROJECT / "tests/tiny/step37_tiny")
    settings = ["--cores", "2", "--until", "inspect_format", "--config", "source=local", f"overrides=[source.path={source},source.name=linked]"]
    assert snakemake(directory, *settings).returncode == 0
    source.unlink()
    source.symlink_to(shutil.copytree(PROJECT / "tests/tiny/step37_tiny", tmp_path / "other", copy_function=shutil.copy2))
    ran = snakemake(directory, *settings)
    assert ran.returncode != 0 and f"the results there are of {PROJECT / 'tests/tiny/step37_tiny'}, not of" in ran.stderr, ran.stdout + ran.stderr


def test_the_stages_are_this_projects_whatever_lies_in_the_working_directory(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text("raise SystemExit('stages of somebody else')")
    ran = snakemake(tmp_path, "--cores", "1", "--until", "inspect_format", "--config", f"overrides=[source.path={PROJECT / 'tests/tiny/step37_tiny'}]")
    assert ran.returncode == 0 and (tmp_path / "results/step37_tiny/mxfp4_experts/inspect.json").exists(), ran.stdout + ran.stderr


def test_a_source_that_cannot_be_listed_any_more_costs_no_shard(tmp_path):
    source, directory = tmp_path / "source", workdir(tmp_path / "run")
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    settings = ["--cores", "2", "--until", "inspect_format", "--config", "source=local", f"overrides=[source.path={source}]"]
    assert snakemake(directory, *settings).returncode == 0
    (source / "model-00004.safetensors").rename(tmp_path / "away")
    ran = snakemake(directory, *settings)
    assert ran.returncode != 0 and "names model-00004.safetensors" in ran.stderr and "Traceback" not in ran.stderr, ran.stdout + ran.stderr
    (tmp_path / "away").rename(source / "model-00004.safetensors")
    ran = snakemake(directory, "-n", *settings)
    assert ran.returncode == 0 and not jobs_of(ran), ran.stdout + ran.stderr


def test_a_result_that_is_dated_in_the_future_is_named_before_a_job_runs(copied):
    plan = copied / "results/step37_tiny/mxfp4_experts/plan.json"
    before = plan.stat()
    os.utime(plan, (before.st_atime, time.time() + 7200))
    ran = snakemake(copied, "-n", "--cores", "2")
    os.utime(plan, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ran.returncode != 0 and "plan.json: is dated in the future" in ran.stderr, ran.stdout + ran.stderr


def test_older_files_in_the_place_of_the_source_are_noticed_where_snakemake_has_lost_its_records(tmp_path):
    source, directory = tmp_path / "source", workdir(tmp_path / "run")
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    settings = ["--cores", "2", "--until", "plan", "--config", "source=local", f"overrides=[source.path={source}]"]
    assert snakemake(directory, *settings).returncode == 0
    shutil.rmtree(directory / ".snakemake")
    assert snakemake(directory, "-n", *settings).returncode == 0
    shard = source / "model-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 3
    shard.write_bytes(data)
    os.utime(shard, (1.6e9, 1.6e9))
    ran = snakemake(directory, *settings)
    assert ran.returncode != 0 and "listing.json was made for other settings or from other files of the source" in ran.stderr, ran.stdout + ran.stderr
    (directory / "results/source/source/listing.json").unlink()  # as the line says
    ran = snakemake(directory, *settings)
    assert ran.returncode == 0 and {"download_metadata", "plan"} <= jobs_of(ran), ran.stdout + ran.stderr


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run once more, Snakemake's records included."""
    directory = tmp_path / "copied"
    shutil.copytree(finished, directory, symlinks=True)
    return directory


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux


def like_any_user() -> None:
    """In a new process: what it starts heeds the permissions of files, for root, too."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_what_dvc_has_write_protected_can_be_made_again(copied):
    """DVC's cache has hard links to the release, which has hard links to the shards, and makes them all read-only."""
    made = copied / "results/step37_tiny/mxfp4_experts"
    protected = [*(made / "shards").glob("*.safetensors"), made / "release/manifest.json"]
    (copied / "cache_of_dvc").mkdir()
    for path in protected:
        path.chmod(0o444)
        os.link(path, copied / "cache_of_dvc" / path.name)
    asked = subprocess.run([sys.executable, "-c", "import os, sys; sys.exit(os.access(sys.argv[1], os.W_OK))", protected[0]], preexec_fn=like_any_user)
    if asked.returncode:
        pytest.skip("this root cannot give up its right to write to read-only files")
    again, inode, kept = protected[0], protected[0].stat().st_ino, protected[0].read_bytes()
    ran = snakemake(copied, "-n", "--cores", "2", "--forceall", preexec_fn=like_any_user)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = snakemake(copied, "--cores", "2", "--force", str(again.relative_to(copied)), preexec_fn=like_any_user)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert again.stat().st_ino != inode and again.read_bytes() == kept == (copied / "cache_of_dvc" / again.name).read_bytes()


def test_a_release_that_was_put_in_the_place_of_the_proven_one_is_noticed(copied):
    """As by `dvc checkout` of another dvc.lock: its files are older than the proof, so that Snakemake sees no reason to run."""
    release = copied / "results/step37_tiny/mxfp4_experts/release"
    other = json.loads((release / "manifest.json").read_text()) | {"tensors": {}}
    (release / "manifest.json").write_text(json.dumps(other))
    os.utime(release / "manifest.json", (1.6e9, 1.6e9))
    ran = snakemake(copied, "-n", "--cores", "2")
    assert ran.returncode != 0 and "release is not the release that" in ran.stderr, ran.stdout + ran.stderr
    shutil.rmtree(release)  # as the line says
    ran = snakemake(copied, "-n", "--cores", "2")
    assert ran.returncode == 0 and {"assemble_release", "verify_release", "report"} <= jobs_of(ran) and "quantize_experts" not in jobs_of(ran)


def test_a_source_that_was_changed_before_an_interruption_is_converted_by_the_next_run(tmp_path):
    source, directory = tmp_path / "source", workdir(tmp_path / "changed")
    shutil.copytree(PROJECT / "tests/tiny/step37_tiny", source)
    settings = ["--cores", "2", "--config", "source=local", f"overrides=[source.path={source}]"]
    assert snakemake(directory, "--until", "assemble_release", *settings).returncode == 0
    shard = source / "model-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 3
    shard.write_bytes(data)
    os.utime(shard, (1.6e9, 1.6e9))  # older than what was made from the other bytes
    assert snakemake(directory, "--until", "plan", *settings).returncode == 0
    ran = snakemake(directory, "-n", "--until", "assemble_release", *settings)
    assert {"quantize_experts", "assemble_release"} <= jobs_of(ran), ran.stdout + ran.stderr


def test_what_was_refused_is_refused_again(copied):
    for _ in range(2):  # Snakemake removes the outputs of a job that failed, and what is missing in between makes nothing run
        ran = snakemake(copied, "--cores", "2", "--until", "verify_release", "--config", 'overrides=["recipe.groups=[{scheme: mxfp4, roles: [nonsense]}]"]')
        assert ran.returncode != 0 and "nonsense" in ran.stdout + ran.stderr, ran.stdout + ran.stderr


def test_what_was_refused_costs_no_shard_of_the_settings_before(copied):
    plan = copied / "results/step37_tiny/mxfp4_experts/plan.json"
    before, left = plan.read_bytes(), jobs_of(snakemake(copied, "-n", "--cores", "2"))  # by tests that were here before, of the last stages
    assert not {"plan", "quantize_experts"} & left, left
    for arguments in ([], ["-n"]):
        ran = snakemake(copied, "--cores", "2", *arguments, "--config", 'overrides=["recipe.groups=[{scheme: mxfp4, patterns: [nothing]}]"]')
        (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        assert ran.returncode != 0 and "pattern 'nothing' matches no weight" in line and "Traceback" not in ran.stderr, ran.stdout + ran.stderr
    assert plan.read_bytes() == before
    ran = snakemake(copied, "-n", "--cores", "2")
    assert ran.returncode == 0 and jobs_of(ran) == left, ran.stdout + ran.stderr


def test_results_that_were_made_by_hand_with_other_settings_end_the_run_and_cost_no_shard(copied):
    run_directory = copied / "results/step37_tiny/mxfp4_experts"
    subprocess.run([sys.executable, "-m", "stages.plan", f"results={copied / 'results'}", "recipe.exponent_rule=even"], cwd=PROJECT, check=True,
                   stdout=subprocess.DEVNULL)
    ran = snakemake(copied, "--cores", "2")
    assert ran.returncode != 0 and "plan.json was made for other settings" in ran.stderr, ran.stderr
    assert len(list((run_directory / "shards").glob("*.safetensors"))) == 6
    subprocess.run([sys.executable, "-m", "stages.plan", f"results={copied / 'results'}"], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((run_directory / "perplexity.json").read_text())
    scores["settings"]["maximum_tokens"] = 300
    (run_directory / "perplexity.json").write_text(json.dumps(scores))
    ran = snakemake(copied, "--cores", "2")
    assert ran.returncode != 0 and "perplexity.json was made for other settings" in ran.stderr, ran.stderr
