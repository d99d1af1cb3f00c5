"""The plan file and the rules that say what each site asks for."""

import json

import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import Calibration, QuantPlan, SiteQuantizer
from tvm_vitq.site_rules import Granularities, parse_bits, resolve_specs

SITES = [
    f"blocks.{i}.{layer}"
    for i in range(2)
    for layer in (
        "attn.qkv.input",
        "attn.qkv.weight",
        "attn.q",
        "attn.probs",
        "mlp.fc2.input",
        "mlp.fc2.weight",
    )
]


def example() -> QuantPlan:
    return QuantPlan(
        model="tiny",
        input_shape=[1, 3, 8, 8],
        recipe="minmax",
        sites={
            "head.input": SiteQuantizer(4, [0.5], [3]),
            "head.weight": SiteQuantizer(8, [0.1, 0.2], [0, 0], signed=True, granularity="channel", axis=0),
            "fc.input": SiteQuantizer(8, [0.1, 0.2], [1, 2], granularity="group", group_size=16),
        },
        aliases={"gate.input": "fc.input"},
        ranges={"x": 2.5},
        calibration=Calibration("array: 4 images", 4, ["a.png"], 7),
    )


def test_round_trip(tmp_path):
    plan = example()
    plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == plan
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_sites_are_short_in_the_file():
    assert example().to_dict()["sites"]["head.input"] == {"bits": 4, "scale": [0.5], "zero_point": [3]}


def test_code_ranges():
    plan = example()
    assert (plan["head.input"].qmin, plan["head.input"].qmax) == (0, 15)
    assert (plan["head.weight"].qmin, plan["head.weight"].qmax) == (-127, 127)


def test_alias_and_nearest_name():
    plan = example()
    assert plan["gate.input"] is plan.sites["fc.input"]
    with pytest.raises(VitqError, match=r"head\.input"):
        plan["heat.input"]


def test_hash_depends_on_numbers_only():
    plan = example()
    before = plan.hash
    plan.comment, plan.notes, plan.versions = "mine", {"a": "b"}, {"torch": "1"}
    assert plan.hash == before and len(before) == 12
    plan.ranges["x"] = 2.6
    assert plan.hash != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(recipy="x"), "recipe"),
        (lambda d: d["sites"]["head.input"].update(scales=[1]), "unknown key"),
        (lambda d: d["sites"]["head.input"].update(bits=9), "bit width"),
        (lambda d: d["sites"]["head.input"].update(bits=True), r"wrong type[\s\S]*head\.input: bits"),
        (lambda d: d["sites"]["head.input"].update(scale=[-1.0]), "positive"),
        (lambda d: d["sites"]["head.input"].update(scale=[float("nan")]), "positive"),
        (lambda d: d["sites"]["head.input"].update(zero_point=[1.5]), r"list\[int\]"),
        (lambda d: d["sites"]["head.input"].update(scale="abc"), r"list\[float\]"),
        (lambda d: d["sites"]["head.input"].update(scale=[None]), r"list\[float\]"),
        (lambda d: d["sites"]["head.input"].update(axis="x"), r"int \| None"),
        (lambda d: d["sites"]["fc.input"].update(group_size=0), "1 or more"),
        (lambda d: d["sites"].update({"head.input": None}), "object"),
        (lambda d: d.update(recipe=[1]), "plan.json: recipe"),
        (lambda d: d.update(input_shape="x"), r"list\[int\]"),
        (lambda d: d.update(ranges=[1]), r"dict\[str, float\]"),
        (lambda d: d["ranges"].update(x="1"), r"dict\[str, float\]"),
        (lambda d: d["aliases"].update(a=["b"]), r"dict\[str, str\]"),
        (lambda d: d.update(notes=3), "notes"),
        (lambda d: d["calibration"].update(count="many"), "calibration: count"),
        (lambda d: d["sites"]["head.input"].update(zero_point=[]), "length"),
        (lambda d: d["sites"]["head.input"].pop("scale"), "incomplete"),
        (lambda d: d["sites"]["head.input"].update(granularity="tile"), "granularity"),
        (lambda d: d["sites"]["fc.input"].pop("group_size"), "group_size"),
        (lambda d: d["sites"]["head.weight"].update(zero_point=[1, 0]), "symmetric"),
        (lambda d: d["aliases"].update(a="b"), "alias"),
        (lambda d: d["ranges"].update(x=-1), "range"),
        (lambda d: d.update(requantize="float"), "requantization"),
        (lambda d: d.update(format_version=99), "version"),
        (lambda d: d.update(format="other"), "not a quantization plan"),
        (lambda d: d["calibration"].update(number=3), "unknown key"),
        (lambda d: d.update(sites=[]), "object"),
    ],
)
def test_malformed(tmp_path, change, message):
    data = example().to_dict()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(VitqError, match=message):
        QuantPlan.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "tvm-vitq plan", ', b"\xff\xfe", b"PK\x03\x04"])
