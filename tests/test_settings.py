"""conf/ and its schema: what a user types is understood, or answered with one line."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from stages.checkpoint.files import write_json
from stages.errors import UserError
from stages.settings import CONF, Settings, choices, load, overrides_from

GROUPS = [field.name for field in dataclasses.fields(Settings) if field.name != "results"]


def pin(results, source):
    """Records a revision for a source that names none, as the workflow does at its start."""
    text = OmegaConf.load(CONF / "source" / f"{source}.yaml")
    if text.get("repository") and not text.get("revision"):
        record = {"repository": text["repository"], "revision": "0" * 40, "shards": ["model.safetensors"]}
        write_json(results / source / "source" / "revision.json", record)


@pytest.mark.parametrize("recipe", choices("recipe"))
@pytest.mark.parametrize("source", [name for name in choices("source") if name not in ("local", "hub")])
def test_every_recipe_composes_with_every_source(tmp_path, recipe, source):
    pin(tmp_path, source)
    settings = load([f"recipe={recipe}", f"source={source}", f"results={tmp_path}"])
    assert settings.recipe.name == recipe and settings.source.name == source


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
    (["source=step37_fp8", "source.revision=main"], ["source.revision", "'main'", "commit hash"]),
    (["recipe.name=a/b"], ["recipe.name", "'a/b'"]),
    (["evaluation.stride=256"], ["evaluation.stride", "evaluation.context"]),
    (["source=local", "source.path=/a b's {x}"], ["source.path='/my data/checkpoint'"]),
    (["source=local", "source.path='/data/{x}'"], ["source.path", "wildcards"]),
    (["recipe.groups=[]"], ["nothing to quantize"]),
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


def test_a_local_source_is_named_after_its_directory():
    assert load(["source=local", "source.path=/data/My-Model"]).source.name == "My-Model"
