"""Write mutoscope/server/dialects/runway_models.json: which model takes which fields at which endpoint.

    .venv/bin/python scripts/make_runway_models.py            # reads the installed SDK and .venv/sdk/runwayml-5.13.0
    .venv/bin/python scripts/make_runway_models.py --check

The facts are read from the types of the official SDKs (names, required, choices) and from the ranges that their
descriptions state. The newer SDK counts; what only the older one knows is added. What no SDK types any more but
deployed clients still send is in `LEGACY`.

A field's rule is one of
    {"enum": [...]}             {"int": [low, high]}        {"number": [low, high]}     {"bool": true}
    {"text": [shortest, longest], "pattern": "..."}          {"media": "image"}          {"any": [rule, ...]}
    {"list": rule, "most": n}   {"object": {name: rule}, "required": [...]}
with null for a limit that is not stated.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "mutoscope" / "server" / "dialects" / "runway_models.json"
NEW = ROOT / ".venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / "runwayml"
OLD = ROOT / ".venv" / "sdk" / "runwayml-5.13.0" / "runwayml"
ENDPOINTS = ("text_to_video", "image_to_video", "video_to_video", "text_to_image", "character_performance",
             "video_upscale", "image_upscale", "video_to_hdr")  # fmt: skip

Rule = dict[str, Any]
SEED: Rule = {"int": [0, 4294967295]}
NATIVE_PROMPT: Rule = {"text": [1, 1000]}
MODERATION: Rule = {"object": {"publicFigureThreshold": {"enum": ["auto", "low"]}}, "required": []}
SIX_SIZES: Rule = {"enum": ["1280:720", "720:1280", "1104:832", "960:960", "832:1104", "1584:672"]}
IMAGE: Rule = {"media": "image"}
VIDEO: Rule = {"media": "video"}


def frame(*positions: str) -> Rule:
    one = {"object": {"uri": IMAGE, "position": {"enum": list(positions)}}, "required": ["uri", "position"]}
    return {"any": [IMAGE, {"list": one, "most": len(positions)}]}


VEO3_SIZES: Rule = {"enum": ["1280:720", "720:1280", "1080:1920", "1920:1080"]}
LEGACY: dict[str, dict[str, Rule]] = {
    "image_to_video": {
        "gen3a_turbo": {"fields": {"promptImage": frame("first", "last"), "promptText": NATIVE_PROMPT,
                                   "duration": {"enum": [5, 10]}, "ratio": {"enum": ["768:1280", "1280:768"]},
                                   "seed": SEED, "contentModeration": MODERATION},
                        "required": ["promptImage", "promptText"]},
        "veo3": {"fields": {"promptImage": frame("first"), "promptText": NATIVE_PROMPT, "duration": {"enum": [8]},
                            "ratio": VEO3_SIZES},
                 "required": ["promptImage", "duration", "ratio"]},
    },
    "text_to_video": {
        "veo3": {"fields": {"promptText": NATIVE_PROMPT, "duration": {"enum": [8]}, "ratio": VEO3_SIZES},
                 "required": ["promptText", "duration", "ratio"]},
    },
    "video_to_video": {
        "gen4_aleph": {"fields": {"videoUri": VIDEO, "promptText": NATIVE_PROMPT, "seed": SEED,
                                  "contentModeration": MODERATION,
                                  "ratio": {"enum": [*SIX_SIZES["enum"], "848:480", "640:480"]},
                                  "references": {"list": {"object": {"type": {"enum": ["image"]}, "uri": IMAGE},
                                                          "required": ["type", "uri"]}, "most": 1}},
                       "required": ["videoUri", "promptText"]},
        "aleph2": {"fields": {"promptImage": {"list": {"object": {"uri": IMAGE, "position": {"any": [
            {"enum": ["first", "last"]},
            {"object": {"type": {"enum": ["timestamp"]}, "timestampSeconds": {"number": [0, None]}},
             "required": ["type", "timestampSeconds"]},
            {"object": {"type": {"enum": ["position"]}, "positionPercentage": {"number": [0, 1]}},
             "required": ["type", "positionPercentage"]}]}}, "required": ["uri", "position"]}, "most": 5}},
                   "required": []},
    },
    "video_upscale": {"upscale_v1": {"fields": {"videoUri": VIDEO}, "required": ["videoUri"]}},
}  # fmt: skip

RANGES: dict[tuple[str, str], Rule] = {
    ("*", "seed"): SEED,
    ("*", "cfgScale"): {"number": [0, 1]},
    ("*", "at"): {"number": [0, 1]},
    ("*", "seconds"): {"number": [0, None]},
    ("*", "timestampSeconds"): {"number": [0, None]},
    ("*", "positionPercentage"): {"number": [0, 1]},
    ("*", "start_seconds"): {"int": [0, None]},
    ("*", "end_seconds"): {"int": [1, None]},
    ("*", "outputCount"): {"int": [1, 10]},
    ("gen4_turbo", "duration"): {"int": [2, 10]},
    ("gen4_turbo", "promptText"): NATIVE_PROMPT,
    ("aleph2", "promptText"): NATIVE_PROMPT,
    ("gen4_image", "referenceImages"): {"most": 3},
    ("gen4_image_turbo", "referenceImages"): {"most": 3},
}
"""Ranges that the types do not say and their descriptions do not say either, by (model or *, field)."""


KEYFRAMES_OR_REFERENCES: Rule = {
    "any": [
        IMAGE,
        {"list": {"object": {"uri": IMAGE, "position": {"enum": ["first", "last"]}}, "required": ["uri"]},
         "most": None},
    ]
}  # fmt: skip
"""What the description of an untyped promptImage says: positions, or references without one."""


VIDEO_REFERENCE: Rule = {"object": {"type": {"enum": ["video"]}, "uri": VIDEO}, "required": ["uri"]}


class Types:
    """One module of the SDK's parameter types, read without importing it."""

    def __init__(self, file: Path) -> None:
        self.names: dict[str, ast.stmt] = {}
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                self.names[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.names[node.target.id] = node

    def variants(self, name: str) -> list[str]:
        """Names of the classes that a type alias joins, or the class itself."""
        node = self.names[name]
        if isinstance(node, ast.ClassDef):
            return [name]
        assert isinstance(node, ast.AnnAssign)
        assert isinstance(node.value, ast.Subscript)
        return [ast.unparse(e) for e in _elements(node.value.slice)]

    def object(self, name: str, model: str = "") -> Rule:
        node = self.names[name]
        assert isinstance(node, ast.ClassDef)
        fields: dict[str, Rule] = {}
        required = []
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            assert isinstance(statement.target, ast.Name)
            doc = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                doc = " ".join(str(after.value.value).split())
            annotation, needed, alias = _unwrap(statement.annotation)
            wire = alias or statement.target.id
            fields[wire] = self.rule(annotation, wire, doc, model)
            if needed:
                required.append(wire)
        return {"fields": fields, "required": required}

    def rule(self, annotation: ast.expr, field: str, doc: str, model: str) -> Rule:
        if field == "promptImage" and "Iterable[object]" in ast.unparse(annotation):
            return KEYFRAMES_OR_REFERENCES
        if field == "referenceVideos" and ast.unparse(annotation) == "Iterable[object]":
            return {"list": VIDEO_REFERENCE, "most": 5}
        rule = self._rule(annotation, field, doc, model)
        for key in (("*", field), (model, field)):
            if key in RANGES and not ({"enum", "any"} & rule.keys()):
                rule = {**rule, **RANGES[key]}
        return rule

    def _rule(self, annotation: ast.expr, field: str, doc: str, model: str) -> Rule:
        if isinstance(annotation, ast.Subscript):
            head = ast.unparse(annotation.value)
            elements = _elements(annotation.slice)
            if head == "Annotated":
                return self._rule(elements[0], field, doc, model)
            if head == "Literal":
                return {"enum": [ast.literal_eval(e) for e in elements]}
            if head == "Union":
                return {"any": [self.rule(e, field, doc, model) for e in elements]}
            if head == "Optional":
                return self.rule(elements[0], field, doc, model)
            if head in ("Iterable", "SequenceNotStr", "List"):
                most = re.search(r"[Uu]p to (\d+) |1 to (\d+) images|\(up to (\d+)\)", doc)
                return {
                    "list": self.rule(elements[0], "", doc, model),
                    "most": int(next(g for g in most.groups() if g)) if most else None,
                }
            raise ValueError(f"{field}: {ast.unparse(annotation)}")
        name = ast.unparse(annotation)
        if name == "int":
            return {"int": _range(doc)}
        if name == "float":
            return {"number": _range(doc)}
        if name == "bool":
            return {"bool": True}
        if name == "str":
            return _text(field, doc)
        node = self.names[name]
        if isinstance(node, ast.AnnAssign):
            assert node.value is not None
            return self.rule(node.value, field, doc, model)
        found = self.object(name, model)
        return {"object": found["fields"], "required": found["required"]}


def _elements(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _unwrap(node: ast.expr) -> tuple[ast.expr, bool, str]:
    """Required[Annotated[T, PropertyInfo(alias="x")]] to T, True, x."""
    needed, alias = False, ""
    while isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Required", "Annotated"):
        elements = _elements(node.slice)
        if ast.unparse(node.value) == "Required":
            needed = True
        for extra in elements[1:]:
            assert isinstance(extra, ast.Call)
            alias = next((ast.literal_eval(k.value) for k in extra.keywords if k.arg == "alias"), alias)
        node = elements[0]
    return node, needed, alias


def _range(doc: str) -> list[int | None]:
    for pattern in (
        r"from (\d+) to (\d+)\b",
        r"between (\d+) and (\d+)",
        r"from (\d+) \([a-z ]+\) to (\d+)",
        r"\((\d+)-(\d+)\)",
    ):
        if found := re.search(pattern, doc):
            return [int(found[1]), int(found[2])]
    return [None, None]


def _text(field: str, doc: str) -> Rule:
    if kind := re.search(r"containing an encoded (image|video|audio)", doc):
        return {"media": kind[1]}
    if field in ("uri", "maskUri", "promptImage", "references"):
        return {"media": "image"}
    if "Must be 3-16 characters" in doc or field == "tag":
        return {"text": [3, 16], "pattern": "[A-Za-z][A-Za-z0-9_]*"}
    longest = re.search(r"up to ([\d,]+) characters", doc)
    shortest = 1 if "non-empty" in doc or field == "promptText" else 0
    return {"text": [shortest, int(longest[1].replace(",", "")) if longest else None]}


def endpoints(package: Path) -> dict[str, dict[str, Rule]]:
    table: dict[str, dict[str, Rule]] = {}
    for endpoint in ENDPOINTS:
        file = package / "types" / f"{endpoint}_create_params.py"
        if not file.is_file():
            continue
        types = Types(file)
        name = "".join(part.title() for part in endpoint.split("_")) + "CreateParams"
        for variant in types.variants(name):
            model_rule = types.object(variant)["fields"]["model"]["enum"]
            for model in model_rule:
                found = types.object(variant, model)
                del found["fields"]["model"]
                found["required"].remove("model")
                table.setdefault(endpoint, {})[model] = found
    return table


def routes(package: Path) -> list[list[str]]:
    """Every method and path that the SDK can call."""
    found = set()
    for file in (package / "resources").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args):
                continue
            method = {"_post": "POST", "_get": "GET", "_patch": "PATCH", "_delete": "DELETE", "_put": "PUT",
                      "_get_api_list": "GET"}.get(call.func.attr)  # fmt: skip
            texts = [n.value for n in ast.walk(call.args[0])
                     if isinstance(n, ast.Constant) and str(n.value).startswith("/v1/")]  # fmt: skip
            if method and texts:
                whole = call.args[0]
                path = texts[0]
                if isinstance(whole, ast.JoinedStr):
                    path = "".join(
                        str(v.value) if isinstance(v, ast.Constant) else "{id}" for v in whole.values
                    )
                found.add((method, re.sub(r"\{[^}]*\}", "{id}", path)))
    return [list(pair) for pair in sorted(found, key=lambda r: (r[1], r[0]))]


def usage_models(package: Path) -> list[str]:
    tree = ast.parse((package / "types" / "organization_retrieve_usage_response.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "ResultUsedCredit":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "model":
                    assert isinstance(field.annotation, ast.Subscript)
                    return [str(ast.literal_eval(e)) for e in _elements(field.annotation.slice)]
    raise ValueError("no closed list of models in the usage response")


def build() -> dict[str, Any]:
    table = endpoints(NEW)
    for older in (endpoints(OLD), LEGACY):
        for endpoint, models in older.items():
            for model, rule in models.items():
                if model not in table[endpoint]:
                    table[endpoint][model] = rule
                    continue
                for name, field in rule["fields"].items():
                    table[endpoint][model]["fields"].setdefault(name, field)
    generate = {
        kind: Types(NEW / "types" / "generate" / f"{kind}_create_params.py").object("Input")
        for kind in ("video", "image")
    }
    return {
        "source": f"runwayml {_version(NEW)} and {_version(OLD)}, written by scripts/make_runway_models.py",
        "usage_models": usage_models(NEW),
        "routes": routes(NEW),
        "generate": generate,
        "endpoints": table,
    }


def _version(package: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (package / "_version.py").read_text("utf-8"))
    assert found
    return found[1]


def render(data: dict[str, Any]) -> str:
    """JSON with one line a model, so that a change of the SDK is a readable diff."""

    def flat(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    lines = ["{", f' "source": {flat(data["source"])},', f' "usage_models": {flat(data["usage_models"])},']
    lines += [' "routes": [', ",\n".join(f"  {flat(r)}" for r in data["routes"]), " ],", ' "generate": {']
    lines += [
        ",\n".join(f'  "{k}": {flat(v)}' for k, v in data["generate"].items()),
        " },",
        ' "endpoints": {',
    ]
    tables = []
    for endpoint, models in data["endpoints"].items():
        inner = ",\n".join(f'   "{m}": {flat(r)}' for m, r in models.items())
        tables.append(f'  "{endpoint}": {{\n{inner}\n  }}')
    return "\n".join([*lines, ",\n".join(tables), " }", "}"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is not up to date")
    options = parser.parse_args()
    text = render(build())
    if options.check:
        same = OUT.is_file() and OUT.read_text("utf-8") == text
        print(f"{OUT.name}: {'up to date' if same else 'differs, run scripts/make_runway_models.py'}")
        return 0 if same else 1
    OUT.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