def test_truncated_or_foreign(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(VitqError, match=r"plan\.json"):
        QuantPlan.load(tmp_path / "plan.json")
    with pytest.raises(VitqError, match="could not read"):
        QuantPlan.load(tmp_path / "absent.json")


def test_save_leaves_nothing_behind(tmp_path):
    with pytest.raises(VitqError):
        example().save(tmp_path / "absent" / "plan.json")
    assert not list(tmp_path.iterdir())


def test_names_of_another_model():
    plan = example()
    plan.check(["head.input", "head.weight", "fc.input", "gate.input"])
    with pytest.raises(VitqError, match=r"gate\.input[\s\S]*gates\.input"):
        plan.check(["head.input", "head.weight", "fc.input", "gates.input"])
    with pytest.raises(VitqError, match="lacks"):
        plan.check(["head.input", "head.weight", "fc.input", "gate.input", "more.input"])


def test_parse_bits():
    assert parse_bits("w3a8") == (3, 8)
    for wrong in ("w8", "a8w8", "W8A8", "8", "w8a8 ", "", None, 8):
        with pytest.raises(VitqError, match="bits"):
            parse_bits(wrong)
    for wrong in ("w1a8", "w8a9", "w16a16", "w0a4"):
        with pytest.raises(VitqError, match="2 to 8"):
            parse_bits(wrong)


def test_specs_from_bits():
    specs = resolve_specs(SITES, "w3a4", image_sites=frozenset(["blocks.0.attn.qkv.input"]))
    assert specs["blocks.0.attn.qkv.input"].bits == 8
    assert specs["blocks.1.attn.qkv.input"].bits == 4
    assert specs["blocks.1.mlp.fc2.weight"].bits == 3
    assert specs["blocks.1.mlp.fc2.weight"].granularity == "channel"
    assert specs["blocks.1.attn.probs"].bits == 4


def test_last_override_wins():
    specs = resolve_specs(
        SITES,
        "w4a4",
        overrides={
            "blocks.*.mlp.fc2.input": {"bits": 8},
            r"re:blocks\.1\.mlp.*\.input": 6,
            "blocks.0.attn.qkv": 7,
        },
    )
    assert specs["blocks.0.mlp.fc2.input"].bits == 8
    assert specs["blocks.1.mlp.fc2.input"].bits == 6
    assert specs["blocks.0.attn.qkv.weight"].bits == specs["blocks.0.attn.qkv.input"].bits == 7
    assert specs["blocks.0.mlp.fc2.weight"].bits == 4


def test_group_override_and_defaults():
    specs = resolve_specs(SITES, "w4a4", overrides={"*.fc2.weight": {"group_size": 32}})
    assert specs["blocks.0.mlp.fc2.weight"].granularity == "group"
    specs = resolve_specs(
        SITES, "w4a4", granularities=Granularities(input="token", heads="head", weight_group=16)
    )
    assert specs["blocks.0.mlp.fc2.input"].granularity == "token"
    assert specs["blocks.0.attn.q"].granularity == "head"
    assert specs["blocks.0.attn.qkv.weight"].group_size == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.0.mlp.fc3.input": 8}, r"blocks\.0\.mlp\.fc2\.input"),
        ({"*.fc2.input": {"bits": 9}}, "2 to 8"),
        ({"*.fc2.input": {"bit": 8}}, "unknown key"),
        ({"*.fc2.input": "w8"}, "malformed"),
        ({"re:(": 8}, "regular expression"),
        ({"*.fc2.input": {"granularity": "channel"}}, "granularity"),
        ({"*.fc2.weight": {"granularity": "token"}}, "granularity"),
        ({"*.fc2.weight": {"granularity": "group"}}, "group_size"),
    ],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(VitqError, match=message):
        resolve_specs(SITES, "w4a4", overrides=overrides)
