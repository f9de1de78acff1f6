"""conf/ and its schema: what a user types is understood, or answered with one line."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from stages.checkpoint.files import write_json
from stages.errors import UserError
from stages.settings import CONF, PROJECT, Settings, choices, load
from stages.settings.commands import command_for, overrides_from
from stages.settings.handed_over import MOST_BYTES, VARIABLE, hand_over, handed_over
from stages.workflow import Workflow
from tests.conftest import TINY

GROUPS = [field.name for field in dataclasses.fields(Settings) if field.name != "results"]


def pin(results, source):
    """Records a revision for a source that names none, as the workflow does at its start."""
    text = OmegaConf.load(CONF / "source" / f"{source}.yaml")
    if text.get("repository") and not text.get("revision"):
        record = {"repository": text["repository"], "revision": "0" * 40, "shards": ["model.safetensors"]}
        write_json(results / source / "source" / "revision.json", record)


SOURCES = [name for name in choices("source") if name not in ("local", "hub")]


@pytest.mark.parametrize(("source", "recipe"), [*((source, "mxfp4_experts") for source in SOURCES), *(("step37_fp8", recipe) for recipe in choices("recipe"))])
def test_every_source_and_every_recipe_composes(tmp_path, source, recipe):
    pin(tmp_path, source)
    settings = load([f"recipe={recipe}", f"source={source}", f"results={tmp_path}"])
    assert settings.recipe.name == recipe and settings.source.name == source


def test_the_figure_to_publish_is_of_windows_that_do_not_overlap():
    evaluation = load(["evaluation=wikitext2", "evaluation.text=/data/test.txt"]).evaluation
    assert evaluation.context == evaluation.stride == 2048 and evaluation.text == "/data/test.txt"


@pytest.mark.parametrize("group", GROUPS)
def test_yaml_keys_and_schema_do_not_drift_apart(group):
    known = set(OmegaConf.structured(Settings)[group])
    used = set()
    for name in choices(group):
        keys = set(OmegaConf.load(CONF / group / f"{name}.yaml")) - {"defaults"}
        assert keys <= known, f"conf/{group}/{name}.yaml has keys without a field: {keys - known}"
        used |= keys
    assert used or group == "serving"


@pytest.mark.parametrize(("overrides", "words"), [
    (["recipe.layot=stacked"], ["recipe.layot", "did you mean 'recipe.layout'"]),
    (["+recipe.layot=stacked"], ["layot"]),
    (["recipe.groups=[{rols: [attention]}]"], ["recipe.groups.rols", "did you mean 'recipe.groups.roles'"]),
    (["recipe=mxfp5"], ["no recipe 'mxfp5'", "mxfp4_experts"]),
    (["source=step38"], ["no source 'step38'", "step37_tiny"]),
    (["recipe.exponent_rule=best"], ["recipe.exponent_rule", "'best'", "mse"]),
    (["device.lane=two"], ["device.lane", "'two'"]),
    (["device.lane=0"], ["device.lane", "at least 1"]),
    (["source=local"], ["source.path=DIRECTORY"]),
    (["hydra.run.dir=x"], ["hydra.run.dir=x", "leave it out"]), (["+hydra/launcher=slurm"], ["+hydra/launcher=slurm", "leave it out"]),
    (["source=step37_fp8", "source.revision=main"], ["source.revision", "'main'", "commit hash"]),
    (["recipe.name=a/b"], ["recipe.name", "'a/b'"]),
    (["evaluation.stride=257"], ["evaluation.stride", "evaluation.context"]),
    (["evaluation=wikitext2"], ["evaluation=wikitext2", "evaluation.text=FILE"]),
    (["source=local", "source.path=/a b's {x}"], ["/a b's {x}", "in quotes, as in"]),
    (["source.path=/data/model"], ["source.path=/data/model", "add source=local"]), (["source.name=x", "++source.path=/data/model"], ["add source=local"]),
    (["source.license=mine, all mine"], ["source.license=mine, all mine", "in quotes, as in"]),
    (["source=local", "source.path='/data/{x}'"], ["source.path", "wildcards"]),
    (["recipe.groups=[]"], ["nothing to quantize"]),
    (["recipe.groups=[{scheme: mxfp4}]"], ["group with scheme mxfp4", "nothing to quantize"]),
    (["recipe.groups=[{roles: [routed_experts]}, {scheme: mxfp8, patterns: []}]"], ["group with scheme mxfp8", "nothing to quantize"]),
    (["recipe.groups=[{roles: [''], patterns: ['']}]"], ["nothing to quantize"]),
    (["recipe.groups=[{patterns: ['(']}]"], ["'('", "regular expression"]),
])
def test_a_mistake_in_the_settings_is_one_line_that_names_it(overrides, words):
    with pytest.raises(UserError) as caught:
        load(overrides)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_snakemake_config_becomes_overrides():
    assert overrides_from({"recipe": "a", "overrides": ["x.y=1", "z.w=2"]}) == ["recipe=a", "x.y=1", "z.w=2"]
    assert overrides_from({"overrides": "x.y=1 z.w=2"}) == ["x.y=1", "z.w=2"]
    with pytest.raises(UserError, match="recip=a: unknown"):
        overrides_from({"recip": "a"})


def test_paths_of_conf_are_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = PROJECT / "tests"  # anything that is there
    assert load(["serving=vllm_cpu", "serving.environment=tests"]).serving.environment == str(environment)
    assert load([]).source.path == str(TINY)
    (tmp_path / "tests/tiny/step37_tiny").mkdir(parents=True)
    assert load([]).source.path == "tests/tiny/step37_tiny"
    assert load(["serving=vllm_cpu", "serving.environment=nowhere"]).serving.environment == "nowhere"


def test_a_path_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    for spelt, wanted in (("a/b/", "a/b"), ("./a//b", "a/b"), ("deep/../a/b", "a/b"), (f"{tmp_path}/a/b", "a/b"), ("/data/m/", "/data/m"),
                          ("link/../m", "link/../m"), ("link", "link")):
        made = load(["source=local", f"source.path={spelt}", "source.name=x", f"results={tmp_path}/r//s/"])
        assert (made.source.path, made.results) == (wanted, "r/s"), spelt


def test_a_local_source_is_named_after_its_directory():
    assert load(["source=local", "source.path=/data/My-Model"]).source.name == "My-Model"


@pytest.mark.parametrize(("override", "words"), [
    ("recipe=null", "chosen by the name of a file"), ("device=1", "chosen by the name of a file"), ("results=", "results is empty"),
    ("evaluation.gemm_tokens=0", "at least 1"), ("evaluation.maximum_tokens=-5", "at least 16"), ("evaluation.memory_gb=nan", "at least 0"),
    ("release.minimum_sqnr_db=nan", "at least 0"), ("device.memory_mb=0", "at least 1"), ("serving.concurrencies=[]", "numbers of streams"),
    ("serving.goodput_ms={ttft: -1}", "above 0"), ("serving.goodput_ms={ttft: inf}", "above 0"), ("serving.timeout_seconds=nan", "above 0"),
    ("serving.startup_seconds=0", "above 0"), ("serving.window_seconds=-1", "above 0"), ("release.minimum_sqnr_db=inf", "give a number"),
])
def test_values_that_would_turn_a_proof_into_nothing_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        load([override])


def test_results_that_no_directory_can_be_made_for_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for results in (tmp_path / "file", tmp_path / "file" / "r" / "s"):
        with pytest.raises(UserError, match=f"results.*{tmp_path}/file.*directory"):
            load([f"results={results}"])
    load([f"results={tmp_path / 'r' / 's'}"])


def test_limits_and_variables_are_given_without_hydras_plus():
    settings = load(["serving.goodput_ms={ttft: 500, tpot: 50}", "+serving.variables={A: b}"])
    assert settings.serving.goodput_ms == {"ttft": 500, "tpot": 50} and settings.serving.variables["A"] == "b"


@pytest.mark.parametrize("overrides", [
    [], ["recipe=mxfp4_experts_stacked"], ["source=local", "source.path='/data/my model'", "source.name=m"],
    *(["source=local", "source.path='/data/my model'", f"source.name={name}"] for name in ("deepseek_v3", "local", "hub", "step37_tiny")),
    ["source=deepseek_v3", "source.repository=a/b", "source.revision=" + "0" * 40, "source.shards=[x.safetensors]"],
    ["recipe.exponent_rule=even", "release.draft_scales=true"],
    ["source=hub", "source.repository=a/b", "source.revision=" + "0" * 40, "source.shards=[x.safetensors]"],
    ["recipe.groups=[{scheme: mxfp4, patterns: ['.*\\.moe\\..\"x\".*']}]"],
    ["recipe.groups=[{scheme: mxfp4, patterns: ['a\\'b\\\\\\'c', 'x\\\\\\\\']}]", "source.license='it\\'s mine\\\\'"],
])
def test_the_command_on_the_card_makes_the_same_release(overrides):
    settings = load(overrides)
    words = shlex.split(command_for(settings))
    assert words[:4] == ["snakemake", "--cores", "all", "--config"]
    config = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words[4:])}  # as snakemake reads them
    assert "/data" not in " ".join(words)  # the card is published
    again = load([item.replace("=DIRECTORY", "='/data/my model'") for item in overrides_from(config)])
    assert (again.source, again.recipe, again.release) == (settings.source, settings.recipe, settings.release)


@pytest.fixture
def environment(monkeypatch):
    """In which settings may be handed over, and are forgotten afterwards."""
    monkeypatch.setenv(VARIABLE, "")
    return monkeypatch


@pytest.mark.parametrize(("recipe", "serving"), [("mxfp4_experts_mxfp8_rest", "vllm_cpu"), ("mxfp4_all_linear", "endpoint"), ("mxfp8_experts", "none")])
def test_settings_that_are_handed_over_are_those_that_were_composed(environment, recipe, serving):
    overrides = [f"recipe={recipe}", f"serving={serving}", "serving.url=http://127.0.0.1:1", "serving.goodput_ms={ttft: 200}", "results='ä b'"]
    settings = load(overrides)
    hand_over(overrides, settings)
    made = handed_over(overrides)
    assert made == settings and made is not settings and load(overrides) == settings
    assert type(made.recipe.groups[0]) is type(settings.recipe.groups[0])


def test_the_workflow_composes_anew_what_was_handed_over_before(environment):
    stale = load([])
    stale.recipe.exponent_rule = "ocp_floor"
    hand_over([], stale)
    assert load([]).recipe.exponent_rule == "ocp_floor", "as a stage would read it"
    assert Workflow({}).settings.recipe.exponent_rule == "mse"
    hand_over([], stale)
    stale.evaluation.name = "x" * MOST_BYTES
    hand_over([], stale)  # more than fits
    assert load([]).recipe.exponent_rule == "mse"


@pytest.mark.parametrize("value", ["2026_11_27", "20261127", "1.10", "007", "1e3", "true", "nan", "-0", "0x10"])
def test_a_text_stays_as_it_was_written(value):
    made = load(["source=local", f"source.path={value}", "source.name=x", f"serving.model={value}", f"results=r{value}"])
    assert (made.source.path, made.serving.model, made.results) == (value, value, f"r{value}")
    assert load([f"serving.variables.A={value}"]).serving.variables["A"] == value
    assert load([f"serving.flags=[--limit,{value}]"]).serving.flags == ["--limit", value]
    assert load(["source.license=null"]).source.license is None


@pytest.mark.parametrize("path", ["/my data/model", "/data/Modèle (1), a#b&c=d", "/data/~x", "a:b", "/data/[x]"])
def test_a_path_needs_no_quotes(path):
    for written in (path, f"'{path}'"):
        made = load(["source=local", f"source.path={written}", "source.name=x", f"serving.prompts={written}"])
        assert (made.source.path, made.serving.prompts) == (path, path)


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me too")
    made = load(["source=local", "source.path=~/model", "results=~/results"])
    assert (made.source.path, made.source.name, made.results) == ("/home/me too/model", "model", "/home/me too/results")


def test_results_and_source_do_not_lie_in_each_other(tmp_path):
    source = tmp_path / "a" / "model"
    for results, word in ((tmp_path / "a", "is"), (source, "lies in"), (source / "out", "lies in")):
        with pytest.raises(UserError, match=f"results={results}: .* {word} the source {source}"):
            load(["source=local", f"source.path={source}", f"results={results}"])
    with pytest.raises(UserError, match="lies in the results"):
        load(["source=local", f"source.path={tmp_path / 'r/name/deep'}", "source.name=name", f"results={tmp_path / 'r'}"])
    assert load(["source=local", f"source.path={source}", f"results={tmp_path / 'a'}", "source.name=other"]).source.name == "other"


def test_settings_are_handed_over_to_the_same_overrides_only(environment):
    hand_over(["recipe=mxfp8_experts"], load(["recipe=mxfp8_experts"]))
    assert handed_over([]) is None and load([]).recipe.name == "mxfp4_experts"


@pytest.mark.parametrize("change", [
    lambda found: [], lambda found: {"project": found["project"]}, lambda found: {"project": found["project"], "code": found["code"]},
    lambda found: found | {"settings": {}}, lambda found: found | {"settings": []}, lambda found: found | {"settings": found["settings"] | {"recipe": None}},
    lambda found: found | {"settings": found["settings"] | {"device": found["settings"]["device"] | {"unknown": 1}}},
    lambda found: found | {"settings": found["settings"] | {"device": {"name": "cpu"}}},
])
def test_what_cannot_be_read_of_what_was_handed_over_is_composed_anew(environment, change):
    hand_over([], load([]))
    environment.setenv(VARIABLE, json.dumps(change(json.loads(os.environ[VARIABLE]))))
    assert handed_over([]) is None and load([]).recipe.name == "mxfp4_experts"


@pytest.mark.parametrize(("key", "words"), [("project", "was started with the code in 0, this stage"), ("code", "changed while this run was going on")])
def test_a_stage_does_not_run_other_code_than_snakemake_records(environment, key, words):
    hand_over([], load([]))
    environment.setenv(VARIABLE, json.dumps(json.loads(os.environ[VARIABLE]) | {key: "0"}))
    with pytest.raises(UserError, match=words):
        load([])


def test_a_stage_with_settings_that_were_handed_over_does_without_hydra(environment, tmp_path):
    overrides = [f"results={tmp_path}", "serving=none"]
    hand_over(overrides, load(overrides))
    script = "import sys; from stages.download import main; main(); sys.exit('hydra' in sys.modules and 'hydra was imported')"
    for arguments, wanted in (([*overrides, "--metadata"], 0), ([*overrides, "device.lane=1", "--metadata"], 1)):
        ran = subprocess.run([sys.executable, "-c", script, *arguments], cwd=PROJECT, capture_output=True, text=True)
        assert ran.returncode == wanted and "6 shards" in ran.stdout, ran.stderr
