"""Robots read from files: what is derived from the tables, and what a bad file says."""

import numpy as np
import pytest

from pwm_fast.envs.dflex.model import ASSETS, ModelError, build_model, load_model


def tables(name="hopper"):
    with np.load(ASSETS / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(
    ("name", "links", "mass", "nq", "nqd"),
    [
        ("hopper", 6, 15.820, 6, 6),
        ("ant", 9, 182.18, 15, 14),
        ("humanoid", 22, 40.844, 28, 27),
        ("anymal", 13, 37.251, 19, 18),
        ("snu", 11, 37.0, 29, 24),
    ],
)
def test_shipped_robots_have_the_published_sizes(name, links, mass, nq, nqd):
    model = load_model(name)
    assert (model.num_links, model.nq, model.nqd) == (links, nq, nqd)
    assert model.mass.sum() == pytest.approx(mass, rel=1e-4)


def test_welding_fixed_links_keeps_mass_contacts_and_bodies():
    raw, model = tables("anymal"), load_model("anymal")
    assert len(raw["joint_type"]) == 76 and model.num_links == 13
    assert len(model.contact_link) == len(raw["contact_body0"]) == 14
    shank = 3  # its only shape is the foot: a sphere, so its inertia does not depend on how frames turn
    assert np.allclose(np.diag(model.inertia[shank]), 4.0715e-5, rtol=1e-3)
    assert model.mass[shank] == pytest.approx(0.113097, rel=1e-4)


def test_muscles_pull_between_links_only():
    model = load_model("snu")
    assert len(model.tension) == 152 and len(model.segments.muscle) == 198
    assert (model.segments.links[:, 0] != model.segments.links[:, 1]).all()
    assert model.tension.sum() == pytest.approx(0.36 * 55158.5, rel=1e-3)


def remove(name):
    return lambda t: t.pop(name)


def assign(name, index, value):
    return lambda t: t[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (remove("joint_axis"), r"model 'bad' lacks the tables \['joint_axis'\]"),
        (assign("body_I_m", 0, np.nan), "table 'body_I_m' holds non-finite numbers"),
        (lambda t: t.update(joint_axis=t["joint_axis"][:-1]), "'joint_axis' has 5 rows, expected one per link"),
        (assign("joint_type", 2, 7), "joint types must be 0..4"),
        (assign("joint_type", 2, 4), "a free joint is supported at the root"),
        (assign("joint_type", 0, 3), "link 0 is fixed to the world"),
        (assign("joint_parent", 1, 3), "every parent must come before its child"),
        (lambda t: t.update(joint_target=t["joint_target"][:3]), "'joint_target' has 3 entries, needs 6"),
        (lambda t: t.update(joint_armature=t["joint_armature"][:3]), "'joint_armature' needs 6 entries"),
        (assign("contact_body0", 0, 9), r"'contact_body0' names a link outside 0\.\.5"),
    ],
)
def test_a_bad_table_is_named(damage, text):
    bad = tables()
    damage(bad)
    if "fixed" in text:  # one coordinate fewer, or the tables' lengths would be noticed first
        bad["joint_armature"] = bad["joint_armature"][1:]
    with pytest.raises(ModelError, match=text):
        build_model(bad, "bad")


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no model 'hoper' in .*; there are \['ant', 'anymal', 'hopper'"):
        load_model("hoper")
    (tmp_path / "torn.npz").write_bytes((ASSETS / "hopper.npz").read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"torn\.npz is unreadable"):
        load_model("torn", tmp_path)
