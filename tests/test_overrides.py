"""Patterns, assignments and recipe files."""

from __future__ import annotations

import pytest

from weightpack import overrides
from weightpack.errors import ConfigError


def find(name: str) -> str:
    if name not in ("nf4", "int8"):
        raise ConfigError(f'unknown format "{name}"')
    return f"bitsandbytes:{name}"


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        default = "nf4"
        keep = ["lm_head"]
        [[rule]]
        match = "v_proj"
        format = "int8"
        why = "values are sensitive"
        [[rule]]
        match = "proj"
        format = "keep"
        """
    )
    recipe = overrides.read_recipe(path, find)
    assert recipe.default == "bitsandbytes:nf4"
    rules = overrides.build(find, recipe=recipe)
    assert rules.choose("lm_head.weight").format == "copy"
    assert rules.choose("a.v_proj.weight").format == "bitsandbytes:int8"
    assert rules.choose("a.v_proj.weight").why == "values are sensitive"
    assert rules.choose("a.k_proj.weight").format == "copy"
    assert rules.choose("a.fc.weight") is None
    assert rules.unused() == []


def test_assignments_go_before_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[[rule]]\nmatch = "a"\nformat = "nf4"\n')
    rules = overrides.build(find, recipe=overrides.read_recipe(path, find), assign=["a=int8"])
    assert rules.choose("a").format == "bitsandbytes:int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default = 3", "default is not a string"),
        ("defaults = 'nf4'", 'unknown key "defaults"'),
        ("keep = 'x'", "keep is not a list"),
        ("keep = ['(']", "is not a regular expression"),
        ("rule = 3", "rules are written as"),
        ("[[rule]]\nmatch = 'a'", 'rule 1 has no "format"'),
        ("[[rule]]\nformat = 'nf4'", 'rule 1 has no "match"'),
        ("[[rule]]\nmatch = 'a'\nformat = 'nf5'", 'unknown format "nf5"'),
        ("[[rule]]\nmatch = 'a'\nformat = 'nf4'\nwy = 'x'", 'did you mean "why"'),
        ("default =", "is not TOML"),
    ],
)
def test_a_recipe_with_a_mistake_names_it(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        overrides.read_recipe(path, find)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        overrides.read_recipe(tmp_path / "none.toml", find)


@pytest.mark.parametrize("text", ["q_proj", "=nf4", "q_proj=", "("])
def test_assignments_that_are_not(text):
    with pytest.raises(ConfigError):
        overrides.build(find, assign=[text])


def test_the_last_equals_sign_divides():
    rules = overrides.build(find, assign=["(?=a)a=nf4"])
    assert rules.choose("a").format == "bitsandbytes:nf4"
